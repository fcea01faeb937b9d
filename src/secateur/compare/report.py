"""From a comparison to its report."""

from __future__ import annotations

from pathlib import Path

from ..errors import SecateurError
from .answers import Answer
from .contrasts import contrast
from .engine import Comparison
from .leaders import leaders


def write_report(found: Comparison, path: str | Path) -> Path:
    """Write the report of a comparison as one HTML file; returns its path."""
    from .page import write_study_report

    left = {(x.subject, x.label, x.target): x.reason for x in found.left_out}
    return write_study_report(Path(path), found.study.to_dict(), found.rows, answers(found), left_out=left)


def answers(found: Comparison) -> list[Answer]:
    """What a study says to the contrast that it was made for; nothing where it was made for none, or no two sides
    have runs."""
    if found.study.contrast is None:
        return []
    asked = contrast(found.study.contrast)
    kinds = dict.fromkeys(s.kind for s in found.study.subjects)
    return [asked.answer(found.rows, kind) for kind in kinds if asked.meet(found.rows, kind) > 1]


def sayings(found: Comparison) -> list[str]:
    """The answer in sentences: to the contrast, or at each target which methods may be the best."""
    said = [one.text for one in answers(found)]
    if said:
        return said
    many = len(found.study.subjects) > 1
    try:
        best = leaders(found.rows)
    except SecateurError as error:  # scores that do not compare, or no package for statistics
        return [str(error)]
    return [f"{one.subject + ', ' if many else ''}{one.target}: {one.text}" for one in best]
