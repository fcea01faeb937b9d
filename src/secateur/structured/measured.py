"""Plans whose target is measured on the smaller model itself: its latency on this machine, its peak memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from ..measure.latency import latency
from ..measure.memory import peak_bytes
from .plan import StructuredPlan, inputs
from .targets import Target
from .whole import WholePlan

_ROUNDS = 6
_CLOSE = 0.05

#: Makes a plan for a target that can be counted.
Make = Callable[[Target], StructuredPlan | WholePlan]


#: Name -> measures models on the same inputs, in the unit that targets have.
Measure = Callable[[Mapping[str, nn.Module], Sequence[Any], Mapping[str, Any]], Mapping[str, float]]


def _seconds(models: Mapping[str, nn.Module], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Mapping[str, float]:
    return latency(models, args, kwargs)


def _memory(models: Mapping[str, nn.Module], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Mapping[str, float]:
    return {name: float(peak_bytes(model, args, kwargs)) for name, model in models.items()}


#: Quantity of a target -> how it is measured, what a plan's table calls it, and the table's units in one of ours.
MEASURES: dict[str, tuple[Measure, str, float]] = {
    "latency": (_seconds, "latency us", 1e6),
    "memory": (_memory, "memory", 1.0),
}


def plan_measured(
    model: nn.Module, target: Target, example: Any, make: Make, by: str = "flops"
) -> StructuredPlan | WholePlan:
    """A plan whose smaller model has what is asked for, within 5 %, by search over FLOPs, or what else ``by`` counts.

    Each try makes the smaller model and measures it beside the dense one; for a latency they take turns on the
    example. The nearest of those that are within the target is returned, else the least, with a note.
    """
    args, kwargs = inputs(example)
    measure, _, _ = MEASURES[target.quantity]
    dense = measure({"dense": model}, args, kwargs)["dense"]
    goal = target.remaining(dense) / dense
    slow, fast = (1.0, 1.0), (0.0, 0.0)  # (share of FLOPs, share of latency)
    found: list[tuple[float, StructuredPlan | WholePlan]] = []
    share = goal
    for _ in range(_ROUNDS):
        plan = make(Target(by, fraction=share))
        if not _changes(plan):
            return plan if not found else found[-1][1]
        small = plan.shrink()
        times = measure({"dense": model, "small": small}, args, kwargs)
        reached = times["small"] / times["dense"]
        found.append((reached, _stamped(plan, target, times)))
        if goal * (1 - _CLOSE) <= reached <= goal:
            break
        if reached > goal:
            slow = (share, reached)
        else:
            fast = (share, reached)
        span = slow[1] - fast[1]
        step = (goal * (1 - _CLOSE / 2) - fast[1]) / span if span > 0 else 0.5
        share = fast[0] + (slow[0] - fast[0]) * min(0.9, max(0.1, step))
    enough = [x for x in found if x[0] <= goal * (1 + _CLOSE)]
    reached, plan = max(enough, key=lambda x: x[0]) if enough else min(found, key=lambda x: x[0])
    if not enough:
        plan.notes.append(
            f"the target is not met: the {target.quantity} could only be brought to {100 * reached:.0f}% of the dense "
            f"model's in {len(found)} tries, {100 * goal:.0f}% was asked for"
        )
    elif reached < goal * (1 - _CLOSE):
        plan.notes.append(
            f"less than asked ({100 * reached:.0f}% of the dense {target.quantity}, not {100 * goal:.0f}%): sizes go "
            "in steps, and the next larger one was above the target"
        )
    return plan


def _changes(plan: StructuredPlan | WholePlan) -> bool:
    return bool(plan.removed if isinstance(plan, WholePlan) else plan.kept)


def _stamped(plan: Any, target: Target, found: Mapping[str, float]) -> Any:
    """The plan with what was measured, and the target as it was asked for."""
    _, name, scale = MEASURES[target.quantity]
    before = {**plan.before, name: round(scale * found["dense"])}
    after = {**plan.after, name: round(scale * found["small"])}
    notes = [n for n in plan.notes if not n.startswith(("the target is not met", "more goes than was asked"))]
    return dataclasses.replace(plan, target=target, before=before, after=after, notes=notes)
