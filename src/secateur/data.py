"""Calibration and evaluation data: text, JSONL, Hugging Face datasets or tensors, cut into windows of tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import DataError

CALIBRATION = "text:calibration"
EVALUATION = "text:evaluation"


@dataclass(frozen=True, eq=False)
class Windows:
    """Token windows, and where they come from.

    Attributes:
        ids: int64 ``(windows, length)``.
        source: what the user named.
        sha256: of the token ids (int64, little endian) in order.
        tokenizer: name of the tokenizer, or "" for given tensors.
        available: tokens in the source; the windows are spread evenly over them.
    """

    ids: Tensor
    source: str
    sha256: str
    tokenizer: str = ""
    available: int = 0

    def __len__(self) -> int:
        return int(self.ids.shape[0])

    @property
    def length(self) -> int:
        return int(self.ids.shape[1])

    @property
    def tokens(self) -> int:
        return self.ids.numel()

    def describe(self) -> dict[str, Any]:
        """The record for ``run.json``."""
        return {
            "source": self.source,
            "sha256": self.sha256,
            "windows": len(self),
            "length": self.length,
            "tokens": self.tokens,
            "tokenizer": self.tokenizer,
            "available_tokens": self.available,
        }


def read_text(source: str) -> str:
    """The text of a source, documents joined by blank lines.

    Args:
        source: ``text:FILE``, ``jsonl:FILE[#field]``, ``hf:DATASET[/CONFIG][#field]``, or the names of the
            two texts that ship with the package, ``text:calibration`` and ``text:evaluation``.

    Raises:
        DataError: unknown kind, missing or empty file, no such field.
    """
    kind, _, rest = source.partition(":")
    if kind == "text" and rest in ("calibration", "evaluation"):
        text = resources.files("secateur").joinpath("texts", f"{rest}.txt").read_text(encoding="utf-8")
    elif kind == "text":
        text = _read(Path(rest))
    elif kind == "jsonl":
        name, _, key = rest.partition("#")
        text = "\n\n".join(_jsonl(Path(name), key or "text"))
    elif kind == "hf":
        name, _, key = rest.partition("#")
        text = "\n\n".join(_hub_dataset(name, key or "text"))
    else:
        raise DataError(f"data '{source}' is not understood: write text:FILE, jsonl:FILE#field or hf:DATASET#field")
    if not text.strip():
        raise DataError(f"{source} is empty: give a text of at least one window of tokens")
    return text


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(f"there is no file {path}: give --data text:FILE") from None
    except IsADirectoryError:
        raise DataError(f"{path} is a directory: give a text file") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}): convert it first") from None


def _jsonl(path: Path, key: str) -> Iterator[str]:
    for number, line in enumerate(_read(path).split("\n"), 1):  # JSON text may hold other line separators
        if not line.strip():
            continue
        try:
            value = json.loads(line)[key]
        except json.JSONDecodeError:
            raise DataError(f"{path}, line {number} is not JSON") from None
        except (KeyError, TypeError):
            raise DataError(f"{path}, line {number} has no field '{key}': name one with jsonl:FILE#field") from None
        yield str(value)


def _hub_dataset(name: str, key: str) -> Iterator[str]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise DataError("hf: data needs the package 'datasets': pip install 'secateur[data]'") from None
    try:
        rows = load_dataset(name, split="train", streaming=True)
        for count, row in enumerate(rows):
            if key not in row:
                raise DataError(f"dataset {name} has no field '{key}'; it has {sorted(row)}")
            yield str(row[key])
            if count >= 2000:
                return
    except (OSError, ValueError, ConnectionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"dataset {name} cannot be read: {error}") from None


def windows(
    source: str | Windows | Tensor | Iterable[Any],
    tokenizer: Any = None,
    *,
    count: int | None = None,
    length: int = 512,
    seed: int | None = None,
) -> Windows:
    """Cut data into windows of ``length`` tokens.

    Text is tokenized by the model's own tokenizer without special tokens, documents one after another;
    ``count`` windows are spread evenly over it (None: all of them, one after another). With a ``seed`` they are drawn
    at random instead, none of them twice.

    Raises:
        DataError: the text is shorter than one window, or there are fewer windows than asked for.
    """
    if isinstance(source, Windows):
        return source
    if isinstance(source, str):
        if tokenizer is None:
            raise DataError(f"data '{source}' is text, and the model has no tokenizer: give token tensors")
        text = read_text(source)
        ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids, dtype=torch.long)
        return _cut(
            ids, source, str(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__), count, length, seed
        )
    return _given(source, count)


def _cut(
    ids: Tensor, source: str, tokenizer: str, count: int | None, length: int, seed: int | None = None
) -> Windows:  # fmt: skip
    if length < 1 or (count is not None and count < 1):
        raise DataError(f"{count} windows of {length} tokens were asked for: ask for at least one of one token")
    fit = ids.numel() // length
    if fit == 0:
        raise DataError(f"{source} has {ids.numel()} tokens, less than one window of {length}: give more text")
    if count is not None and count > fit:
        raise DataError(
            f"{source} has {ids.numel()} tokens, {fit} windows of {length}, and {count} were asked for: "
            "give more text, or ask for fewer or shorter windows"
        )
    wanted = fit if count is None else count
    starts = [round(k * (fit - wanted) / max(wanted - 1, 1)) + k for k in range(wanted)]
    if seed is not None:
        starts = torch.randperm(fit, generator=torch.Generator().manual_seed(seed))[:wanted].tolist()
    cut = torch.stack([ids[s * length : (s + 1) * length] for s in starts])
    return Windows(cut, source, digest(cut), tokenizer, ids.numel())


def _given(source: Tensor | Iterable[Any], count: int | None) -> Windows:
    rows: list[Tensor] = []
    for item in [source] if isinstance(source, (Tensor, Mapping)) else source:
        ids = _ids(item)
        if ids.is_floating_point():
            raise DataError("token ids are expected, not floating point tensors: give data of integer ids")
        if ids.dim() == 0 or ids.numel() == 0:
            raise DataError("token sequences are expected, not single or no ids: give data of shape (batch, length)")
        rows += list(ids.reshape(-1, ids.shape[-1]).long())
        if count is not None and len(rows) >= count:
            rows = rows[:count]
            break
    if not rows:
        raise DataError("the calibration data is empty: give at least one batch of token ids")
    if len({r.numel() for r in rows}) > 1:
        raise DataError("token sequences have different lengths: cut them to one length")
    if count is not None and count > len(rows):
        raise DataError(f"the data has {len(rows)} token sequences, and {count} were asked for: ask for fewer")
    cut = torch.stack(rows)
    return Windows(cut, "tensors", digest(cut), "", cut.numel())


def _ids(item: Any) -> Tensor:
    """Token ids of a batch: of a mapping its ``input_ids``, of a tuple the first item, of a list of ids all."""
    if isinstance(item, Mapping):
        if "input_ids" not in item:
            raise DataError(f"a batch has no 'input_ids'; it has {sorted(map(str, item))}")
        seen = item.get("attention_mask")
        if seen is not None and not bool(torch.as_tensor(seen).all()):
            raise DataError(
                "a batch has padding (zeros in its attention_mask), on which nothing should be calibrated: "
                "cut the text into windows of one length"
            )
        item = item["input_ids"]
    elif (isinstance(item, tuple) and item and not isinstance(item[0], int)) or (
        isinstance(item, list) and item and isinstance(item[0], Tensor)
    ):
        item = item[0]
    try:
        return torch.as_tensor(item)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"a batch is not a tensor of token ids: {error}") from None


def digest(ids: Tensor) -> str:
    """SHA-256 of token ids."""
    return hashlib.sha256(ids.cpu().numpy().astype("<i8").tobytes()).hexdigest()
