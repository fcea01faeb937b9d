"""From safetensors shards to safetensors shards: the model on ``meta``, one block in memory, resumable."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..disk import refuse
from ..errors import ModelError, OutputError
from ..formats.stored import RECORD
from .names import Names

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class Checkpoint:
    """The tensors of a model directory, read one by one.

    Only headers are read here; every shard that the index names must be there and hold what it says.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.places: dict[str, Path] = {}
        index = path / INDEX
        if index.exists():
            try:
                weight_map = json.loads(index.read_text())["weight_map"]
            except (json.JSONDecodeError, KeyError, TypeError):
                raise ModelError(f"{index} is not a safetensors index: fetch the model again") from None
            for name, file in weight_map.items():
                if not isinstance(file, str) or Path(file).name != file:
                    raise ModelError(f"{index} names the shard {file!r}, which is not a file name")
                self.places[name] = path / file
        elif (path / SINGLE).exists():
            with _open(path / SINGLE) as f:
                self.places = dict.fromkeys(f.keys(), path / SINGLE)
        else:
            raise ModelError(f"{path} holds no {SINGLE} and no {INDEX}: save the model with save_pretrained first")
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        for file in sorted(set(self.places.values())):
            if not file.exists():
                raise ModelError(f"the shard {file.name} is missing in {path}: fetch the model again")
            with _open(file) as f:
                present = set(f.keys())
                for name in [n for n, p in self.places.items() if p == file]:
                    if name not in present:
                        raise ModelError(f"{file.name} does not hold {name}, which the index places there")
                    view = f.get_slice(name)
                    self.shapes[name] = tuple(view.get_shape())
                    self.dtypes[name] = view.get_dtype()

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors by name, as stored."""
        out: dict[str, Tensor] = {}
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self.places[name], []).append(name)
        for file, wanted in by_file.items():
            with _open(file) as f:
                out.update({name: f.get_tensor(name) for name in wanted})
        return out

    def fingerprint(self) -> str:
        """Sizes and times of the files: changes when the model does."""
        files = sorted(set(self.places.values()))
        return ";".join(f"{f.name}:{f.stat().st_size}:{f.stat().st_mtime_ns}" for f in files)


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is not a readable safetensors file ({error}): fetch the model again") from None


class Shards:
    """A causal language model whose parameters live on disk.

    Args:
        model: the model with its parameters on ``meta`` (buffers are real).
        checkpoint: where the parameters are.
        blocks: paths of the repeated blocks, in order.
        dtype: in which the blocks are run.
    """

    def __init__(self, model: nn.Module, checkpoint: Checkpoint, blocks: list[str], dtype: torch.dtype) -> None:
        self.model, self.checkpoint, self.dtype = model, checkpoint, dtype
        self.blocks = blocks
        self.names = Names(model, checkpoint.places)
        prefixes = tuple(f"{b}." for b in blocks)
        self._members: dict[str, list[str]] = {b: [] for b in blocks}
        self.rest: list[str] = []
        for stored, name in self.names.of.items():
            block = next((b for b, p in zip(blocks, prefixes, strict=True) if name.startswith(p)), None)
            (self.rest if block is None else self._members[block]).append(stored)
        self._check(prefixes)

    def _check(self, prefixes: tuple[str, ...]) -> None:
        """Refuse files that are not this model's, before any work; shapes of converted tensors show later."""
        shapes = {n: tuple(p.shape) for n, p in self.model.named_parameters()}
        reached = set(self.names.of.values())
        missing = sorted(n for n in shapes if n.startswith(prefixes) and n not in reached and not self.names.fused(n))
        if missing:
            raise ModelError(
                f"the files hold no {missing[0]} ({len(missing)} parameters in all are missing or stored under another "
                "name): fetch the model again, or prune with --resident, which loads through transformers"
            )
        for stored, name in self.names.of.items():
            if name in shapes and not self.names.converted(stored) and self.checkpoint.shapes[stored] != shapes[name]:
                raise ModelError(
                    f"{stored} has shape {list(self.checkpoint.shapes[stored])} in the files and {list(shapes[name])} "
                    "in the model's config: the directory is not one model"
                )

    def members(self, index: int) -> list[str]:
        """Names in the files of what block ``index`` holds."""
        return self._members[self.blocks[index]]

    def load_prelude(self, skip: Iterable[str] = ()) -> None:
        """Materialize what is outside the blocks, but for the parameters in ``skip`` (the output head)."""
        known = set(dict(self.model.named_parameters(remove_duplicate=False))) | set(dict(self.model.named_buffers()))
        skipped = set(skip)
        wanted = [n for n in self.rest if self.names.of[n] in known and self.names.of[n] not in skipped]
        for name, tensor in self.names.to_model(self.checkpoint.read(wanted)).items():
            _place(self.model, name, _as(tensor, self.dtype))

    def load(self, index: int) -> nn.Module:
        """Materialize block ``index``."""
        raw = self.checkpoint.read(self.members(index))
        for name, tensor in self.names.to_model(raw).items():
            _place(self.model, name, _as(tensor, self.dtype))
        block = self.model.get_submodule(self.blocks[index])
        for name, parameter in block.named_parameters():
            if parameter.device.type == "meta":
                raise ModelError(f"the files do not hold {self.blocks[index]}.{name}: fetch the model again")
        return block

    def free(self, index: int) -> dict[str, Tensor]:
        """Put block ``index`` back on ``meta``; returns its tensors as the files store them."""
        block = self.model.get_submodule(self.blocks[index])
        made: dict[str, Tensor] = {}
        reached = {self.names.of[n] for n in self.members(index)}
        for name, parameter in list(block.named_parameters(remove_duplicate=False)):
            full = f"{self.blocks[index]}.{name}"
            if full in reached or self.names.fused(full):
                made[full] = parameter.detach()
            _place(self.model, full, torch.empty_like(parameter, device="meta"))
        buffers = [n for n in self.members(index) if self.names.of[n] not in made and not self.names.converted(n)]
        out = self.names.to_files(made, set(self.members(index)) - set(buffers))
        out = {n: t.to(TORCH[self.checkpoint.dtypes[n]]).contiguous() for n, t in out.items()}
        return {**out, **self.checkpoint.read(buffers)}


