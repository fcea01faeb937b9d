"""Fair comparison: the same model, data, budget and seeds for every method."""

from __future__ import annotations

from .rows import Row, read_rows, write_rows

__all__ = ["Row", "read_rows", "write_rows"]
