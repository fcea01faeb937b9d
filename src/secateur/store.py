"""Write a module without pickle."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_model
from torch import nn


def save_module(model: nn.Module, out: Path) -> None:
    """Write the weights to ``out``: by ``save_pretrained`` where the model has it, else ``model.safetensors``."""
    saver = getattr(model, "save_pretrained", None)
    if callable(saver):
        saver(out)
    else:
        save_model(model, str(out / "model.safetensors"))
