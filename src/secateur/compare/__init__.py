"""Fair comparison: the same model, data, budget and seeds for every method."""

from __future__ import annotations

from .contender import Contender
from .engine import Comparison, Tick, compare, load
from .report import sayings, write_report
from .rows import Row, read_rows, write_rows
from .study import Budget, Study, Subject

__all__ = [
    "Budget", "Comparison", "Contender", "Row", "Study", "Subject", "Tick", "compare", "load", "read_rows", "sayings",
    "write_report", "write_rows",
]  # fmt: skip
