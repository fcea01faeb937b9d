"""What a compound would bring, step by step: done on a copy, with cheap stand-ins for what only data can tell."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ..coupled import example_inputs, vocabulary
from ..frozen import thawed
from ..granularity import parse
from ..layers import evaluating
from ..models import next_token_loss
from ..recipe import Recipe
from ..registry import get
from ..stream.storage import shares
from .apply import Given, State, apply
from .figures import figures
from .recipe import Compound
from .run import is_smallest, refuse_axes, table
from .steps import Step, trains


@dataclass(frozen=True, eq=False)
class CompoundPlan:
    """What each step of a compound should bring. Prints as a table.

    Attributes:
        before: counts of the model.
        steps: for each step its ``title``, what it ``needs``, the counts ``after`` it, and ``stands`` for what is shown
            in its place.
    """

    compound: Compound
    source: str
    before: dict[str, Any]
    steps: list[dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {
            "compound": self.compound.to_dict(), "digest": self.compound.digest, "model": self.source,
            "before": self.before, "steps": self.steps,
        }  # fmt: skip

    def __str__(self) -> str:
        title = f"{self.compound} on {self.source}  (recipe {self.compound.digest})"
        lines = [table(title, self.before, self.steps, [])]
        for number, step in enumerate(self.steps, 1):
            needs = ", ".join(step["needs"]) or "nothing but the model"
            lines.append(f"  {number}  needs {needs}" + (f"; {step['stands']}" if step["stands"] else ""))
        return "\n".join(lines)


def preview(
    model: nn.Module, compound: Compound, *, example: Any = None, data: Any = None, loss: Any = None,
    element: int | None = None, source: str = "", storage: str | None = None, **axes: Any,
) -> CompoundPlan:  # fmt: skip
    """The counts after each step, on a copy of the model; nothing is trained, and nothing healed.

    Without data, steps that rank by data are shown by what needs none: how much goes is the same, what goes is not.

    Raises:
        RecipeError, ModelError: a step cannot be done.
    """
    refuse_axes(axes)
    smallest = is_smallest(compound, storage)
    if vocabulary(model):
        example = example_inputs(None, model) if example is None else example
        loss = next_token_loss if loss is None else loss
    given = Given(data, loss, example, seed=compound.seed, element=element)
    state = State(copy.deepcopy(model))
    with evaluating(model):
        before = figures(model, {}, example, element, smallest)
    steps: list[dict[str, Any]] = []
    for number, step in enumerate(compound.steps, 1):
        shown, why = _stand_in(step, data is not None, bool(state.grids))
        if shown is not None:
            apply(state, shown, given, number)
        with evaluating(state.model):
            after = figures(state.model, state.grids, example, element, smallest)
        steps.append({
            "title": str(step), "step": step.to_dict(), "needs": sorted(step.needs()), "after": after, "stands": why,
        })  # fmt: skip
    return CompoundPlan(compound, source or type(model).__name__, before, steps)


def _stand_in(step: Step, data: bool, rounded: bool) -> tuple[Step | None, str]:
    """What is done in place of a step for its counts, and why; None for nothing.

    Args:
        rounded: whether an earlier step has rounded the weights.
    """
    if step.kind == "recover":
        part = get("recovery", step.method)
        if part.facts.get("trains") != "integers" or rounded:
            return None, "training changes no counts"
        own = {k: step.options.get(k, part.knobs[k]) for k in ("bits", "group")}
        return Step("quantize", {"as": f"int{own['bits']}:{own['group']}", "method": "round"}), "nothing is trained"
    if step.kind == "runtime":
        return step, ""
    if step.kind == "decompose":
        if data or not step.needs():
            return step, ""
        kept = {k: v for k, v in step.options.items() if k in ("target", "sparsity", "only", "skip")}
        return Step("decompose", {**thawed(kept), "method": "svd"}), "ranks are shown for svd, until data are given"
    if step.kind == "quantize":
        options, known = thawed(step.options), get("solver", "round").knobs
        own = {k: v for k, v in options.pop("knobs", {}).get("solver", {}).items() if k in known}
        return Step("quantize", {**options, "method": "round", **({"knobs": {"solver": own}} if own else {})}), ""
    recipe = step.recipe()
    shown = _plain(recipe, data)
    options = {k: v for k, v in thawed(step.options).items() if k in ("target", "multiple")}
    why = "what goes is shown for magnitude" if shown.criterion != recipe.criterion else ""
    if step.options.get("quantize") is not None or get("solver", recipe.solver).facts.get("quantizes"):
        bits = recipe.knobs_of("solver")
        if shares(recipe):
            shown = shown.quantized(f"shared:{bits['bits']}")
        else:
            shown = shown.quantized(f"int{bits['bits']}:{bits['group']}", {"symmetric": bits["symmetric"]})
    return _of_recipe(shown, options), why


def _plain(recipe: Recipe, data: bool) -> Recipe:
    """The recipe with the same counts that needs no training, and no data where none are given."""
    coupled = parse(recipe.granularity).coupled
    easy = not trains(recipe) and (data or not (recipe.needs_data or recipe.needs_loss))
    changes: dict[str, Any] = {"recovery": "none"}
    if not easy:
        changes |= {"driver": "once", "gate": "none", "penalty": "none", "hold": "zero", "solver": "rank"}
        changes |= {"criterion": "magnitude", "steps": 1, "schedule": "one-shot"}
        measured = get("allocation", recipe.allocation).facts.get("measure") is not None
        changes["allocation"] = "uniform" if measured and not coupled else recipe.allocation
    return replace(recipe, **{**changes, "knobs": {}}) if not easy else recipe.override(**changes)


def _of_recipe(recipe: Recipe, options: dict[str, Any]) -> Step:
    fields = {k: v for k, v in recipe.to_dict().items() if k != "method"}
    return Step("prune", {"method": "magnitude", **fields, **options})
