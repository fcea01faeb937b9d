"""Compression from the command line."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data import windows
from ..errors import ModelError, OutputError, RecipeError
from ..measure import count_parameters, perplexity
from ..measure.latency import samples
from ..measure.size import bytes_on_disk
from ..models import load_tokenizer, resolve
from ..structured.plan import inputs
from .gpu import beside, converted, onto_gpu
from .make import compress
from .modules import Installed
from .store import is_compressed, load_compressed, save_compressed

#: Tokens of a prompt and of one step of an answer: what a language model is timed on.
TOKENS = (128, 1)


def workloads(model: nn.Module, example: Any, tokens: Sequence[int]) -> list[Any]:
    """Inputs to time a model on: the example, or for a language model prompts of so many tokens.

    Raises:
        RecipeError: there is neither.
    """
    if example is not None:
        return [example]
    words = int(getattr(getattr(model, "config", None), "vocab_size", None) or 0)
    if not words:
        raise RecipeError(
            "this model does not say what it takes: give the shape of one input, e.g. --example 1x3x224x224"
        )
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(words, (1, n), generator=generator)} for n in tokens]


def compress_source(
    model: nn.Module,
    source: str,
    out: Path,
    *,
    example: Any = None,
    tokens: Sequence[int] = TOKENS,
    kinds: Sequence[str] = ("float32",),
    fresh: bool = False,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
    dtype: str = "",
) -> nn.Module:
    """Compress a model that was loaded from ``source`` and write it; returns it, with its report.

    With a ``dtype`` (float16, bfloat16 or float32) it is moved to the GPU first, and compressed for that.

    Nothing is written where nothing is faster.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not force:
        raise OutputError(f"{out} exists: choose another directory or --force")
    if dtype:
        model = onto_gpu(model, dtype)
    loads = [beside(load, model) for load in workloads(model, example, tokens)]
    fast = compress(model, loads, kinds=kinds, fresh=fresh, progress=progress)
    if any(isinstance(m, Installed) for m in fast.modules()):
        tokenizer = load_tokenizer(resolve(source)) if hasattr(model, "save_pretrained") else None
        save_compressed(fast, out, source=source, tokenizer=tokenizer, force=force)
    return fast


def measure_compressed(
    path: str | Path,
    dense: nn.Module,
    fresh: nn.Module | None,
    *,
    source: str = "dense",
    example: Any = None,
    data: Any = None,
    count: int | None = None,
    length: int = 512,
    tokens: Sequence[int] = TOKENS,
) -> dict[str, dict[str, Any]]:
    """A compressed model beside the dense one: times (median and interval), bytes, parameters, perplexity.

    Args:
        dense: the model that it was made of, and ``source``, what that is called.
        fresh: for models that are not of transformers, one from the same factory.
    """
    folder = Path(path)
    if not is_compressed(folder):
        raise ModelError(f"{folder} is not a model that secateur compressed")
    small = load_compressed(folder, fresh)
    if (like := next(small.parameters(), None)) is not None and like.is_cuda:
        dense = converted(dense, like.device, like.dtype)
    models: dict[str, nn.Module] = {"dense": dense, "compressed": small}
    found: dict[str, dict[str, Any]] = {}
    text = None
    if (folder / "tokenizer_config.json").exists() and data is not None:
        text = windows(data, load_tokenizer(folder), count=count, length=length)
    timed: dict[str, dict[str, list[float]]] = {}
    done: dict[str, int] = {}  # tokens, or images
    for load in workloads(small, example, tokens):
        args, kwargs = inputs(beside(load, small))
        language = isinstance(load, dict)
        label = f"{load['input_ids'].shape[1]} tokens" if language else "x".join(map(str, load.shape))
        timed[label] = samples(models, args, kwargs, repeats=15)
        done[label] = load["input_ids"].numel() if language else load.shape[0]
    for title, key in ((str(path), "compressed"), (source, "dense")):
        model = models[key]
        parameters, nonzero = count_parameters(model)
        if key == "compressed":  # packed weights are buffers, and hold no zeros
            own = [m for m in model.modules() if isinstance(m, Installed)]
            parameters, nonzero = parameters + sum(m.stored for m in own), nonzero + sum(m.nonzeros for m in own)
        tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
        place = folder if key == "compressed" else Path(source)
        found[title] = {
            "parameters": parameters,
            "nonzero": nonzero,
            "memory": sum(t.numel() * t.element_size() for t in tensors),
            "bytes": bytes_on_disk(place) if place.is_dir() else None,
            "latency": {name: _summary(rows[key], done[name]) for name, rows in timed.items()},
            "perplexity": perplexity(model, text.ids, text=text.source, sha256=text.sha256).to_dict() if text else None,
            "threads": torch.get_num_threads(),
        }
    return found


def _summary(seconds: Sequence[float], done: int) -> dict[str, float]:
    """Median seconds, the quartiles around it, and tokens or images a second."""
    low, middle, high = statistics.quantiles(seconds, n=4)
    return {"median": middle, "low": low, "high": high, "rate": done / middle}
