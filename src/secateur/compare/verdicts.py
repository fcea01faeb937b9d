"""Verdicts in words: never a winner without an interval.

A family is one table: the comparisons of one subject at one target. Within a family the chance of any false "better"
or "worse" is at most ``1 - level``; over several tables it is not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, Literal, get_args

import numpy as np

from ..errors import DataError, UnknownName
from .cells import DENSE, Cell, Measure, tables
from .plain import plain_dict
from .rows import Row
from .statistics import (
    LEVEL,
    Correction,
    Estimate,
    How,
    adjust,
    block_error,
    dunnett,
    dunnett_p,
    levels,
    on_scale,
    paired,
    tukey,
    tukey_p,
    up,
)

Variance = Literal["own", "pooled"]

BETTER = "better"
WORSE = "worse"
NONE = "no difference shown"
FEW = "not enough seeds"
FAILED = "runs failed"


@dataclass(frozen=True)
class Rules:
    """How comparisons are decided.

    Attributes:
        level: 1 - level is the chance of any false verdict in a family.
        correction: for the number of comparisons.
        variance: ``own``: each pair by the spread of its own differences, whatever the others do. ``pooled``: by one
            spread of all contenders of the table (Tukey, Dunnett), which shows far more at three seeds and is wrong
            where one contender is noisier than the rest.
        how: ``t``, or ``bca``, a bootstrap; it has no p values, so it is corrected after Bonferroni.
    """

    level: float = LEVEL
    correction: Correction = "holm"
    variance: Variance = "own"
    how: How = "t"

    def __post_init__(self) -> None:
        if not 0 < self.level < 1:
            raise DataError(f"a level is a probability between 0 and 1, not {self.level:g}")
        for name, kinds in (("correction", Correction), ("variance", Variance), ("how", How)):
            if (given := getattr(self, name)) not in (known := get_args(kinds)):
                raise UnknownName(name, given, known, ", ".join(known))

    def to_dict(self) -> dict[str, Any]:
        return plain_dict(self)


PLAIN = Rules()


@dataclass(frozen=True)
class Comparison:
    """Left against right, at one target of one subject.

    Attributes:
        estimate: left minus right, or left / right on the ``ratio`` scale, over the seeds that both have. Its interval
            excludes no difference exactly if the verdict is better or worse; ``level`` is that of the interval alone.
        p: corrected for the family.
        verdict: ``better`` (left is), ``worse``, ``no difference shown``, ``not enough seeds`` or ``runs failed``.
        text: the verdict as a reader sees it.
        family: comparisons that the correction is for.
        left_failures, right_failures: runs without a finite score.
    """

    subject: str
    target: str
    left: str
    right: str
    metric: str
    higher_is_better: bool
    estimate: Estimate
    p: float | None
    verdict: str
    text: str
    family: int
    left_failures: int = 0
    right_failures: int = 0

    def to_dict(self) -> dict[str, Any]:
        return plain_dict(self)


def against(
    rows: Iterable[Row], reference: str = DENSE, *, rules: Rules = PLAIN, measure: Measure | None = None
) -> list[Comparison]:
    """Every contender against one, at every target; the baseline stands at all of them.

    Raises:
        DataError: no contender has that label.
    """
    grid = tables(rows, measure, dense=True)
    if grid and not any(reference in table for table in grid.values()):
        known = ", ".join(sorted({label for table in grid.values() for label in table}))
        raise DataError(f"no contender is labelled '{reference}': there are {known}")
    found: list[Comparison] = []
    for table in grid.values():
        if reference in table:
            others = [label for label in sorted(table) if label not in (reference, DENSE)]
            found += _family([(table[label], table[reference]) for label in others], rules, star=True)
    return found


def all_pairs(rows: Iterable[Row], *, rules: Rules = PLAIN, measure: Measure | None = None) -> list[Comparison]:
    """Every pair of contenders at every target, the baseline left out; each pair once, in alphabetical order."""
    found: list[Comparison] = []
    for table in tables(rows, measure).values():
        found += _family([(table[a], table[b]) for a, b in combinations(sorted(table), 2)], rules, star=False)
    return found


def compare_cells(pairs: Sequence[tuple[Cell, Cell]], rules: Rules = PLAIN) -> list[Comparison]:
    """Left against right of every pair, each by its own spread, corrected for their number."""
    estimates = [paired(a.scores, b.scores, scale=a.scale, level=rules.level) for a, b in pairs]
    tested = [index for index, estimate in enumerate(estimates) if estimate.p is not None]
    raw = [p for estimate in estimates if (p := estimate.p) is not None]
    correction = "bonferroni" if rules.how == "bca" and rules.correction == "holm" else rules.correction
    adjusted = dict(zip(tested, adjust(raw, correction), strict=True))
    at = dict(zip(tested, levels(raw, rules.level, correction), strict=True))
    found = []
    for index, (left, right) in enumerate(pairs):
        estimate = estimates[index]
        if index in at:
            estimate = paired(left.scores, right.scores, scale=left.scale, level=at[index], how=rules.how)
        p = adjusted.get(index) if rules.how == "t" else None
        found.append(_comparison(left, right, estimate, p, len(tested)))
    return found


def _family(pairs: Sequence[tuple[Cell, Cell]], rules: Rules, star: bool) -> list[Comparison]:
    return compare_cells(pairs, rules) if rules.variance == "own" else _pooled(pairs, rules, star)


def _pooled(pairs: Sequence[tuple[Cell, Cell]], rules: Rules, star: bool) -> list[Comparison]:
    """By one spread of all contenders that have every seed: Dunnett's bound against one, Tukey's for all pairs."""
    if rules.how == "bca" or rules.correction != "holm":
        raise DataError("a pooled spread comes with its own correction: leave how and correction as they are")
    every = {cell.label: cell for pair in pairs for cell in pair}
    seeds = sorted({seed for cell in every.values() for seed in cell.scores})
    whole = [label for label in sorted(every) if list(every[label].finite) == seeds]
    k, n = len(whole), len(seeds)
    error = freedom = bound = 0.0
    scored = [(a, b) for a, b in pairs if a.label in whole and b.label in whole]
    if k >= 2 and n >= 2 and scored:
        scale = scored[0][0].scale
        matrix = up(np.array([[every[label].finite[seed] for seed in seeds] for label in whole]), scale)
        variance, freedom = block_error(matrix)
        error = math.sqrt(2 * float(variance) / n)
        bound = dunnett(rules.level, k - 1, freedom) if star else tukey(rules.level, k, freedom)
    found = []
    for left, right in pairs:
        own = paired(left.scores, right.scores, scale=left.scale, level=rules.level)
        if (left, right) not in scored or not freedom:
            lost = replace(own, low=None, high=None, p=None, spread=None)
            found.append(_comparison(left, right, lost, None, len(scored), "it lacks seeds that others have"))
            continue
        plain = float(np.mean(up(np.array(list(left.finite.values())), left.scale))) - float(
            np.mean(up(np.array(list(right.finite.values())), right.scale))
        )
        errors = abs(plain) / error if error else (math.inf if plain else 0.0)
        p = 0.0
        if errors <= 400:
            p = dunnett_p(errors, k - 1, freedom) if star else tukey_p(errors, k, freedom)
        estimate = Estimate(plain, plain - bound * error, plain + bound * error, rules.level, n, spread=own.spread)
        found.append(_comparison(left, right, on_scale(estimate, left.scale), p, len(scored)))
    return found


def _comparison(left: Cell, right: Cell, estimate: Estimate, p: float | None, family: int, why: str = "") -> Comparison:
    verdict, text = decide(estimate, left.higher_is_better, left, right)
    if why and verdict == FEW:
        text = f"{FEW}: {why}"
    return Comparison(
        left.subject,
        left.target or right.target,
        left.label,
        right.label,
        left.metric or right.metric,
        left.higher_is_better,
        estimate,
        p,
        verdict,
        text,
        family,
        left.failures,
        right.failures,
    )


def decide(estimate: Estimate, higher_is_better: bool, left: Cell, right: Cell) -> tuple[str, str]:
    """The verdict on left, and its text.

    What failed in some runs is never called better, and nothing is called worse than it: seeds at which it failed are
    not in the interval.
    """
    if estimate.low is None:
        if left.failures or right.failures:
            return FAILED, f"{FAILED}: {_failures(left, right)}"
        return FEW, f"{FEW} (n = {estimate.n})"
    shown = estimate.shown if higher_is_better else -estimate.shown
    winner = left if shown > 0 else right
    if shown and winner.failures:
        return FAILED, f"{FAILED}: {_failures(winner)}"
    failed = f"; {_failures(left, right)}" if left.failures or right.failures else ""
    if not shown:
        return NONE, f"{NONE} at n = {estimate.n}{failed}"
    same = ", the same difference at every seed" if estimate.spread == 0 else ""
    return (BETTER if shown > 0 else WORSE), (BETTER if shown > 0 else WORSE) + same + failed


def _failures(*sides: Cell) -> str:
    return ", ".join(f"{c.failures} of {len(c.scores)} runs of {c.label} failed" for c in sides if c.failures)
