"""What a method is expected to lose, how fast to be, and what it took: from the nearest runs, with intervals.

The loss that is expected on each near task is what the method lost there; where it did not run, what was lost there at
the place that is expected of it. The prediction is their mean, weighted by nearness, and an 80 % interval of Student's
t for one more task.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

from .candidate import Candidate, Expected
from .cells import Cell
from .distance import same
from .rank import Effect, Evidence, counted, direct
from .situation import Situation

#: Two-sided quantiles of Student's t by degrees of freedom, and at the end those of the normal distribution.
_T = {
    0.8: (3.078, 1.886, 1.638, 1.533, 1.476, 1.440, 1.415, 1.397, 1.383, 1.372, 1.282),
    0.95: (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 1.960),
}
#: Tasks that say less than this are not predicted from: another kind, or another target.
_NEAR = 0.1


def quantile(degrees: int, level: float = 0.8) -> float:
    """Of Student's t, two-sided at 80 or 95 %.

    >>> quantile(1), quantile(2, 0.95), quantile(30)
    (3.078, 4.303, 1.282)
    """
    return _T[level][min(degrees, 11) - 1]


def _comparable(situation: Situation, candidate: Candidate, cell: Cell) -> bool:
    """Whether what is lost there says what is lost here: the same is taken away, and the loss is counted alike.

    Zeros do not say what a smaller model costs. A loss is a share of accuracy, or the logarithm of perplexity.
    """
    if not cell.absolute or candidate.aim.structure != cell.aim.structure:
        return False
    language = situation.kind in ("decoder", "moe", "encoder-decoder")
    if situation.model and situation.model == cell.subject.task:
        return True
    return cell.metric.startswith("perplexity") if language else cell.higher_is_better


@dataclass(frozen=True)
class _Seen:
    """What one cell says of a loss."""

    study: str
    weight: float
    value: float
    runs: int
    own: bool


def _seen(evidence: Evidence, situation: Situation, candidate: Candidate, effect: Effect) -> dict[str, list[_Seen]]:
    """By task, the cells at the targets that are nearest there."""
    tasks: dict[str, list[_Seen]] = {}
    for cell, weight in evidence.near(situation, candidate):
        if weight < _NEAR or not _comparable(situation, candidate, cell):
            continue
        mine = [o for o in cell.outcomes if same(candidate, o.candidate)]
        if mine:
            seen = _Seen(cell.study, weight, statistics.fmean(o.drop for o in mine), sum(o.runs for o in mine), True)
        else:
            value = cell.drop_at(effect.value)
            seen = _Seen(cell.study, weight / 2, value, sum(o.runs for o in cell.outcomes), False)
        tasks.setdefault(cell.subject.task, []).append(seen)
    return {t: [s for s in found if s.weight >= 0.9 * max(x.weight for x in found)] for t, found in tasks.items()}


def loss(evidence: Evidence, situation: Situation, candidate: Candidate, effect: Effect) -> Expected:
    """What a method is expected to lose."""
    tasks = _seen(evidence, situation, candidate, effect)
    if not tasks:
        return Expected(None, source="nothing near was measured")
    everything = [s for found in tasks.values() for s in found]
    points = [
        (
            max(s.weight for s in found),
            math.fsum(s.weight * s.value for s in found) / math.fsum(s.weight for s in found),
        )
        for found in tasks.values()
    ]
    total = math.fsum(w for w, _ in points)
    mean = math.fsum(w * v for w, v in points) / total
    studies = counted(len({s.study for s in everything}), "study")
    how = f"from {counted(sum(s.runs for s in everything), 'run')} in {studies} ({', '.join(sorted(tasks))})"
    if not any(s.own for s in everything):
        how += ", none of this method"
    if len(points) < 2:
        return Expected(mean, source=f"{how}; one task gives no interval")
    count = total**2 / math.fsum(w * w for w, _ in points)
    variance = math.fsum(w * (v - mean) ** 2 for w, v in points) / total * len(points) / (len(points) - 1)
    half = quantile(len(points) - 1) * math.sqrt(variance * (1 + 1 / count))
    high = mean + half if situation.language else min(mean + half, 1.0)
    return Expected(mean, mean - half, high, f"{how}; 80 % interval for one more task")


def by_effect(evidence: Evidence, situation: Situation, candidate: Candidate, effect: Effect) -> float | None:
    """What a method would lose if it came to its expected place on every near task: methods that aim alike are in the
    order of their places, and others are in that of what their aim costs. None where nothing near was measured.
    """
    near = [
        (c, w) for c, w in evidence.near(situation, candidate) if w >= _NEAR and _comparable(situation, candidate, c)
    ]
    if not near:
        return None
    return math.fsum(w * c.drop_at(effect.value) for c, w in near) / math.fsum(w for _, w in near)


def speed(evidence: Evidence, situation: Situation, candidate: Candidate) -> Expected:
    """How many times as fast: of runs on such hardware where there are any, else by the figures that ship."""
    if situation.hardware.family != "cpu":
        return candidate.speed
    found = direct(evidence, situation, candidate, lambda cell: cell.subject.kind == situation.kind)
    found = [x for x in found if x[1].speeds and x[1].machine == situation.hardware.instructions and x[2] >= _NEAR]
    ratios = [r for _, outcome, _ in found for r in outcome.speeds if r > 0]
    if not ratios:
        return candidate.speed
    studies = {cell.study for cell, _, _ in found}
    source = f"measured in {counted(len(ratios), 'run')} of {counted(len(studies), 'study')}"
    middle = math.exp(statistics.fmean(map(math.log, ratios)))
    return Expected(middle, min(ratios), max(ratios), source) if len(ratios) > 1 else Expected(middle, source=source)


def seconds(evidence: Evidence, situation: Situation, candidate: Candidate) -> Expected:
    """How long pruning took where it was measured; it is not carried over to other sizes and machines."""
    found = direct(evidence, situation, candidate, lambda cell: True)
    if not (nearest := max((w for _, o, w in found if o.seconds), default=0.0)):
        return Expected(None)
    cell, outcome, _ = next(x for x in found if x[2] == nearest and x[1].seconds)
    size = f" of {cell.subject.parameters / 1e6:.3g}M parameters" if cell.subject.parameters else ""
    source = f"{counted(len(outcome.seconds), 'run')} on {cell.subject.name}{size}"
    return Expected(statistics.fmean(outcome.seconds), min(outcome.seconds), max(outcome.seconds), source)


def lost(found: Expected, language: bool) -> str:
    """What is expected to be lost, as people say it."""
    if found.value is None:
        return "not known"
    unit = "times the perplexity" if language else "of the score"
    if language:
        shown = [None if x is None else f"{math.exp(min(x, 50.0)):.3g}" for x in (found.value, found.low, found.high)]
    else:
        shown = [None if x is None else f"{100 * x:.2g} %" for x in (found.value, found.low, found.high)]
    middle, low, high = shown
    span = f" ({low} to {high})" if low is not None else ""
    return f"{middle} {unit}{span}; {found.source}"
