"""How a pruned model heals."""

from __future__ import annotations

from . import blockwise, distill, lora, project, training, units

__all__ = ["blockwise", "distill", "lora", "project", "training", "units"]
