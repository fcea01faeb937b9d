"""What goes together (a unit) and what competes (a pool)."""

from __future__ import annotations

from .base import Granularity, parse

__all__ = ["Granularity", "parse"]
