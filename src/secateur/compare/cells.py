"""Cells of a study: what one contender scored at one target of one subject, seed by seed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from ..errors import DataError
from .rows import Row

#: How two numbers are compared: by their difference, or by their ratio (a difference of logarithms).
Scale = Literal["difference", "ratio"]

#: Metrics that are positive and multiply: twice as perplexed means the same at 10 and at 1000.
RATIOS = frozenset({"perplexity"})

#: The label of the baseline in every table.
DENSE = "dense"


def scale_of(metric: str) -> Scale:
    """How scores of a metric are compared: perplexities as logarithms, so by their ratio; others by difference.

    >>> scale_of("perplexity"), scale_of("accuracy"), scale_of("bits")
    ('ratio', 'difference', 'difference')
    """
    return "ratio" if metric in RATIOS else "difference"


@dataclass(frozen=True)
class Measure:
    """A figure of a run to compare instead of its score.

    Attributes:
        name: in tables.
        path: where it stands in the result of a row.
        higher_is_better: which way is good.
        scale: how two of them are compared; costs and sizes by their ratio.
    """

    name: str
    path: tuple[str, ...]
    higher_is_better: bool = False
    scale: Scale = "ratio"


@dataclass(frozen=True)
class Cell:
    """What one contender scored at one target of one subject.

    Attributes:
        scores: seed -> score; None where the run failed or its score is not finite.
    """

    subject: str
    target: str
    label: str
    metric: str
    higher_is_better: bool
    scale: Scale
    scores: Mapping[int, float | None] = field(default_factory=dict)

    @property
    def finite(self) -> dict[int, float]:
        return {seed: score for seed, score in sorted(self.scores.items()) if score is not None}

    @property
    def failures(self) -> int:
        """Runs that failed, or whose score is not finite."""
        return sum(score is None for score in self.scores.values())


def cells(rows: Iterable[Row], measure: Measure | None = None) -> dict[tuple[str, str, str], Cell]:
    """(subject, target, label) -> cell, of the final runs. The baseline stands under the empty target.

    Args:
        measure: a figure to take instead of the score.

    Raises:
        DataError: two runs of one contender share target and seed, or scores that multiply are not positive.
    """
    kept = [row for row in rows if row.role == "final"]
    about: dict[str, tuple[str, bool]] = {}
    for row in kept:
        if row.done and row.metric:
            facts = (row.metric, row.higher_is_better)
            if about.setdefault(row.subject, facts) != facts:
                raise DataError(f"runs of '{row.subject}' are scored by {about[row.subject][0]} and by {row.metric}")
    found: dict[tuple[str, str, str], dict[int, float | None]] = {}
    for row in kept:
        scores = found.setdefault((row.subject, row.target, row.label), {})
        if row.seed in scores:
            where = f"'{row.label}' of '{row.subject}'" + (f" at {row.target}" if row.target else "")
            raise DataError(f"two runs of {where} have seed {row.seed}: give contenders labels of their own")
        scores[row.seed] = _value(row, measure)
    table = {}
    for (subject, target, label), scores in found.items():
        name, up = about.get(subject, ("", True))
        scale = scale_of(name)
        if measure is not None:
            name, up, scale = measure.name, measure.higher_is_better, measure.scale
        if scale == "ratio" and any(score is not None and score <= 0 for score in scores.values()):
            raise DataError(f"{name} of '{label}' is compared by ratio, and one is not positive")
        table[subject, target, label] = Cell(subject, target, label, name, up, scale, dict(sorted(scores.items())))
    return table


def _value(row: Row, measure: Measure | None) -> float | None:
    if not row.done:
        return None
    return row.score if measure is None else row.figure(*measure.path)


def tables(
    rows: Iterable[Row], measure: Measure | None = None, dense: bool = False
) -> dict[tuple[str, str], dict[str, Cell]]:
    """(subject, target) -> label -> cell, in the order of `target_key`.

    Args:
        dense: put the baseline into each table of its subject.
    """
    found = cells(rows, measure)
    keys = sorted({(s, t) for s, t, _ in found if t}, key=lambda key: (key[0], target_key(key[1])))
    grid = {key: {label: cell for (s, t, label), cell in found.items() if (s, t) == key} for key in keys}
    if dense:
        for (subject, _), table in grid.items():
            table.update({label: cell for (s, t, label), cell in found.items() if s == subject and not t})
    return grid


def target_key(target: str) -> tuple[float, str]:
    """Sorts targets by the number they ask for: ``0.5`` and ``2:4`` before ``0.9``.

    >>> sorted(["0.9", "flops 60%", "2:4", "0.3"], key=target_key)
    ['0.3', '2:4', 'flops 60%', '0.9']
    """
    text = target.split()[-1] if target.split() else ""
    kept, colon, of = text.partition(":")
    try:
        number = 1 - float(kept) / float(of) if colon else float(text.removesuffix("%")) / (100 if "%" in text else 1)
    except (ValueError, ZeroDivisionError):
        number = math.inf
    return number, target
