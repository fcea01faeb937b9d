"""What a recipe's parts must agree on, each refusal with the reason."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .errors import RecipeError
from .formats import parse_integers
from .granularity import Granularity
from .registry import get

if TYPE_CHECKING:
    from .recipe import Recipe

#: What criteria that score no single weights say under ``of``, and what they look at.
OF_UNITS = {
    "norm": "by the normalization behind them",
    "map": "by the feature maps that they are",
    "unit": "by what the loss does without them",
}


def check_parts(recipe: Recipe, pattern: Granularity) -> None:
    """Raise `RecipeError` where two parts of a recipe exclude each other.

    Args:
        pattern: the recipe's granularity.
    """
    if pattern.keep is not None:
        fixed = 1.0 - pattern.keep
        if abs(recipe.sparsity - fixed) > 1e-9:
            raise RecipeError(
                f"granularity '{pattern.name}' fixes the sparsity at {fixed:g}, but {recipe.sparsity:g} was asked "
                "for: leave the sparsity out"
            )
    for axis, part in recipe.parts().items():
        part.knobs_with(recipe.knobs.get(axis, {}))
    if unknown := {axis for axis, knobs in recipe.knobs.items() if knobs} - set(recipe.parts()):
        raise RecipeError(f"knobs for {sorted(unknown)}, but this recipe has parts on {sorted(recipe.parts())}")
    if "sparsity" in recipe.knobs.get("allocation", {}):
        raise RecipeError("sparsity is a field of the recipe, not a knob of its allocation: write sparsity=")
    if heals_units(recipe.recovery) and not pattern.coupled:
        raise RecipeError(
            f"recovery '{recipe.recovery}' heals a smaller model, and granularity '{pattern.name}' makes none: "
            "choose another recovery or none"
        )
    if recipe.embeddings != "none":
        parse_integers(recipe.embeddings)
        if recipe.recovery != "none" or recipe.driver != "once" or recipe.gate != "none" or pattern.coupled:
            raise RecipeError(
                "embeddings become integers, which no later step may move: recovery none, driver once, and no coupled "
                "units (shrink or train first, and quantize what that wrote)"
            )
    of = get("criterion", recipe.criterion).facts.get("of") if recipe.criterion is not None else None
    for kind, name in (("block", "depth"), ("expert", "experts")):
        if of == kind and pattern.coupled != name:
            raise RecipeError(
                f"criterion '{recipe.criterion}' ranks whole {kind}s: choose granularity {name}, or another criterion"
            )
    if of in ("token", "channel"):
        raise RecipeError(
            f"criterion '{recipe.criterion}' ranks the {of}s of one input: choose a method of run time, such as "
            f"{'tome' if of == 'token' else 'fbs'}"
        )
    if of in OF_UNITS and (pattern.whole or not pattern.coupled):
        raise RecipeError(f"criterion '{recipe.criterion}' ranks units {OF_UNITS[of]}: choose granularity coupled")
    solver = get("solver", recipe.solver)
    if recipe.gate != "none" and (recipe.criterion is not None or recipe.solver != "rank" or recipe.steps > 1):
        raise RecipeError(f"gate '{recipe.gate}' itself learns what stays: criterion None, solver rank, steps 1")
    if recipe.gate != "none":
        return
    if solver.facts.get("quantizes"):
        check_few(recipe, pattern)
    elif get("recovery", recipe.recovery).facts.get("trains") == "shared":
        raise RecipeError(
            f"recovery '{recipe.recovery}' trains values that survivors share, and solver '{recipe.solver}' leaves "
            "floats: add --quantize shared:5"
        )
    if "score" in solver.needs and recipe.criterion is None:
        raise RecipeError(f"solver '{recipe.solver}' ranks by a criterion: name one with --criterion")
    if "score" in measure_needs(recipe.allocation) and recipe.criterion is None:
        raise RecipeError(
            f"allocation '{recipe.allocation}' ranks by a criterion, and solver '{recipe.solver}' chooses by itself: "
            "name a criterion with --criterion"
        )
    if recipe.criterion is not None and not ranks(recipe.solver, recipe.allocation):
        raise RecipeError(
            f"solver '{recipe.solver}' chooses the mask by itself and allocation '{recipe.allocation}' does not rank: "
            f"criterion '{recipe.criterion}' would do nothing; leave it out"
        )
    if recipe.steps > 1 and recipe.solver != "rank" and not solver.facts.get("rounds"):
        raise RecipeError(f"solver '{recipe.solver}' works in one step: leave steps at 1, or use solver rank or obs")
    if recipe.control != "none" and (recipe.solver != "rank" or recipe.driver != "once" or pattern.coupled):
        raise RecipeError(f"control '{recipe.control}' is for one mask of weights (driver once) that solver rank makes")
    if not recipe.nested and pattern.coupled:
        raise RecipeError("units that an earlier round cut do not come back: leave nested at true")
    if recipe.steps > 1 and recipe.schedule == "one-shot":
        raise RecipeError("the one-shot schedule has one step; choose linear, cubic or geometric for more")


def check_few(recipe: Recipe, pattern: Granularity) -> None:
    """Refuse what would move weights off the few values that a solver leaves them."""
    shares = get("solver", recipe.solver).facts.get("shares") == recipe.solver
    heals = "codebooks" if shares else "qat"
    if recipe.recovery not in ("none", heals) or recipe.driver != "once" or pattern.coupled:
        raise RecipeError(
            f"solver '{recipe.solver}' leaves {'shared values' if shares else 'integers'}, which no later step may "
            f"move: recovery none, or {heals} on a task, driver once, and no coupled units (shrink or train first, and "
            "quantize what that wrote)"
        )
    given = set(recipe.knobs.get("recovery", {})) & {"bits", "group"}
    if heals == recipe.recovery and given:
        raise RecipeError(
            f"recovery 'qat' trains on the grids that solver '{recipe.solver}' finds: leave recovery.{min(given)} out"
        )


def heals_units(recovery: str) -> bool:
    """Whether a recovery heals what a smaller model lost."""
    return get("recovery", recovery).facts.get("data") == "units"


def measure_needs(allocation: str) -> tuple[str, ...]:
    """The facts that an allocation measures of each layer."""
    measure = get("allocation", allocation).facts.get("measure")
    return tuple(measure.__code__.co_varnames[: measure.__code__.co_argcount]) if measure else ()


def ranks(solver: str, allocation: str) -> bool:
    """Whether a solver or an allocation looks at the criterion's scores."""
    measure = get("allocation", allocation).facts.get("measure")
    names = measure.__code__.co_varnames[: measure.__code__.co_argcount] if measure else ()
    return "score" in get("solver", solver).needs or "score" in names
