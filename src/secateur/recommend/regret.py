"""How good the recommender is: each task is left out in turn, and its first choice held against the best in hindsight.

Nothing of the task that is left out is in the evidence, in whatever study it is. The choice is among the contenders
that ran on it. The same is done for every contender chosen always, for the default, for a draw at random, and for
what is best on average over the other tasks.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from . import predict
from .answer import arrange
from .cells import Cell, Outcome
from .evidence import Run
from .hardware import Hardware
from .predict import quantile
from .rank import Evidence, effect
from .situation import Goal, Retraining, Situation
from .verdict import ask, points

#: What is taken where a user names no method, by whether the study trains its models.
DEFAULT = {True: "magnitude", False: "wanda"}


@dataclass(frozen=True)
class Regret:
    """What a choice lost beyond the best there, in one cell.

    Attributes:
        spreads: in units of what lies between the best and the middle, at most 3.
        raw: in the study's own metric.
        drop: as a share of the dense score, or the logarithm of the ratio of perplexities.
    """

    spreads: float
    raw: float
    drop: float


def situation_of(cell: Cell) -> Situation:
    """The situation that a cell's study was in: the goal is its target, and data and time are what the study had."""
    kind = cell.subject.kind
    goal = Goal("sparsity" if cell.aim.quantity == "weights" else "params", cell.aim.keep, assumed=False)
    if cell.task:
        return Situation(kind, cell.subject.parameters, "", Hardware(), goal, "training", Retraining(math.inf), "init")
    data = "unlabeled" if kind in ("decoder", "moe") else "labels"
    return Situation(kind, cell.subject.parameters, "", Hardware(), goal, data, Retraining(0.0), "pretrained")


def chosen(cell: Cell, evidence: Evidence) -> Outcome:
    """What the recommender would take of a cell's contenders; evidence must not know the cell's task."""
    by_name = {o.label: o for o in cell.outcomes}
    candidates = [replace(o.candidate, name=o.label, aim=cell.aim) for o in cell.outcomes]
    return by_name[arrange(situation_of(cell), candidates, evidence)[0].name]


def regret_of(cell: Cell, outcome: Outcome) -> Regret:
    """What a contender lost beyond the best. One that failed with every seed counts as the worst that finished."""
    scores = [o.score for o in cell.outcomes if o.score is not None]
    top, bottom = (max(scores), min(scores)) if cell.higher_is_better else (min(scores), max(scores))
    own = outcome.score if outcome.score is not None else bottom
    return Regret(cell.regret(outcome), abs(top - own), outcome.drop - cell.best)


def _mean(found: Sequence[Regret]) -> Regret:
    fields = ("spreads", "raw", "drop")
    return Regret(*(statistics.fmean(getattr(r, f) for r in found) for f in fields))


def _over_tasks(per_task: Mapping[str, Regret]) -> dict[str, Any]:
    """Means over tasks, each with a 95 % interval of Student's t where there are two tasks or more."""
    made: dict[str, Any] = {"tasks": len(per_task)}
    for field in ("spreads", "drop"):
        values = [getattr(r, field) for r in per_task.values()]
        half = None
        if len(values) > 1:
            half = quantile(len(values) - 1, 0.95) * statistics.stdev(values) / math.sqrt(len(values))
        made[field] = {"mean": statistics.fmean(values), "half": half}
    made["raw"] = {task: r.raw for task, r in per_task.items()}
    made["each"] = {task: r.spreads for task, r in per_task.items()}
    return made


def score(runs: Iterable[Run], choose: Callable[[Cell, Evidence], Outcome] = chosen) -> dict[str, Any]:
    """Leave out one task at a time.

    Args:
        runs: of studies; a task is a subject, in whatever study.
        choose: what is scored; the recommender.

    Returns:
        For each policy its regrets over tasks; what was chosen where; how often intervals of drops held what came.
    """
    evidence = Evidence.of(runs)
    tasks = sorted({cell.subject.task for cell in evidence.cells})
    regrets: dict[str, dict[str, list[Regret]]] = {}
    choices, held, widths = [], [], []
    for task in tasks:
        rest = evidence.without(task)
        for cell in (c for c in evidence.cells if c.subject.task == task):
            if len(cell.outcomes) < 2:
                continue
            by_name = {o.label: o for o in cell.outcomes}
            picked = choose(cell, rest)
            each = {label: regret_of(cell, o) for label, o in by_name.items()}
            policies = {"recommender": each[picked.label], "random": _mean(list(each.values()))}
            policies |= {f"always {label}": found for label, found in each.items()}
            if (default := DEFAULT[cell.task]) in each:
                policies["default"] = each[default]
            if (average := _average(cell, rest)) is not None:
                policies["best of the other tasks"] = each[average]
            for policy, found in policies.items():
                regrets.setdefault(policy, {}).setdefault(task, []).append(found)
            best = min(by_name.values(), key=lambda o: o.drop)
            choices.append(
                {"task": task, "study": cell.study, "target": cell.target, "chosen": picked.label, "best": best.label,
                 "regret": each[picked.label].spreads, "raw": each[picked.label].raw}
            )  # fmt: skip
            for outcome in cell.outcomes:
                span = _interval(cell, outcome, rest)
                if span is not None:
                    held.append(span[0] <= outcome.drop <= span[1])
                    widths.append(span[1] - span[0])
    table = {p: _over_tasks({t: _mean(found) for t, found in by.items()}) for p, by in regrets.items()}
    return {
        "tasks": tasks, "policies": table, "choices": choices, "verdict": verdict(regrets, _groups(evidence)),
        "intervals": {
            "nominal": 0.8, "count": len(held), "held": statistics.fmean(held) if held else None,
            "width": statistics.median(widths) if widths else None,
        },
    }  # fmt: skip