TORCH = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _place(model: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, key = name.rpartition(".")
    module = model.get_submodule(path)
    if key in module._parameters:
        module._parameters[key] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[key] = tensor


class Output:
    """A model directory that is written beside its final place, shard by shard, and renamed at the end.

    ``state`` survives a kill: the blocks that are done, their records, and the activations at the next one.
    """

    def __init__(self, out: Path, force: bool, key: Mapping[str, Any]) -> None:
        self.out = out
        self.part = out.with_name(out.name + ".partial")
        refuse(out, force, way="choose another --out, or overwrite it with --force")
        self.key = json.loads(json.dumps(key))
        self._state: dict[str, Any] = {"key": self.key, "done": 0, "records": [], "seconds": 0.0}
        found = self.part / "state.json"
        if found.exists():
            try:
                state = json.loads(found.read_text())
            except json.JSONDecodeError:
                state = {}
            if state.get("key") == self.key:
                self._state = state
            else:
                shutil.rmtree(self.part)
        try:
            self.part.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot write {self.part}: {error.strerror}") from None

    @property
    def done(self) -> int:
        """Blocks that an earlier run finished."""
        return int(self._state["done"])

    @property
    def state(self) -> dict[str, Any]:
        return self._state

    def write(self, file: str, tensors: Mapping[str, Tensor]) -> None:
        """Write a safetensors file of the output, whole or not at all."""
        temporary = self.part / f".{file}.tmp"
        try:
            save_file(dict(tensors), temporary, metadata={"format": "pt"})
            os.replace(temporary, self.part / file)
        except (OSError, SafetensorError) as error:
            temporary.unlink(missing_ok=True)
            raise OutputError(
                f"cannot write {file} to {self.part}: {getattr(error, 'strerror', None) or error}; free some space "
                "and run the same command again: it goes on where it stopped"
            ) from None

    def commit(self, done: int, records: list[Any], seconds: float, activations: Mapping[str, Tensor]) -> None:
        """Note that ``done`` blocks are finished, with the activations at the next one."""
        name = f"activations-{done}.safetensors"
        if activations:
            self.write(name, activations)
        self._state.update(done=done, records=records, seconds=seconds, activations=name if activations else None)
        self.write_text("state.json", json.dumps(self._state))
        for old in self.part.glob("activations-*.safetensors"):
            if old.name != name:
                old.unlink()

    def note(self, **extra: Any) -> None:
        """Keep something small for a resumed run."""
        self._state.update(extra)
        self.write_text("state.json", json.dumps(self._state))

    def activations(self) -> dict[str, Tensor]:
        """The activations at the next block, of an earlier run."""
        name = self._state.get("activations")
        if not name:
            return {}
        with _open(self.part / name) as f:
            return {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118

    def write_text(self, file: str, text: str) -> None:
        temporary = self.part / f".{file}.tmp"
        try:
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, self.part / file)
        except OSError as error:
            raise OutputError(f"cannot write {file} to {self.part}: {error.strerror}") from None

    def copy(self, source: Path) -> None:
        """Copy what belongs to the model but is not weights: config, tokenizer, templates."""
        kinds = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".md")
        ours = (INDEX, "run.json", "state.json", RECORD)
        for file in sorted(source.iterdir()):
            if file.is_file() and file.suffix in kinds and file.name not in ours:
                shutil.copyfile(file, self.part / file.name)

    def index(self, weight_map: Mapping[str, str]) -> None:
        """Write the index: from here on the directory can be loaded."""
        size = 0
        for file in set(weight_map.values()):
            with ExitStack() as stack:
                f = stack.enter_context(_open(self.part / file))
                for name in f.keys():  # noqa: SIM118
                    view = f.get_slice(name)
                    size += TORCH[view.get_dtype()].itemsize * int(torch.tensor(view.get_shape()).prod())
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        self.write_text(INDEX, json.dumps(index, indent=2))

    def finish(self) -> None:
        """Drop the resume state, and rename into place."""
        for leftover in [*self.part.glob("activations-*"), self.part / "state.json"]:
            leftover.unlink(missing_ok=True)
        old = None
        if self.out.exists():
            old = self.out.with_name(self.out.name + ".old")
            if old.exists():
                shutil.rmtree(old)
            os.replace(self.out, old)
        os.replace(self.part, self.out)
        if old is not None:
            shutil.rmtree(old) if old.is_dir() else old.unlink()
