"""Which order of steps can be: checked before any work, with the step that is wrong and the way out."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import RecipeError
from ..granularity import parse
from .steps import Step


def check_order(steps: Sequence[Step]) -> None:
    """Refuse an order in which a step would undo, or could not follow, an earlier one.

    Raises:
        RecipeError: with both steps, and what to do.
    """
    if not steps:
        raise RecipeError("a compound needs at least one step")
    first: dict[str, str] = {}
    for number, step in enumerate(steps, 1):
        here, takes = f"step {number} ({step})", step.takes
        if "tokens" in first:
            raise RecipeError(f"{here} comes after {first['tokens']}, which wraps the model: let that be the last step")
        if "integers" in first and "tokens" not in takes:
            _after_integers(here, step, first["integers"], "shared" in first)
        if "weights" in first:
            _after_weights(here, step, first["weights"])
        if step.kind == "recover" and "shared" in takes and "shared" not in first:
            raise RecipeError(f"{here} trains values that survivors share: write {{quantize: shared:5}} before it")
        for what in takes:
            first.setdefault(what, f"step {number} ({step})")


def _after_integers(here: str, step: Step, earlier: str, shared: bool) -> None:
    takes = step.takes
    if step.kind == "recover" and "integers" in takes and shared == ("shared" in takes):
        if given := {"bits", "group"} & set(step.options):
            raise RecipeError(f"{here} trains on the grids of {earlier}: leave {min(given)} out")
        return
    if "integers" in takes:
        raise RecipeError(
            f"{here} comes after {earlier}: weights are quantized once; {{recover: "
            f"{'codebooks' if shared else 'qat'}}} trains what they were rounded to"
        )
    if takes == {"training"}:
        raise RecipeError(
            f"{here} comes after {earlier} and would train weights off what they were rounded to: train before it, "
            f"or {{recover: {'codebooks' if shared else 'qat'}}}"
        )
    raise RecipeError(f"{here} comes after {earlier} and would move weights off their grid of integers: quantize last")


def _after_weights(here: str, step: Step, earlier: str) -> None:
    """What cannot keep the zeros of single weights."""
    takes = step.takes
    if "factors" in takes:
        raise RecipeError(f"{here} comes after {earlier}: factors do not keep its zeros; decompose first")
    if "units" in takes:
        recipe = step.recipe()
        if parse(recipe.granularity).whole:
            raise RecipeError(
                f"{here} comes after {earlier}: whole {recipe.granularity} go before single weights; change the order"
            )
        if recipe.recovery != "none":
            raise RecipeError(
                f"{here} comes after {earlier}, and its recovery '{recipe.recovery}' would fill the zeros of that: "
                "give it recovery: none, or put it first"
            )
    if step.kind == "prune" and "training" in takes:
        raise RecipeError(
            f"{here} comes after {earlier}, and a method that trains knows of no earlier masks: put it first, or prune "
            "by a method without training and add {recover: finetune}"
        )
