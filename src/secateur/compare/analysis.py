"""What a study shows: curves against every cost, Pareto fronts, spread over seeds; and all analyses in one object."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from .capability import Capability, capabilities
from .cells import DENSE, Cell, cells, tables, target_key
from .layerwise import Collapse, Overlap, Profile, collapses, overlaps, profiles
from .leaders import Leaders, leaders
from .ranks import Ranks, rank
from .rows import Row
from .statistics import Estimate, Floats, block_error, mean, paired, up
from .verdicts import PLAIN, Comparison, Rules, against, all_pairs


@dataclass(frozen=True)
class Axis:
    """A figure of a run that its score is drawn against: where it stands, which way is good, what it says."""

    path: tuple[str, ...]
    higher_is_better: bool
    text: str


#: Name -> what the score is drawn against. Costs of pruning are those of one run, dense training left out.
AXES: Mapping[str, Axis] = {
    "sparsity": Axis(("sparsity",), True, "fraction of the pruned layers' weights that is gone"),
    "nonzero": Axis(("nonzero",), False, "parameters that are not zero"),
    "parameters": Axis(("parameters",), False, "parameters"),
    "flops": Axis(("flops",), False, "operations"),
    "effective_flops": Axis(("effective_flops",), False, "operations without zero weights"),
    "latency": Axis(("latency", "seconds"), False, "seconds a forward pass"),
    "speedup": Axis(("latency", "ratio"), True, "times as fast as the dense model beside it"),
    "bytes": Axis(("bytes",), False, "bytes, stored dense"),
    "sparse_bytes": Axis(("sparse_bytes",), False, "bytes, stored as a bit mask and values"),
    "seconds": Axis(("cost", "seconds"), False, "seconds that pruning took"),
    "epochs": Axis(("cost", "epochs"), False, "epochs in all"),
    "after_dense": Axis(("cost", "after_dense"), False, "epochs after dense training"),
    "samples": Axis(("cost", "samples"), False, "samples seen"),
    "labels": Axis(("cost", "labels"), False, "labels seen"),
    "peak_memory": Axis(("cost", "peak_memory"), False, "bytes of memory at the peak"),
}

#: Axes of which a front is drawn.
FRONTS = ("sparsity", "effective_flops", "latency", "speedup", "sparse_bytes", "seconds", "epochs")


@dataclass(frozen=True)
class Point:
    """A contender at one target: the score with its interval, and its mean on every axis that was measured.

    Attributes:
        low, high: smallest and largest value on each axis, over seeds.
    """

    target: str
    score: Estimate
    at: Mapping[str, float]
    low: Mapping[str, float]
    high: Mapping[str, float]


@dataclass(frozen=True)
class Curve:
    """A contender over its targets, the lowest first; of the baseline one point under an empty target."""

    subject: str
    label: str
    metric: str
    higher_is_better: bool
    points: tuple[Point, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def curves(rows: Iterable[Row], rules: Rules = PLAIN) -> list[Curve]:
    """The score of every contender against every axis. Intervals are for each point alone, not corrected."""
    rows = list(rows)
    runs: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if row.role == "final" and row.done:
            runs.setdefault((row.subject, row.target, row.label), []).append(row)
    points: dict[tuple[str, str], list[tuple[Cell, Point]]] = {}
    for key, cell in sorted(cells(rows).items(), key=lambda item: (item[0][0], item[0][2], target_key(item[0][1]))):
        score = mean(cell.scores.values(), scale=cell.scale, level=rules.level)
        found = {name: [run.figure(*axis.path) for run in runs.get(key, [])] for name, axis in AXES.items()}
        known = {name: kept for name, x in found.items() if (kept := [y for y in x if y is not None])}
        at = {name: float(np.mean(x)) for name, x in known.items()}
        low, high = ({name: float(of(x)) for name, x in known.items()} for of in (np.min, np.max))
        points.setdefault((cell.subject, cell.label), []).append((cell, Point(cell.target, score, at, low, high)))
    return [
        Curve(subject, label, of[0][0].metric, of[0][0].higher_is_better, tuple(point for _, point in of))
        for (subject, label), of in points.items()
    ]


def nondominated(points_nd: Floats) -> NDArray[np.bool_]:
    """Which points no other point beats: is at least as good in every column, and better in one. More is better.

    >>> nondominated(np.array([[1.0, 3.0], [2.0, 2.0], [1.0, 2.0]])).tolist()
    [True, True, False]
    """
    return np.logical_not(_dominated(points_nd).any(1))


def _dominated(points_nd: Floats) -> NDArray[np.bool_]:
    """[i, j]: whether point j beats point i."""
    mine, theirs = points_nd[:, None], points_nd[None]
    return np.logical_and((theirs >= mine).all(-1), (theirs > mine).any(-1))


@dataclass(frozen=True)
class FrontPoint:
    """A contender at one target, against one axis.

    Attributes:
        front: whether the mean of no other point is better on one and at least as good on the other.
        beaten_by: (label, target) of the point that beats it by most; None on the front.
        shown: whether the score of a point that beats it is also shown to be better, corrected for all that do. A
            point off the front that is not shown to be may owe it to its seeds.
    """

    label: str
    target: str
    x: float
    score: Estimate
    front: bool
    beaten_by: tuple[str, str] | None
    shown: bool


@dataclass(frozen=True)
class Front:
    """The points of one subject against one axis, by x."""

    subject: str
    axis: str
    metric: str
    higher_is_better: bool
    points: tuple[FrontPoint, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def pareto(rows: Iterable[Row], axis: str = "effective_flops", rules: Rules = PLAIN) -> list[Front]:
    """The trade of score against one axis, of every subject; contenders with a failed run are not on it.

    Raises:
        DataError: there is no such axis.
    """
    if axis not in AXES:
        raise DataError(f"no axis '{axis}': there are {', '.join(AXES)}")
    rows = list(rows)
    found = cells(rows)
    by_subject: dict[str, list[tuple[Cell, Point]]] = {}
    for curve in curves(rows, rules):
        for point in curve.points:
            cell = found[curve.subject, point.target, curve.label]
            if axis in point.at and point.score.value is not None and not cell.failures:
                by_subject.setdefault(curve.subject, []).append((cell, point))
    return [_front(subject, axis, points, rules) for subject, points in by_subject.items()]


def _front(subject: str, axis: str, points: list[tuple[Cell, Point]], rules: Rules) -> Front:
    points = sorted(points, key=lambda pair: (pair[1].at[axis], pair[0].label))
    up_x = 1 if AXES[axis].higher_is_better else -1
    up_y = 1 if points[0][0].higher_is_better else -1
    plane = np.array([[up_x * point.at[axis], up_y * (point.score.value or 0.0)] for _, point in points])
    beats = _dominated(plane)
    made = []
    for i, (cell, point) in enumerate(points):
        over = np.flatnonzero(beats[i])
        by = points[int(over[plane[over, 1].argmax()])][0] if len(over) else None
        shown = any(
            paired(points[j][0].scores, cell.scores, scale=cell.scale, level=1 - (1 - rules.level) / len(over)).shown
            == up_y
            for j in over
        )
        beaten = (by.label, by.target) if by else None
        made.append(FrontPoint(cell.label, cell.target, point.at[axis], point.score, by is None, beaten, shown))
    return Front(subject, axis, points[0][0].metric, points[0][0].higher_is_better, tuple(made))


@dataclass(frozen=True)
class Sensitivity:
    """How much the seed matters beside the method, at one target of one subject.

    A seed decides initial weights and the order of data; of a language model, which calibration text is seen. On the
    ``ratio`` scale all spreads are of logarithms.

    Attributes:
        within: contender -> standard deviation of its scores over seeds.
        seed: the same of all contenders together (root of the mean variance).
        paired: what is left of it once the part that all contenders share is taken off; None with holes in the table.
        between: standard deviation of the contenders' true means: what their means show, less what seeds alone do.
        share: of the variance of a single score, how much the contender decides: 0 none, 1 all.
        flips: of all pairs of contenders and seeds, the fraction in which one seed orders them against the mean.
    """

    subject: str
    target: str
    scale: str
    within: Mapping[str, float]
    seed: float
    paired: float | None
    between: float
    share: float
    flips: float
    n: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def sensitivity(rows: Iterable[Row]) -> list[Sensitivity]:
    """The spread of methods over seeds against the spread between methods, where two contenders have two seeds."""
    found = []
    for (subject, target), table in tables(rows).items():
        kept = {label: cell for label, cell in sorted(table.items()) if len(cell.finite) >= 2}
        if len(kept) < 2:
            continue
        scale = next(iter(kept.values())).scale
        values = {label: up(np.array(list(cell.finite.values())), scale) for label, cell in kept.items()}
        variance = {label: float(x.var(ddof=1)) for label, x in values.items()}
        within = float(np.mean(list(variance.values())))
        noise = float(np.mean([variance[label] / len(x) for label, x in values.items()]))
        between = max(0.0, float(np.var([x.mean() for x in values.values()], ddof=1)) - noise)
        seeds = [tuple(cell.finite) for cell in kept.values()]
        whole = len(set(seeds)) == 1
        rest = float(block_error(np.array(list(values.values())))[0]) if whole else None
        total = within + between
        found.append(
            Sensitivity(
                subject,
                target,
                scale,
                {label: x**0.5 for label, x in variance.items()},
                within**0.5,
                None if rest is None else rest**0.5,
                between**0.5,
                between / total if total else 0.0,
                _flips(kept),
                max(len(x) for x in seeds),
            )
        )
    return found


def _flips(table: Mapping[str, Cell]) -> float:
    against_mean = count = 0
    for a, b in combinations([cell.finite for cell in table.values()], 2):
        gaps = np.array([a[seed] - b[seed] for seed in a if seed in b])
        against_mean += int((gaps * (gaps.mean() if len(gaps) else 0.0) < 0).sum())
        count += len(gaps)
    return against_mean / count if count else 0.0


@dataclass(frozen=True)
class Analysis:
    """All that a study shows, as plain data for a page; see the parts."""

    rules: Rules
    subjects: tuple[str, ...]
    labels: tuple[str, ...]
    curves: list[Curve]
    fronts: list[Front]
    against_dense: list[Comparison]
    pairs: list[Comparison]
    leaders: list[Leaders]
    ranks: Ranks
    profiles: list[Profile]
    overlaps: list[Overlap]
    collapses: list[Collapse]
    capabilities: list[Capability]
    sensitivity: list[Sensitivity]
    failures: list[dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """Plain data; a number that is not finite, as the end of an interval that has none, is None."""
        whole = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {name: _plain(value) for name, value in whole.items()}


def _plain(value: Any) -> Any:
    if hasattr(value, "to_dict"):
        value = value.to_dict()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value


def analyze(rows: Iterable[Row], rules: Rules = PLAIN) -> Analysis:
    """Everything at once."""
    rows = list(rows)
    final = [row for row in rows if row.role == "final"]
    has_dense = any(row.dense for row in final)
    return Analysis(
        rules=rules,
        subjects=tuple(sorted({row.subject for row in final})),
        labels=tuple(sorted({row.label for row in final if not row.dense})),
        curves=curves(rows, rules),
        fronts=[front for axis in FRONTS for front in pareto(rows, axis, rules)],
        against_dense=against(rows, DENSE, rules=rules) if has_dense else [],
        pairs=all_pairs(rows, rules=rules),
        leaders=leaders(rows, level=rules.level),
        ranks=rank(rows, level=rules.level),
        profiles=profiles(rows),
        overlaps=overlaps(rows, rules.level),
        collapses=collapses(rows),
        capabilities=capabilities(rows, rules),
        sensitivity=sensitivity(rows),
        failures=[
            {**_where(row), "reason": row.reason if not row.done else "its score is not finite"}
            for row in final
            if row.score is None
        ],
    )


def _where(row: Row) -> dict[str, Any]:
    return {"subject": row.subject, "label": row.label, "target": row.target, "seed": row.seed}
