"""What is measured: models as a user names them, pruned here or not, and the baselines that belong to them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .compression import command as compression
from .compression import is_compressed, load_compressed
from .coupled import example_inputs, load_module, vocabulary
from .errors import ModelError
from .formats.stored import is_stored
from .measure.speed import STEPS, Forward, Generation, Workload, can_generate
from .models import load_stored, resolve
from .quality import dense_source
from .registry import parts
from .runtime import Dynamic, is_gated
from .runtime import load as load_gated
from .structured import load as load_smaller
from .tasks import find


@dataclass(frozen=True)
class Source:
    """A model by name, and how it is loaded, in this process or in another one.

    Attributes:
        name: as the user wrote it, or as a record says it.
        kind: ``plain`` (what `coupled.load_module` takes), or a directory that only secateur loads: ``structured``,
            ``compressed``, ``stored``, ``gated``, or ``ungated``, the dense model in a gated one.
        factory: of these, what makes a fresh model of the original; empty where none is needed.
        example: shape of an input of its own, where the directory tells.
        dtype: that a plain directory is loaded in; empty for the one that it is stored in.
        weights: False for timm models with random weights, which are not fetched.
        device: ``cpu`` or ``cuda``.
    """

    name: str
    kind: str = "plain"
    factory: str = ""
    example: str | None = None
    dtype: str = ""
    weights: bool = True
    device: str = "cpu"

    def load(self) -> nn.Module:
        """The model, in evaluation mode.

        Raises:
            ModelError: it cannot be loaded, or not be brought to the device.
        """
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ModelError("--device cuda: torch sees no GPU here")
        task = _task(self.name) if self.kind.endswith("gated") and not self.factory else None
        fresh = load_module(self.factory, weights=False) if self.factory else task and task.model(0)
        if self.kind == "structured":
            model = load_smaller(self.name, fresh)
        elif self.kind == "compressed":
            model = load_compressed(self.name, fresh)
        elif self.kind == "stored":
            model = load_stored(Path(self.name), fresh)
        elif self.kind.endswith("gated"):
            model = load_gated(self.name, fresh)
            model = model.model if self.kind == "ungated" and isinstance(model, Dynamic) else model
        else:
            model = load_module(self.name, self.weights, getattr(torch, self.dtype) if self.dtype else None)
        return model.eval() if self.device == "cpu" else model.to(self.device).eval()

    @property
    def directory(self) -> Path | None:
        """Where its files lie; None where it has none of its own."""
        if self.kind == "plain" and (self.name.startswith(("timm:", "timm-config:")) or _is_file(self.name)):
            return None
        return Path(self.name) if self.kind != "plain" else resolve(self.name)


def sources(model: str, against: str | None = None, alone: bool = False, device: str = "cpu") -> list[Source]:
    """A model, and behind it its baseline: the one that is named, or what the model's record says it was made of.

    A Python file runs only where the user named it: one that only a record names is refused.

    Raises:
        ModelError: the original is needed and not known.
    """
    if is_gated(model):
        return [replace(source, device=device) for source in _gated(model, against, alone)]
    kind, record = _recorded(model)
    made_of = _origin(record) if kind != "plain" else dense_source(model) or ""
    baseline = against or made_of
    factory = baseline if _recorded(baseline)[0] == "plain" else made_of  # what is smaller itself makes no fresh model
    found = [_source(model, factory)]
    if not alone and kind != "plain" and not baseline:
        raise _unknown(model, record)
    if not alone and baseline:
        # Packed and smaller models have a type of their own; to time the original of a smaller one, no weights are
        # fetched.
        its_own = _origin(_recorded(baseline)[1])
        dtype = "" if kind == "plain" else _dtype(record)
        found.append(replace(_source(baseline, its_own or factory), dtype=dtype, weights=kind != "structured"))
    for source in found:
        if device == "cpu" and _for_gpus(source.name) and torch.cuda.is_available():
            raise ModelError(f"{source.name} was compressed for GPUs: measure it with --device cuda")
    return [replace(source, device=device) for source in found]


def _gated(model: str, against: str | None, alone: bool) -> list[Source]:
    """A gated model, and the dense one in it."""
    folder = Path(model)
    task = _task(model)
    stock = (folder / "config.json").is_file()
    if not (task or stock or against):
        made_of = _json(folder / "run.json").get("task") or _json(folder / "run.json").get("source")
        named = made_of.get("name") if isinstance(made_of, dict) else made_of
        raise ModelError(
            f"{model} decides while it runs, and was made of {named or 'a module in memory'}: name what makes a fresh "
            "model of it with --against FILE.py:NAME"
        )
    factory = "" if stock or against is None else against
    shape = None if task is None else "x".join(str(n) for n in task.example_input().shape)
    found = [Source(model, kind, factory, shape) for kind in ("gated", "ungated")]
    return found[:1] if alone else found


def _task(path: str) -> Any:
    """The ready task that a gated model was trained on; None where a file, or nobody, knows it."""
    named = _json(Path(path) / "run.json").get("task")
    if not isinstance(named, dict) or named.get("name") not in parts("task"):
        return None
    return find(named["name"], **named.get("options", {}))


def _dtype(record: dict[str, Any]) -> str:
    """The type of the floats that a record describes; only types that are known are taken from a file."""
    found = str(record.get("dtype", "float32"))
    return found if found in ("float32", "float16", "bfloat16") else "float32"


def _for_gpus(name: str) -> bool:
    kind, record = _recorded(name)
    layers = record.get("layers")
    return kind == "compressed" and isinstance(layers, dict) and any("form" in facts for facts in layers.values())


def _source(name: str, factory: str) -> Source:
    """A source that is made with a factory where its record does not need another, or none."""
    kind, record = _recorded(name)
    if kind == "plain" or record.get("format") == "transformers":
        return Source(name, kind)
    if not (factory := factory or _origin(record)):
        raise _unknown(name, record)
    return Source(name, kind, factory, _shape_of(record))


def _origin(record: dict[str, Any]) -> str:
    """What a record says that a model was made of; nothing where that is a Python file."""
    found = str(record.get("source", ""))
    return "" if _is_file(found) else found


def _unknown(name: str, record: dict[str, Any]) -> ModelError:
    return ModelError(f"{name} was made of {record.get('source') or 'a module in memory'}: name it with --against")


def workloads(
    models: Sequence[nn.Module], example: str | None, tokens: Sequence[int], own: str | None = None
) -> list[Workload]:
    """What models are timed on.

    Without an example a language model has one pass over so many tokens for each of ``tokens``, and, if all keep a
    key-value cache, an answer to a prompt of the first of these lengths. Any other model has one batch.

    Args:
        models: which take the same inputs.
        example: shape of an input, as a user writes it.
        tokens: lengths.
        own: shape for what is no language model, where there is no example.

    Raises:
        RecipeError: an example that is not understood, or none where it is needed.
    """
    first = models[0]
    given = example_inputs(example or own, first) if example or not vocabulary(first) else None
    found: list[Workload] = []
    for inputs in compression.workloads(first, given, tokens):
        if isinstance(inputs, dict):
            ids = inputs["input_ids"]
            name = f"{ids.shape[1]} tokens" if given is None else f"{'x'.join(map(str, ids.shape))} tokens"
            found.append(Forward(name, kwargs=inputs, count=ids.numel()))
        else:
            found.append(Forward("x".join(map(str, inputs.shape)), (inputs,), count=inputs.shape[0]))
    if given is None and all(can_generate(model) for model in models):
        ids = torch.randint(vocabulary(first), (1, tokens[0] + STEPS), generator=torch.Generator().manual_seed(1))
        found.append(Generation(ids[:, : tokens[0]], ids[:, tokens[0] :]))
    return found


def _recorded(path: str) -> tuple[str, dict[str, Any]]:
    """The kind of a source, and the record of a directory that only secateur loads."""
    if is_compressed(path):
        return "compressed", _json(Path(path) / "compressed.json")
    if is_stored(path):
        record = _json(Path(path) / "stored.json")
        return ("plain", {}) if record.get("format") == "transformers" else ("stored", record)
    record = _json(Path(path) / "surgery.json")
    return ("structured", record) if record.get("format") == "secateur" else ("plain", {})


def _json(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _is_file(name: str) -> bool:
    return name.rpartition(":")[0].endswith(".py")


def _shape_of(record: dict[str, Any]) -> str | None:
    given = record.get("example") or []
    shapes = [x["shape"] for x in given if isinstance(x, dict)]
    return "x".join(str(int(n)) for n in shapes[0]) if len(shapes) == 1 else None
