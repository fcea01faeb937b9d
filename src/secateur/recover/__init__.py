"""How a pruned model heals."""

from __future__ import annotations

from . import blockwise

__all__ = ["blockwise"]
