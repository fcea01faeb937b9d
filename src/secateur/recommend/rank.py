"""How methods are ranked by evidence: where they came in each study, shrunk towards all tasks and towards their kin.

In a cell of a study (one subject at one target) a contender has a place: 0 is the best, 1 the middle, 2 the last.
Places do not depend on how far results lie apart there, which differs from task to task without saying anything of
another. A method's effect has three levels. What it did near the situation (a mean over tasks, weighted by how near
task and target are) is shrunk towards what it did on all tasks that say something, each task counting alike, as if that
were `POOLED` more tasks. That in turn is shrunk towards its prior, as if it were `Evidence.ratio` tasks: what recipes
that share axes with it did, and the points of the rules where there are none.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from .candidate import Candidate
from .cells import Cell, Outcome, cells
from .distance import closeness, likeness, relevance, same
from .evidence import Run
from .situation import Situation

#: What a point of a rule is worth, in places.
POINT = 0.2
#: As many tasks is the belief worth that a method is like the middle one.
BELIEF = 0.5
#: As many tasks is what a method did on all tasks worth beside what it did near: one.
POOLED = 1.0
#: Below this likeness a recipe is no kin, and the power with which likeness counts.
KIN, POWER = 0.5, 6.0
#: Cells that say less than this of a situation are not looked at.
NEAR = 0.02


@dataclass(frozen=True)
class Effect:
    """Which place is to be expected of a method: 0 is the best of a study, 1 the middle, 2 the last.

    Attributes:
        value: shrunk.
        direct: of its own runs alone, the nearer ones counting more; None where there are none.
        tasks: how much its own runs weigh, in tasks.
        prior: what is expected without them.
        runs, studies: how many, and which.
        kin: how many runs of recipes that share axes the prior rests on.
        noted: the names of the tasks with runs of its own.
    """

    value: float
    direct: float | None
    tasks: float
    prior: float
    runs: int
    studies: tuple[str, ...]
    kin: int
    noted: tuple[str, ...] = ()

    def __str__(self) -> str:
        from_kin = f"{self.kin} runs of recipes that share axes" if self.kin else "rules alone"
        if self.direct is None:
            return f"place {self.value:.2f} expected (0 the best, 2 the last), from {from_kin}; no runs of its own"
        return (
            f"place {self.value:.2f} (0 the best, 2 the last): {self.direct:.2f} in {counted(self.runs, 'run')} of "
            f"{counted(len(self.studies), 'study')} ({', '.join(self.noted)}), shrunk towards all its tasks and "
            f"{self.prior:.2f} ({from_kin})"
        )


def counted(number: int, noun: str) -> str:
    """A number and its noun.

    >>> counted(1, "study"), counted(3, "study"), counted(2, "run")
    ('1 study', '3 studies', '2 runs')
    """
    if number != 1:
        noun = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"
    return f"{number} {noun}"


@dataclass(frozen=True)
class Evidence:
    """Cells of studies, prepared.

    Attributes:
        cells: of the runs.
        ratio: variance of one method between tasks over the variance between methods: how many tasks the prior is
        worth.
    """

    cells: Sequence[Cell]
    ratio: float = 1.0

    @staticmethod
    def of(runs: Iterable[Run]) -> Evidence:
        """Prepare runs. What quantizes is no evidence of what pruning loses; see `bits`."""
        found = []
        for cell in cells(runs):
            kept = tuple(o for o in cell.outcomes if not o.candidate.quantizes)
            if kept:
                found.append(cell if len(kept) == len(cell.outcomes) else replace(cell, outcomes=kept))
        return Evidence(found, shrinkage(found))

    def without(self, task: str) -> Evidence:
        """The same without a task: nothing of it is left, in whatever study."""
        kept = [cell for cell in self.cells if cell.subject.task != task]
        return Evidence(kept, shrinkage(kept))

    def near(self, situation: Situation, candidate: Candidate) -> list[tuple[Cell, float]]:
        """The cells that say something of a method in a situation, with how much."""
        found = []
        for cell in self.cells:
            weight = relevance(situation, cell) * closeness(candidate.aim, cell.aim)
            if weight >= NEAR:
                found.append((cell, weight))
        return found


def shrinkage(found: Sequence[Cell]) -> float:
    """Variance of one method between tasks over the variance between methods, within [0.25, 4]; 1 where nobody knows.

    By moments: of each method that ran on two tasks or more its mean place on each.
    """
    by_method: dict[str, dict[str, list[float]]] = {}
    for cell in found:
        for outcome in cell.outcomes:
            tasks = by_method.setdefault(outcome.candidate.recipe.method, {})
            tasks.setdefault(cell.subject.task, []).append(cell.place(outcome))
    means = [[statistics.fmean(v) for v in tasks.values()] for tasks in by_method.values() if len(tasks) > 1]
    if len(means) < 3:
        return 1.0
    within = statistics.fmean(statistics.variance(m) for m in means)
    count = statistics.harmonic_mean([len(m) for m in means])
    between = statistics.variance([statistics.fmean(m) for m in means]) - within / count
    if within <= 0:
        return 0.25
    return min(max(within / between, 0.25), 4.0) if between > 0 else 4.0


class _Mean:
    """A weighted mean over tasks: within a task cells are averaged, and a task weighs as much as its nearest cell."""

    def __init__(self) -> None:
        self.tasks: dict[str, list[tuple[float, float]]] = {}

    def add(self, task: str, weight: float, value: float) -> None:
        self.tasks.setdefault(task, []).append((weight, value))

    @property
    def weight(self) -> float:
        return math.fsum(max(w for w, _ in found) for found in self.tasks.values())

    @property
    def value(self) -> float:
        total = 0.0
        for found in self.tasks.values():
            own = math.fsum(w * v for w, v in found) / math.fsum(w for w, _ in found)
            total += max(w for w, _ in found) * own
        return total / self.weight


def effect(evidence: Evidence, situation: Situation, candidate: Candidate, points: float) -> Effect:
    """What is to be expected of a method."""
    own, everywhere, kin = _Mean(), _Mean(), _Mean()
    runs, kin_runs = 0, 0
    studies: dict[str, None] = {}
    for cell, weight in evidence.near(situation, candidate):
        for outcome in cell.outcomes:
            if same(candidate, outcome.candidate):
                own.add(cell.subject.task, weight, cell.place(outcome))
                everywhere.add(cell.subject.task, closeness(candidate.aim, cell.aim), cell.place(outcome))
                runs += outcome.runs
                studies.setdefault(cell.study)
                continue
            like = likeness(candidate.profile, outcome.candidate.profile)
            if like >= KIN:
                kin.add(f"{cell.subject.task}/{outcome.label}", weight * like**POWER, cell.place(outcome))
                kin_runs += outcome.runs
    prior = 1.0 - POINT * points
    if kin.tasks:
        strength = kin.weight
        prior = (strength * (kin.value - POINT * points / (1 + strength)) + BELIEF * prior) / (strength + BELIEF)
    if not own.tasks:
        return Effect(prior, None, 0.0, prior, 0, (), kin_runs)
    tasks, all_tasks = own.weight, everywhere.weight
    base = (all_tasks * everywhere.value + evidence.ratio * prior) / (all_tasks + evidence.ratio)
    value = (tasks * own.value + POOLED * base) / (tasks + POOLED)
    return Effect(value, own.value, tasks, prior, runs, tuple(studies), kin_runs, tuple(sorted(own.tasks)))


def direct(
    evidence: Evidence, situation: Situation, candidate: Candidate, wanted: Callable[[Cell], bool]
) -> list[tuple[Cell, Outcome, float]]:
    """A method's own outcomes in the cells that are wanted, with how much each says."""
    return [
        (cell, outcome, weight)
        for cell, weight in evidence.near(situation, candidate)
        if wanted(cell)
        for outcome in cell.outcomes
        if same(candidate, outcome.candidate)
    ]
