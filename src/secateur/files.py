"""Save and load models that secateur made, whatever was done to them."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from .compression import Installed, is_compressed, load_compressed, save_compressed
from .formats.integers import is_packed
from .formats.stored import is_stored
from .models import load_model, load_stored
from .runtime import Dynamic, is_gated
from .runtime import load as load_gated
from .runtime import save as save_gated
from .structured import load as load_smaller
from .structured import save as save_smaller


def save(model: nn.Module, out: str | Path) -> Path:
    """Write a smaller model (`StructuredPlan.shrink`), a compressed one (`compress`), or one with gates (`runtime`).

    What is written is safetensors and JSON.

    Raises:
        ModelError: the model is none of these.
        OutputError: ``out`` exists and is not empty.
    """
    if isinstance(model, Dynamic):
        return save_gated(model, out)
    if any(isinstance(m, Installed) for m in model.modules()):
        return save_compressed(model, out)
    return save_smaller(model, out)


def load(path: str | Path, model: nn.Module | None = None) -> nn.Module:
    """Load what `save` wrote, or a model whose weights are stored as codes (``prune --quantize``, ``--storage``).

    Args:
        model: a fresh model from the factory of the original; not needed for directories with a transformers config.

    Raises:
        ModelError: a file is missing, was changed, or does not fit the model.
    """
    if is_packed(path):
        found: nn.Module = load_model(Path(path))
        return found
    if is_stored(path):
        return load_stored(Path(path), model)
    if is_gated(path):
        gated: nn.Module = load_gated(path, model)
        return gated
    return load_compressed(path, model) if is_compressed(path) else load_smaller(path, model)
