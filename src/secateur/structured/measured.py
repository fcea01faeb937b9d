"""Plans whose target is measured: the latency of the smaller model on this machine."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import nn

from ..measure.latency import latency
from .depth import DepthPlan
from .plan import StructuredPlan, inputs
from .targets import Target

_ROUNDS = 6
_CLOSE = 0.05

#: Makes a plan for a target that can be counted.
Make = Callable[[Target], StructuredPlan | DepthPlan]


def plan_latency(model: nn.Module, target: Target, example: Any, make: Make) -> StructuredPlan | DepthPlan:
    """A plan whose smaller model has the latency that is asked for, within 5 %, by search over FLOPs.

    Each try makes the smaller model and times it beside the dense one, taking turns on the example. The nearest of
    those that are fast enough is returned, else the fastest, with a note.
    """
    args, kwargs = inputs(example)
    dense = latency({"dense": model}, args, kwargs)["dense"]
    goal = target.remaining(dense) / dense
    slow, fast = (1.0, 1.0), (0.0, 0.0)  # (share of FLOPs, share of latency)
    found: list[tuple[float, StructuredPlan | DepthPlan]] = []
    share = goal
    for _ in range(_ROUNDS):
        plan = make(Target("flops", fraction=share))
        if not _changes(plan):
            return plan if not found else found[-1][1]
        small = plan.shrink()
        times = latency({"dense": model, "small": small}, args, kwargs)
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
            f"the target is not met: the latency could only be brought to {100 * reached:.0f}% of the dense model's "
            f"in {len(found)} tries, {100 * goal:.0f}% was asked for"
        )
    elif reached < goal * (1 - _CLOSE):
        plan.notes.append(
            f"faster than asked ({100 * reached:.0f}% of the dense latency, not {100 * goal:.0f}%): sizes go in steps, "
            "and the next larger one was slower than the target"
        )
    return plan


def _changes(plan: StructuredPlan | DepthPlan) -> bool:
    return bool(plan.removed if isinstance(plan, DepthPlan) else plan.kept)


def _stamped(plan: Any, target: Target, times: dict[str, float]) -> Any:
    """The plan with what was measured, in microseconds, and the target as it was asked for."""
    before = {**plan.before, "latency us": round(1e6 * times["dense"])}
    after = {**plan.after, "latency us": round(1e6 * times["small"])}
    notes = [n for n in plan.notes if not n.startswith(("the target is not met", "more goes than was asked"))]
    return dataclasses.replace(plan, target=target, before=before, after=after, notes=notes)
