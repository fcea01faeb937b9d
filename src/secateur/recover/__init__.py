"""How a pruned model heals."""

from __future__ import annotations

from . import blockwise, units

__all__ = ["blockwise", "units"]
