"""From a recipe over units of the whole model to a plan: evidence, target, recovery."""

from __future__ import annotations

from typing import Any

from torch import nn

from . import granularity
from .calibrate import Loss, batches_of, evidence_of, run_model
from .errors import RecipeError
from .layers import find_layers
from .recipe import Recipe
from .recover.units import Smaller
from .registry import get
from .structured import DepthPlan, StructuredPlan, Target, plan_depth, plan_structured
from .structured.measured import plan_latency


def plan_coupled(
    model: nn.Module,
    recipe: Recipe,
    *,
    target: str | None = None,
    example: Any = None,
    data: Any = None,
    loss: Loss | None = None,
    multiple: int = 8,
) -> StructuredPlan | DepthPlan:
    """A plan for units of the whole model: evidence from data where the criterion needs it, then the plan itself.

    Raises:
        RecipeError: an example, data or a loss is missing, or the solver or recovery is not one for units.
    """
    if example is None:
        raise RecipeError(
            f"granularity '{recipe.granularity}' follows one forward pass: give inputs for it with example="
        )
    recovery = get("recovery", recipe.recovery)
    heals = recovery.facts.get("data") == "units"
    if recipe.solver != "rank" or not (heals or recipe.recovery == "none") or recipe.steps > 1:
        raise RecipeError(
            f"coupled units are removed in one step by solver rank; method '{recipe.method}' asks for "
            f"solver '{recipe.solver}', recovery '{recipe.recovery}', {recipe.steps} steps"
        )
    recipe.check(data=data is not None, loss=loss is not None)
    layers, _ = find_layers(model)
    evidence = {}
    batches = batches_of(data) if data is not None else []
    if recipe.needs_data:
        evidence = evidence_of(model, recipe, layers, batches, loss)
    wanted = Target.parse(target if target is not None else f"params {100 * recipe.sparsity:g}%")
    scored = granularity.parse(recipe.granularity).coupled
    if scored == "depth" and heals:
        raise RecipeError(f"recovery '{recipe.recovery}' refits what reads removed units; blocks have no such readers")

    def make(goal: Target) -> StructuredPlan | DepthPlan:
        if scored == "depth":
            return plan_depth(
                model,
                recipe,
                target=goal,
                example=example,
                batches=batches,
                loss=loss,
                run=run_model,
                evidence=evidence,
            )
        return plan_structured(
            model, recipe, target=goal, example=example, evidence=evidence, multiple=multiple, where=scored
        )

    plan = plan_latency(model, wanted, example, make) if wanted.quantity == "latency" else make(wanted)
    if heals and isinstance(plan, StructuredPlan) and plan.kept:
        if batches:
            knobs, kept = recipe.knobs_of("recovery"), plan.kept
            plan.heal(lambda small: recovery.function(Smaller(model, small, kept, batches, run_model), **knobs))
        else:
            plan.notes.append(f"recovery '{recipe.recovery}' was left out: it works on data, and none was given")
    return plan
