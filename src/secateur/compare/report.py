"""From a comparison to its report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .engine import Comparison


def write_report(found: Comparison, path: str | Path) -> Path:
    """Write the report of a comparison as one HTML file; returns its path."""
    from .page import write_study_report

    return write_study_report(Path(path), found.study.to_dict(), found.rows, answers(found))


def answers(found: Comparison) -> Sequence[Any]:
    """What a study says to the contrast that it was made for; empty where it was made for none."""
    return ()
