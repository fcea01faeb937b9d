"""Contrasts on the page: the question, what was published, what the runs say, and every comparison behind it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..report import values as v
from .answers import Answer, Part
from .page_tables import Column, Grid
from .page_words import changed, listed, many
from .verdicts import Comparison


def contrasts(answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """Each answer with its facts and its table of comparisons."""
    return [_contrast(k, one) for k, one in enumerate(answers)]


def _contrast(k: int, one: Answer) -> dict[str, Any]:
    facts = [("As published", one.published), ("The runs", one.agreement or "")]
    facts += [(f"Side: {name}", listed(list(labels)) or "no runs") for name, labels in one.sides.items()]
    for part in one.parts:
        if pairs := _pairs(part):
            facts.append((f"{part.left} against {part.right}", pairs))
    if one.failures:
        lost = [f"{label} in {many(n, 'run')}" for label, n in one.failures.items()]
        facts.append(("Failed", listed(lost)))
    heads = [
        Column("Sides"), Column("Subject"), Column("Target"), Column("Pair"), Column("Left against right", True),
        Column("Left is"), Column("Runs", True),
    ]  # fmt: skip
    grid = Grid(f"contrast-{k}", one.question or "contrast", heads)
    for part in one.parts:
        for found, pair in (
            *((c, "all") for c in part.overall),
            *((c, "all") for c in part.targets),
            *((c, f"{c.left} and {c.right}") for c in part.cells),
        ):
            grid.rows.append(_line(part, found, pair))
    return {
        "title": one.question or "Contrast",
        "text": one.text,
        "facts": [(name, text) for name, text in facts if text],
        "table": grid if grid.rows else None,
    }


def _pairs(part: Part) -> str:
    said = [
        f"{p.left} with {p.right}" + (f" (they differ in {listed(list(p.axes))})" if p.axes else "") for p in part.pairs
    ]
    alone = f"; matched with none: {listed(list(part.alone))}" if part.alone else ""
    return "; ".join(said) + alone


def _line(part: Part, found: Comparison, pair: str) -> list[tuple[str, Any]]:
    moved = found.estimate
    return [
        (f"{part.left} against {part.right}", None),
        (found.subject, None),
        (found.target or "all", None),
        (pair, None),
        (changed(moved, found.metric), moved.value),
        (found.text, None),
        (v.count(moved.n), moved.n),
    ]