def _groups(evidence: Evidence) -> dict[str, list[str]]:
    """All tasks, and apart from each other those that are trained in their study and those that had been before."""
    trained = {c.subject.task: c.task for c in evidence.cells}
    groups = {
        "all tasks": sorted(trained),
        "trained in the study": sorted(t for t, task in trained.items() if task),
        "trained before": sorted(t for t, task in trained.items() if not task),
    }
    return {name: tasks for name, tasks in groups.items() if tasks}


def _average(cell: Cell, rest: Evidence) -> str | None:
    """The contender with the least mean regret over the other tasks, of those that ran on at least one of them."""
    found: dict[str, dict[str, list[float]]] = {}
    for other in rest.cells:
        for o in other.outcomes:
            found.setdefault(o.label, {}).setdefault(other.subject.task, []).append(other.regret(o))
    means = {
        o.label: statistics.fmean(statistics.fmean(v) for v in found[o.label].values())
        for o in cell.outcomes
        if o.label in found
    }
    return min(sorted(means), key=lambda label: means[label]) if means else None


def _interval(cell: Cell, outcome: Outcome, rest: Evidence) -> tuple[float, float] | None:
    """The interval of a contender's drop, as it would be given without the task."""
    if not cell.absolute:
        return None
    situation = situation_of(cell)
    candidate = replace(outcome.candidate, aim=cell.aim)
    found = effect(rest, situation, candidate, points(ask(situation, candidate)))
    expected = predict.loss(rest, situation, candidate, found)
    return None if expected.low is None or expected.high is None else (expected.low, expected.high)


def verdict(
    regrets: Mapping[str, Mapping[str, Sequence[Regret]]], groups: Mapping[str, Sequence[str]]
) -> list[dict[str, Any]]:
    """Whether the recommender's regret is at most half of the best fixed choice's, for each group of tasks.

    The best fixed choice is the one that turns out best in hindsight, of those that ran on most tasks of the group. One
    that ran on a single task would be the best there by definition: then nothing is said.

    Args:
        regrets: policy -> task -> regrets in its cells.
        groups: name -> tasks.
    """
    return [_halved(name, regrets, tasks) for name, tasks in groups.items()]


def _halved(group: str, regrets: Mapping[str, Mapping[str, Sequence[Regret]]], tasks: Sequence[str]) -> dict[str, Any]:
    fixed = {p: [t for t in tasks if t in by] for p, by in regrets.items() if p.startswith("always ")}
    most = max((len(ran) for ran in fixed.values()), default=0)
    if most < 2:
        text = f"{group}: nothing can be said: no contender ran on two of its {len(tasks)} tasks"
        return {"group": group, "halved": None, "text": text}

    def mean(policy: str, over: Sequence[str]) -> float:
        return statistics.fmean(_mean(regrets[policy][t]).spreads for t in over)

    best = min((p for p in sorted(fixed) if len(fixed[p]) == most), key=lambda p: mean(p, fixed[p]))
    over = fixed[best]
    mine, theirs = mean("recommender", over), mean(best, over)
    halved = mine <= theirs / 2
    text = f"{group}: over {len(over)} tasks the recommender's regret is {mine:.3f}, "
    text += f"that of {best} (best in hindsight) {theirs:.3f}"
    text += ": at most half of it" if halved else f", where half was the aim: it falls short by {mine - theirs / 2:.3f}"
    return {
        "group": group, "halved": halved, "best fixed": best, "recommender": mine, "fixed": theirs, "tasks": over,
        "short": max(0.0, mine - theirs / 2), "text": text,
    }  # fmt: skip
