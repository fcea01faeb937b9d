"""Score, cut a little, and score again: structured pruning in several rounds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
from torch import nn

from ..graph import Dependencies
from ..recipe import Recipe
from ..schedule import sparsity_at
from .choose import chosen
from .make import NOTHING, Case, plan_structured
from .plan import StructuredPlan
from .score import Probes
from .targets import Target

#: Tensor name -> axis -> positions that stay.
Kept = dict[str, dict[int, Any]]


def plan_rounds(
    model: nn.Module,
    recipe: Recipe,
    *,
    target: Target,
    example: Any,
    measure: Callable[[nn.Module, Probes], Mapping[str, Any]],
    heal: Callable[[StructuredPlan], None],
    multiple: int = 8,
    where: str = "coupled",
) -> StructuredPlan:
    """A plan made in ``recipe.steps`` rounds on the schedule: each scores the model that the rounds before left.

    What all rounds took is proven once more on the model itself.

    Args:
        measure: evidence of a model, as for `plan_structured`.
        heal: called with the plan of each round but the last, whose smaller model the next round scores.
    """
    case = Case(model, recipe, example)
    count = case.counted[target.quantity]
    before = count(frozenset())
    share = 1 - target.remaining(before) / before
    kept: Kept = {}
    current = model
    for step in range(1, recipe.steps + 1):
        goal = before * (1 - sparsity_at(recipe.schedule, step / recipe.steps, share))
        plan = plan_structured(
            current,
            recipe,
            target=Target(target.quantity, limit=goal),
            example=example,
            evidence=partial(measure, current),
            multiple=multiple,
            where=where,
        )
        if not plan.kept:
            continue  # the next multiple is further away than this round goes
        kept = _composed(kept, plan.kept)
        if step < recipe.steps:
            heal(plan)
            current = plan.shrink()
    labels = _labels(case.found, kept)
    _, left = chosen(case.found, recipe, model, case.remade)
    done = case.plan(target, labels, case.prove(labels) if labels else NOTHING, left, multiple)
    if kept and not done.kept:
        done.notes.append(f"what {recipe.steps} rounds took is not proven as a whole: {done.proof.reason}")
    return done


def _composed(first: Kept, then: Mapping[str, Mapping[int, Any]]) -> Kept:
    """Positions of the original that stay after both."""
    found = {name: dict(axes) for name, axes in first.items()}
    for name, axes in then.items():
        for axis, positions in axes.items():
            here = found.setdefault(name, {})
            here[axis] = here[axis][positions] if axis in here else positions
    return found


def _labels(found: Dependencies, kept: Kept) -> frozenset[int]:
    """The labels of the positions that do not stay."""
    gone: set[int] = set()
    for slot, roots in zip(found.slots, found.roots, strict=True):
        axes = next((kept[n] for n in slot.names if n in kept), {})
        if slot.axis in axes:
            gone.update(np.delete(roots, axes[slot.axis]).tolist())
    return frozenset(gone)
