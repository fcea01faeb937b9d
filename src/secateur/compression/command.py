"""Compression from the command line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..disk import refuse
from ..errors import RecipeError
from ..models import load_tokenizer, resolve
from .gpu import beside, onto_gpu
from .make import compress
from .modules import Installed
from .store import save_compressed

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
    refuse(out, force, way="choose another directory or --force")
    if dtype:
        model = onto_gpu(model, dtype)
    loads = [beside(load, model) for load in workloads(model, example, tokens)]
    fast = compress(model, loads, kinds=kinds, fresh=fresh, progress=progress)
    if any(isinstance(m, Installed) for m in fast.modules()):
        tokenizer = load_tokenizer(resolve(source)) if hasattr(model, "save_pretrained") else None
        save_compressed(fast, out, source=source, tokenizer=tokenizer, force=force)
    return fast
