"""From a recipe over units of the whole model to a plan: evidence, target, recovery."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from . import granularity
from .calibrate import Loss, as_batch, batches_of, evidence_of, run_model
from .errors import RecipeError
from .graph.state import duplicate
from .layers import find_layers
from .recipe import Recipe
from .recover.units import Smaller
from .registry import get
from .structured import StructuredPlan, Target, WholePlan, plan_depth, plan_experts, plan_structured
from .structured.measured import MEASURES, plan_measured
from .structured.plan import inputs
from .structured.rounds import plan_rounds
from .structured.score import Probes
from .structured.whole import totals
from .surgery.program import as_program
from .surgery.tied import shared_heads, untie


def plan_coupled(
    model: nn.Module,
    recipe: Recipe,
    *,
    target: str | None = None,
    example: Any = None,
    data: Any = None,
    loss: Loss | None = None,
    multiple: int = 8,
    exported: bool = False,
) -> StructuredPlan | WholePlan:
    """A plan for units of the whole model: evidence from data where the criterion needs it, then the plan itself.

    Args:
        multiple: sizes that remain are multiples of it where the units are single positions.
        exported: plan on the model's exported program; see `surgery.program`.

    Raises:
        RecipeError: an example, data or a loss is missing, or the solver or recovery is not one for units.
        ModelError: the model does not run on the example, or cannot be exported on it.
    """
    if example is None:
        raise RecipeError(
            f"granularity '{recipe.granularity}' follows one forward pass: give inputs for it with example="
        )
    if multiple < 1:
        raise RecipeError(f"multiple is {multiple}: sizes are rounded to a multiple of 1 or more")
    recovery = get("recovery", recipe.recovery)
    heals = recovery.facts.get("data") == "units"
    pattern = granularity.parse(recipe.granularity)
    scored = pattern.coupled
    wanted = Target.parse(target if target is not None else f"params {100 * recipe.sparsity:g}%")
    _refuse(recipe, heals, pattern.whole, wanted)
    recipe.check(data=data is not None or recipe.needs_shape, loss=loss is not None)
    batches = batches_of(data) if data is not None else []
    seen = batches or (as_batch(example) if recipe.needs_shape else [])  # what heals is fitted to data, not to this
    if exported:
        _refuse_exported(recipe, recovery.facts)
    given, untied = model, (shared_heads(model) if recovery.facts.get("unties") and batches else ())
    if untied:  # counts are of the model that was given
        model = duplicate(model)
        untie(model, untied)
        wanted = _absolute(wanted, given)

    def measure(net: nn.Module, probes: Probes | None = None) -> dict[str, Any]:
        if not recipe.needs_data:
            return {}
        directions = None if probes is None else probes.directions()
        return evidence_of(net, recipe, find_layers(net)[0], seen, loss, directions)

    def heal(plan: StructuredPlan) -> None:
        net, kept, knobs = plan.model, plan.kept, recipe.knobs_of("recovery")
        if heals and kept and batches:
            plan.heal(lambda small: recovery.function(Smaller(net, small, kept, batches, run_model), **knobs))

    shared = {"example": example, "multiple": multiple, "where": scored}
    net = as_program(model, *inputs(example)) if exported else model
    if recipe.steps > 1:
        plan: StructuredPlan | WholePlan = plan_rounds(
            model, recipe, target=wanted, measure=measure, heal=heal, **shared
        )
    else:
        by = "params" if scored == "experts" else "flops"
        known: list[dict[str, Any]] = []

        def evidence(probes: Probes | None = None) -> dict[str, Any]:
            if not known:  # every goal draws the same signs
                known.append(measure(model, probes))
            return known[0]

        def make(goal: Target) -> StructuredPlan | WholePlan:
            if not pattern.whole:
                origin = model if exported else None
                return plan_structured(net, recipe, target=goal, evidence=evidence, origin=origin, **shared)
            more: dict[str, Any] = {"batches": batches, "run": run_model, "evidence": evidence()}
            if scored == "experts":
                return plan_experts(model, recipe, target=goal, example=example, **more)
            return plan_depth(model, recipe, target=goal, example=example, loss=loss, **more)

        plan = make(wanted) if wanted.quantity not in MEASURES else plan_measured(model, wanted, example, make, by)
    if pattern.whole and recipe.allocation != "uniform":
        plan.notes.append(f"allocation '{recipe.allocation}' says nothing of whole {scored}: they go by their scores")
    if untied and isinstance(plan, StructuredPlan):
        plan.untied = untied
        plan.before.update(_counts(given))
        whole = _counts(model)["params"]
        plan.notes.append(f"{untied[0]} has been untied from the embedding: {whole:,} parameters before anything goes")
    if exported and heals and batches:
        plan.notes.append(
            f"recovery '{recipe.recovery}' was left out: it fits layers, and an exported program has none"
        )
    elif heals and isinstance(plan, StructuredPlan) and plan.kept:
        heal(plan)
        if not batches:
            plan.notes.append(f"recovery '{recipe.recovery}' was left out: it works on data, and none was given")
    return plan


def _counts(model: nn.Module) -> dict[str, int]:
    return {k: v for k, v in totals(model, 0).items() if k != "flops"}


def _absolute(target: Target, model: nn.Module) -> Target:
    """What may remain as a count, where the share of a count of stored parameters was asked for."""
    before = _counts(model).get(target.quantity)
    return target if before is None else Target(target.quantity, limit=target.remaining(before))


def _refuse_exported(recipe: Recipe, recovery: Mapping[str, Any]) -> None:
    """What an exported program cannot have."""
    if recovery.get("unties"):
        raise RecipeError(
            f"recovery '{recipe.recovery}' turns the layers of a module, and an exported program has none: leave out "
            "exported, or choose recovery none"
        )
    if recipe.steps > 1:
        raise RecipeError("an exported program is cut in one step: leave steps at 1, or leave out exported")


def _refuse(recipe: Recipe, heals: bool, whole: bool, wanted: Target) -> None:
    """What units of the whole model cannot do."""
    if recipe.solver != "rank" or not (heals or recipe.recovery == "none"):
        raise RecipeError(
            f"coupled units are removed by solver rank; method '{recipe.method}' asks for solver '{recipe.solver}', "
            f"recovery '{recipe.recovery}'"
        )
    if whole and heals:
        raise RecipeError(
            f"recovery '{recipe.recovery}' refits what reads removed units; whole blocks and experts have no such "
            "readers"
        )
    if recipe.steps > 1 and whole:
        raise RecipeError(
            "whole blocks and experts go in one step: leave steps at 1 (criterion loss-without looks anew each time)"
        )
    if recipe.steps > 1 and recipe.allocation == "explicit":
        raise RecipeError("allocation 'explicit' says what stays in the end: leave steps at 1")
    if recipe.steps > 1 and wanted.quantity in MEASURES:
        raise RecipeError(f"a target in {wanted.quantity} is met in one step: leave steps at 1, or take one in FLOPs")
