"""Answers to a contrast: one side of a question against the other, matched, beside what was published.

Two contenders are matched by subject, target and seed. A contender is paired with the one of the other side whose
recipe differs in the fewest axes, so that a pair differs in one thing where the study has such a pair.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

import numpy as np

from ..errors import DataError
from .cells import Cell, Measure, cells, target_key
from .plain import plain_dict
from .rows import Row, trains_itself
from .statistics import up
from .verdicts import BETTER, NONE, PLAIN, WORSE, Comparison, Rules, compare_cells

AGREES = "agrees"
DISAGREES = "does not agree"
NOT_SHOWN = "not shown"
MIXED = "agrees in part"

#: Fields of a recipe that say nothing about what a method does beside its target.
IDLE = frozenset({"method", "sparsity", "seed"})


@dataclass(frozen=True)
class Side:
    """One side of a contrast: labels, or a predicate on runs.

    >>> Side("data-free", ("magnitude",)).has(Row("d", "s", "task", "magnitude", {}, "0.5", 0))
    True
    """

    name: str
    labels: tuple[str, ...] = ()
    where: Callable[[Row], bool] | None = None

    def has(self, row: Row) -> bool:
        return row.label in self.labels or (self.where is not None and not row.dense and self.where(row))


@dataclass(frozen=True)
class Statement:
    """What was published about two sides.

    Attributes:
        left, right: names of sides.
        expected: ``better``: left is; ``worse``; or ``same``: no difference that matters.
        margin: for ``same``, the largest difference that does not matter, of the score (of its logarithm, where scores
            are compared by ratio); an interval within it agrees. Without one a difference is refuted or not, and never
            shown to be absent.
    """

    left: str
    right: str
    expected: str
    margin: float | None = None

    def __post_init__(self) -> None:
        if self.expected not in (BETTER, WORSE, "same"):
            raise DataError(f"a statement expects better, worse or same, not '{self.expected}'")
        if self.margin is not None and not self.margin > 0:
            raise DataError(f"a margin is a positive difference, not {self.margin:g}")

    def judge(self, comparison: Comparison) -> str:
        """``agrees``, ``does not agree`` or ``not shown``."""
        if comparison.verdict in (BETTER, WORSE) and self.expected in (BETTER, WORSE):
            return AGREES if comparison.verdict == self.expected else DISAGREES
        if self.expected != "same" or comparison.estimate.low is None or comparison.estimate.high is None:
            return NOT_SHOWN
        if self.margin is None:
            return DISAGREES if comparison.verdict in (BETTER, WORSE) else NOT_SHOWN
        ends = up(np.array([comparison.estimate.low, comparison.estimate.high]), comparison.estimate.scale)
        if comparison.verdict in (BETTER, WORSE, NONE) and float(np.abs(ends).max()) <= self.margin:
            return AGREES
        return DISAGREES if float(ends[0]) > self.margin or float(ends[1]) < -self.margin else NOT_SHOWN


@dataclass(frozen=True)
class Match:
    """Two contenders that are compared, and the axes of the recipe in which they differ."""

    left: str
    right: str
    axes: tuple[str, ...]


@dataclass(frozen=True)
class Part:
    """Two sides of a contrast.

    Attributes:
        pairs: contenders that are matched; ``alone`` those that no other is matched with.
        cells: every pair at every target of every subject, one family; their labels are those of the pair.
        targets: the sides at every target: at each seed the mean over pairs. A family of its own.
        overall: the sides on every subject: at each seed the mean over targets and pairs. A family of its own. Seeds
            are what varies: it speaks of these pairs and targets, not of others.
        statement: what was published, or None.
        judged, judged_targets: what each of ``overall`` and of ``targets`` says about it.
        agreement: ``agrees``, ``does not agree``, ``not shown``, ``agrees in part`` (subjects differ), or None.
        text: the answer in one sentence.
    """

    left: str
    right: str
    pairs: tuple[Match, ...]
    alone: tuple[str, ...]
    cells: tuple[Comparison, ...]
    targets: tuple[Comparison, ...]
    overall: tuple[Comparison, ...]
    statement: Statement | None
    judged: tuple[str, ...]
    judged_targets: tuple[str, ...]
    agreement: str | None
    text: str


@dataclass(frozen=True)
class Answer:
    """The answer to a contrast, for each two of its sides.

    Attributes:
        sides: name -> labels of its contenders.
        metric: what was compared.
        text: the answer first, in a sentence for each part.
    """

    question: str
    published: str
    sides: Mapping[str, tuple[str, ...]]
    metric: str
    rules: Rules
    parts: tuple[Part, ...]
    agreement: str | None
    text: str
    failures: Mapping[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return plain_dict(self)


def differing(left: Mapping[str, Any] | None, right: Mapping[str, Any] | None) -> tuple[str, ...]:
    """The axes in which two recipes differ; knobs by axis.

    >>> differing({"criterion": "wanda", "seed": 1}, {"criterion": "magnitude", "knobs": {"criterion": {"p": 2}}})
    ('criterion', 'knobs.criterion')
    >>> differing({"method": "fbs", "when": "runtime"}, {"criterion": "magnitude"})  # one of them has no recipe
    ('moment',)
    """
    if trains_itself(left) != trains_itself(right):
        return ("moment",)
    ours, theirs = _axes(left), _axes(right)
    return tuple(sorted(axis for axis in ours.keys() | theirs.keys() if ours.get(axis) != theirs.get(axis)))


def _axes(recipe: Mapping[str, Any] | None) -> dict[str, Any]:
    plain = {axis: value for axis, value in (recipe or {}).items() if axis not in IDLE and axis != "knobs"}
    knobs = (recipe or {}).get("knobs") or {}
    return {**plain, **{f"knobs.{axis}": dict(of) for axis, of in knobs.items() if of}}


def match(left: Sequence[str], right: Sequence[str], apart: Callable[[str, str], tuple[str, ...]]) -> list[Match]:
    """For each contender of the side with more the nearest of the other; all of them where several are as near.

    Args:
        apart: the axes in which two contenders differ.

    >>> recipes = {"a": {"criterion": "x"}, "b": {"criterion": "y"}, "c": {"criterion": "y", "solver": "obc"}}
    >>> apart = lambda x, y: differing(recipes[x], recipes[y])
    >>> [(one.left, one.right) for one in match(["a", "b"], ["c"], apart)], match(["a"], ["b", "c"], apart)[0].axes
    ([('a', 'c'), ('b', 'c')], ('criterion',))
    """
    many, few = (left, right) if len(left) >= len(right) else (right, left)
    found = []
    for label in many:
        axes = {other: apart(label, other) for other in few if other != label}
        nearest = min((len(of) for of in axes.values()), default=0)
        for other, of in axes.items():
            if len(of) == nearest:
                found.append(Match(label, other, of) if many is left else Match(other, label, of))
    return sorted(found, key=lambda one: (one.left, one.right))


def _apart(rows: Iterable[Row]) -> Callable[[str, str], tuple[str, ...]]:
    """How two contenders differ at the targets that both have: a target may change a recipe too, as 2:4 does."""
    recipes: dict[str, dict[tuple[str, str], Mapping[str, Any] | None]] = {}
    for row in rows:
        recipes.setdefault(row.label, {})[row.subject, row.target] = row.recipe

    def apart(left: str, right: str) -> tuple[str, ...]:
        ours, theirs = recipes[left], recipes[right]
        both = sorted(ours.keys() & theirs.keys())
        found = [differing(ours[key], theirs[key]) for key in both]
        return min(found, key=len) if found else differing(next(iter(ours.values())), next(iter(theirs.values())))

    return apart


def answer(
    rows: Iterable[Row],
    sides: Sequence[Side],
    *,
    question: str = "",
    published: str = "",
    statements: Sequence[Statement] = (),
    pairs: Sequence[tuple[str, str]] | None = None,
    same: Mapping[str, str] | None = None,
    rules: Rules = PLAIN,
    measure: Measure | None = None,
) -> Answer:
    """The answer that runs give to a contrast of two or more sides.

    Args:
        published: the statement in its author's words.
        statements: the same for the machine, of any two sides.
        pairs: (label, label) that are matched, where the recipes should not decide.
        same: target -> the target that it counts as: ``{"2:4": "0.5"}``.
        measure: a figure to compare instead of the score.

    Raises:
        DataError: a contender stands on two sides, a statement is of no side, or scores of several metrics meet.
    """
    same = same or {}
    kept = [replace(row, target=same.get(row.target, row.target)) for row in rows if row.role == "final"]
    labels = {side.name: tuple(sorted({row.label for row in kept if side.has(row)})) for side in sides}
    if len(sides) < 2 or len(labels) != len(sides):
        raise DataError("a contrast has two sides or more, with names of their own")
    for a, b in combinations(labels, 2):
        if twice := set(labels[a]) & set(labels[b]):
            raise DataError(f"'{min(twice)}' stands on both sides, {a} and {b}")
    for statement in statements:
        if not {statement.left, statement.right} <= labels.keys():
            raise DataError(
                f"a statement is of {statement.left} and {statement.right}, and sides are {', '.join(labels)}"
            )
    on_a_side = {label for of in labels.values() for label in of}
    apart = _apart(row for row in kept if row.label in on_a_side)
    table = cells([row for row in kept if row.label in on_a_side], measure)
    rules = replace(rules, variance="own")
    parts = []
    for a, b in combinations(labels, 2):
        stated = next((s for s in statements if {s.left, s.right} == {a, b}), None)
        a, b = (stated.left, stated.right) if stated else (a, b)
        given = None
        if pairs is not None:
            both = [*pairs, *((y, x) for x, y in pairs)]
            given = [(x, y) for x, y in both if x in labels[a] and y in labels[b]]
        parts.append(_part(table, apart, (a, b), (labels[a], labels[b]), stated, given, rules))
    whole = _together([part.agreement for part in parts if part.agreement])
    metrics = ", ".join(sorted({cell.metric for cell in table.values() if cell.metric}))
    failures = {label: n for label in sorted(on_a_side) if (n := _failures(table, label))}
    text = ". ".join(part.text[:1].upper() + part.text[1:] for part in parts) + "."
    return Answer(question, published, labels, metrics, rules, tuple(parts), whole, text, failures)


def _failures(table: Mapping[tuple[str, str, str], Cell], label: str) -> int:
    return sum(cell.failures for (_, _, of), cell in table.items() if of == label)


def _part(
    table: Mapping[tuple[str, str, str], Cell],
    apart: Callable[[str, str], tuple[str, ...]],
    names: tuple[str, str],
    labels: tuple[tuple[str, ...], tuple[str, ...]],
    stated: Statement | None,
    given: Sequence[tuple[str, str]] | None,
    rules: Rules,
) -> Part:
    pairs = match(*labels, apart) if given is None else [Match(x, y, apart(x, y)) for x, y in given]
    used = {label for pair in pairs for label in (pair.left, pair.right)}
    alone = tuple(label for of in labels for label in of if label not in used)
    keys = sorted({(s, t) for s, t, _ in table}, key=lambda key: (key[0], target_key(key[1])))
    matched = [
        (table[(*key, pair.left)], table[(*key, pair.right)])
        for key in keys
        for pair in pairs
        if (*key, pair.left) in table and (*key, pair.right) in table
    ]
    at: dict[tuple[str, str], list[tuple[Cell, Cell]]] = {}
    on: dict[str, list[tuple[Cell, Cell]]] = {}
    for left, right in matched:
        at.setdefault((left.subject, left.target), []).append((left, right))
        on.setdefault(left.subject, []).append((left, right))
    targets = compare_cells([_pool(of, names, target) for (_, target), of in at.items()], rules)
    overall = compare_cells([_pool(of, names, "") for of in on.values()], rules)
    judged, by_target = (tuple(stated.judge(one) for one in of) if stated else () for of in (overall, targets))
    agreement = (_together(judged) or NOT_SHOWN) if stated else None
    each = compare_cells(matched, rules)
    text = _text(names, overall, agreement)
    return Part(
        *names,
        tuple(pairs),
        alone,
        tuple(each),
        tuple(targets),
        tuple(overall),
        stated,
        judged,
        by_target,
        agreement,
        text,
    )


def _pool(of: Sequence[tuple[Cell, Cell]], names: tuple[str, str], target: str) -> tuple[Cell, Cell]:
    """Two cells whose score at each seed is the mean over pairs; a seed that some pair lacks is left out.

    A seed at which a run of one side failed is a failure of that side.
    """
    seeds = set.intersection(*(left.scores.keys() & right.scores.keys() for left, right in of))
    made = []
    for side, name in enumerate(names):
        scores: dict[int, float | None] = {}
        for seed in sorted(seeds):
            values = [pair[side].scores[seed] for pair in of]
            known = [value for value in values if value is not None]
            scores[seed] = _middle(known, of[0][0]) if len(known) == len(values) else None
        made.append(replace(of[0][side], label=name, target=target, scores=scores))
    return made[0], made[1]


def _middle(values: Sequence[float], cell: Cell) -> float:
    middle = float(np.mean(up(np.array(values), cell.scale)))
    return float(np.exp(middle)) if cell.scale == "ratio" else middle


def _together(judged: Sequence[str]) -> str | None:
    """One word for several: a side that is shown wins over one that is not, and two that are shown meet as mixed."""
    kinds = set(judged)
    if MIXED in kinds or {AGREES, DISAGREES} <= kinds:
        return MIXED
    return next((word for word in (AGREES, DISAGREES, NOT_SHOWN) if word in kinds), None)


def _text(names: tuple[str, str], overall: Sequence[Comparison], agreement: str | None) -> str:
    if not overall:
        return f"no runs of {names[0]} and {names[1]} that match"
    said = "; ".join(
        f"{one.subject}: {names[0]} against {names[1]}: {one.text}"
        + (
            f", {one.metric} {'by' if one.estimate.scale == 'difference' else 'times'} {one.estimate.text(3)}"
            if one.estimate.low is not None
            else ""
        )
        for one in overall
    )
    return f"{said} (the published statement: {agreement})" if agreement else said
