"""How a pruned model heals."""

from __future__ import annotations

from . import blockwise, project, units

__all__ = ["blockwise", "project", "units"]
