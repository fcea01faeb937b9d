"""Cells of studies: one subject at one target, with what every contender lost there. Seeds are taken together."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..compare import Row
from ..errors import RecipeError
from ..granularity import parse
from ..structured.targets import Target
from .candidate import Aim, Candidate, contender, structure_of
from .evidence import Run
from .subject import Subject

#: Losses that differ by less are the same: what rounding makes.
_DUST = 1e-9


@dataclass(frozen=True)
class Outcome:
    """What one contender lost in one cell.

    Attributes:
        label: the contender.
        candidate: its recipe, as a candidate.
        drop: mean over seeds; of one that failed with every seed, the most that anyone lost there.
        score: mean over seeds; None where it failed with every seed.
        runs, failed: how many there were, and how many of them failed.
        speeds: times as fast, of the runs whose latency was measured.
        seconds: that pruning took, of the runs that say so.
        machine: instruction set of the runs.
    """

    label: str
    candidate: Candidate
    drop: float
    score: float | None
    runs: int
    failed: int
    speeds: tuple[float, ...] = ()
    seconds: tuple[float, ...] = ()
    machine: str = ""


@dataclass(frozen=True)
class Cell:
    """One subject at one target.

    Attributes:
        study: its name.
        subject: what was pruned.
        task: whether it was trained there, or had been trained before.
        target: as the study writes it.
        aim: what that asks for.
        metric: what the score is.
        higher_is_better: which way.
        absolute: whether there is a dense baseline, so that drops are drops; else they are against the best there.
        outcomes: one for each contender.
        own: whether the user named the study.
    """

    study: str
    subject: Subject
    task: bool
    target: str
    aim: Aim
    metric: str
    higher_is_better: bool
    absolute: bool
    outcomes: tuple[Outcome, ...]
    own: bool

    @property
    def best(self) -> float:
        """The least that anyone lost."""
        return min(o.drop for o in self.outcomes)

    @property
    def spread(self) -> float:
        """What lies between the best and the middle; where that is nothing, between the best and the mean."""
        drops = [o.drop for o in self.outcomes]
        middle = statistics.median(drops) - self.best
        return middle if middle > _DUST else statistics.fmean(drops) - self.best

    def place(self, outcome: Outcome) -> float:
        """Where a contender came: 0 is the best, 1 the middle, 2 the last; equal ones share a place."""
        if len(self.outcomes) < 2:
            return 1.0
        ahead = sum(o.drop < outcome.drop - _DUST for o in self.outcomes)
        beside = sum(abs(o.drop - outcome.drop) <= _DUST for o in self.outcomes) - 1
        return 2 * (ahead + beside / 2) / (len(self.outcomes) - 1)

    def drop_at(self, place: float) -> float:
        """What was lost at a place, in a straight line between contenders."""
        drops = sorted(o.drop for o in self.outcomes)
        at = min(max(place / 2, 0.0), 1.0) * (len(drops) - 1)
        low = min(int(at), max(len(drops) - 2, 0))
        high = min(low + 1, len(drops) - 1)
        return drops[low] + (at - low) * (drops[high] - drops[low])

    def regret(self, outcome: Outcome) -> float:
        """What a contender lost beyond the best, in spreads: 0 is the best, 1 the middle; at most 3."""
        return min((outcome.drop - self.best) / self.spread, 3.0) if self.spread > _DUST else 0.0


def lost(score: float, dense: float, metric: str, higher_is_better: bool) -> float | None:
    """What was lost of the dense model's score: a share of it; of perplexity the logarithm of the ratio.

    >>> lost(0.25, 0.5, "accuracy", True), lost(10.0, 10.0, "perplexity", False)
    (0.5, 0.0)
    """
    if not dense > 0:
        return None
    if metric.startswith("perplexity"):
        return math.log(score / dense) if score > 0 else None
    return (dense - score) / dense if higher_is_better else (score - dense) / dense


def aim_of(target: str, granularity: str, sparsity: float | None) -> Aim | None:
    """What a study's target asks of a recipe; None where it cannot be told.

    >>> aim_of("0.9", "row", None), aim_of("flops 40%", "coupled", None).keep
    (Aim(structure='weights', quantity='weights', keep=0.1), 0.6)
    """
    structure = structure_of(granularity)
    try:
        keep = parse(target).keep if ":" in target else None
    except RecipeError:
        return None
    if keep is not None:
        return Aim("pattern", "weights", keep)
    try:
        gone = float(target)
    except ValueError:
        gone = -1.0
    if 0 < gone < 1:
        return Aim(structure, "weights", round(1 - gone, 6))
    try:
        asked = Target.parse(target)
    except RecipeError:
        return None
    if asked.fraction is not None:
        return Aim(structure, {"bytes": "params"}.get(asked.quantity, asked.quantity), round(asked.fraction, 6))
    return Aim(structure, "weights", 1 - sparsity) if sparsity is not None and 0 < sparsity < 1 else None


def cells(runs: Iterable[Run]) -> list[Cell]:
    """The cells of runs, in an order that does not depend on theirs. Those where no run was finished are left out."""
    groups: dict[tuple[str, str, str, str], list[Run]] = {}
    dense: dict[tuple[str, str], list[Row]] = {}
    for run in runs:
        if run.row.role != "final":
            continue
        if run.row.dense:
            dense.setdefault((run.study, run.subject.name), []).append(run.row)
        else:
            groups.setdefault((run.study, run.subject.name, run.row.target, run.row.metric), []).append(run)
    metrics = {key[:3] for key in groups if key[3]}
    found = []
    for key in sorted(groups):
        group = groups[key]
        if not key[3] and key[:3] in metrics:
            continue
        # Runs that failed say no metric; they belong to those of the same target that do.
        group = group + (groups.get((*key[:3], ""), []) if key[3] else [])
        made = _cell(group, dense.get(key[:2], []))
        if made is not None:
            found.append(made)
    return found


def _cell(group: list[Run], dense: list[Row]) -> Cell | None:
    first = group[0]
    metric = next((r.row.metric for r in group if r.row.metric), "")
    higher = next((r.row.higher_is_better for r in group if r.row.metric), True)
    by_seed = {row.seed: row.score for row in dense if row.done and row.score is not None}
    scores = [r.row.score for r in group if r.row.done and r.row.score is not None]
    if not scores:
        return None
    base = statistics.fmean(by_seed.values()) if by_seed else (max(scores) if higher else min(scores))
    drops: dict[str, list[float]] = {}
    members: dict[str, list[Row]] = {}
    for run in group:
        members.setdefault(run.row.label, []).append(run.row)
        score = run.row.score if run.row.done else None
        value = None if score is None else lost(score, by_seed.get(run.row.seed, base), metric, higher)
        if value is not None:
            drops.setdefault(run.row.label, []).append(value)
    if not drops:
        return None
    worst = max(max(d) for d in drops.values())
    outcomes, aims = [], []
    for label in sorted(members):
        rows = members[label]
        candidate = contender(label, rows[0].recipe or {})
        if candidate is None:
            continue
        done = drops.get(label, [])
        failed = len(rows) - len(done)
        # A run that failed lost as much as the worst that finished.
        mean = statistics.fmean([*done, *[worst] * failed])
        kept = [r.score for r in rows if r.done and r.score is not None]
        outcomes.append(
            Outcome(
                label, candidate, mean, statistics.fmean(kept) if kept else None, len(rows), failed,
                tuple(x for r in rows if (x := r.figure("latency", "ratio")) is not None),
                tuple(x for r in rows if (x := r.figure("cost", "seconds")) is not None), _machine(rows),
            )
        )  # fmt: skip
        sparsity = next((x for r in rows if (x := r.figure("sparsity")) is not None), None)
        aims.append(aim_of(first.row.target, candidate.recipe.granularity, sparsity))
    known = [a for a in aims if a is not None]
    if not outcomes or not known:
        return None
    aim = max(known, key=known.count)
    return Cell(
        first.study, first.subject, first.row.kind == "task", first.row.target, aim, metric, higher, bool(by_seed),
        tuple(outcomes), first.own,
    )  # fmt: skip


def _machine(rows: list[Row]) -> str:
    for row in rows:
        environment = row.result.get("environment")
        machine = environment.get("machine") if isinstance(environment, Mapping) else None
        if isinstance(machine, Mapping) and "instructions" in machine:
            return str(machine["instructions"])
    return ""
