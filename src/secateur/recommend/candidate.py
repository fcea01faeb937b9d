"""What a rule sees of a method: its recipe, fitted to a situation, and facts that follow from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from ..granularity import parse
from ..recipe import SHAPES, Recipe
from ..registry import Part, get

#: What goes together, from the finest to the coarsest.
STRUCTURES = ("weights", "pattern", "block", "units", "depth", "experts")


#: How much each axis says of how a recipe acts, where recipes are compared.
AXES = {
    "criterion": 3.0, "structure": 3.0, "driver": 3.0, "gate": 3.0, "allocation": 2.0, "solver": 2.0, "recovery": 2.0,
    "penalty": 2.0, "schedule": 1.0, "steps": 1.0, "hold": 1.0, "control": 1.0, "nested": 0.5, "granularity": 0.5,
}  # fmt: skip
#: A recipe as it is compared: for each axis what stands on it, and its knobs.
Profile = tuple[tuple[Any, str], ...]


@dataclass(frozen=True)
class Aim:
    """What a recipe is asked to reach.

    Attributes:
        structure: what goes together, one of `STRUCTURES`.
        quantity: what is counted: ``weights``, or what a target of units counts (``flops``, ``params``, ...).
        keep: the share of it that stays.
    """

    structure: str
    quantity: str
    keep: float

    @property
    def text(self) -> str:
        """As a study writes it: ``0.7``, ``2:4`` or ``flops 50%``.

        >>> Aim("weights", "weights", 0.3).text, Aim("units", "flops", 0.4).text
        ('0.7', 'flops 60%')
        """
        gone = 1 - self.keep
        return f"{gone:.4g}" if self.quantity == "weights" else f"{self.quantity} {100 * gone:.4g}%"


@dataclass(frozen=True)
class Expected:
    """A number that is expected, and where it is from.

    Attributes:
        value: the middle; None where it is not known.
        low, high: of the interval; None where there is none.
        source: what it rests on.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    source: str = "not known"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {"value": self.value, "low": self.low, "high": self.high, "source": self.source}


@dataclass(frozen=True)
class Candidate:
    """A method, as it would be used.

    Attributes:
        name: of the method, or of a study's contender.
        recipe: fitted to the situation.
        when: ``before``, ``during`` or ``after`` training.
        family: of the method.
        granularities: that the method is meant for.
        aim: what the recipe is asked to reach.
        speed: what the goal's latency becomes, as times as fast.
        unreached: why the goal cannot be reached this way; empty where it can.
    """

    name: str
    recipe: Recipe
    when: str = "after"
    family: str = ""
    granularities: tuple[str, ...] = ()
    aim: Aim = Aim("weights", "weights", 0.5)
    speed: Expected = field(default_factory=lambda: Expected(None))
    unreached: str = ""

    @staticmethod
    def of(part: Part) -> Candidate:
        """A registered method as it is."""
        facts = part.facts
        return Candidate(part.name, facts["recipe"], facts["when"], facts["family"], tuple(facts["granularities"]))

    def fitted(self, **recipe: Any) -> Candidate:
        """The same with another granularity, sparsity, ..."""
        return replace(self, recipe=self.recipe.override(**recipe))

    @property
    def quantizes(self) -> bool:
        """Whether its weights become integers."""
        return bool(get("solver", self.recipe.solver).facts.get("quantizes"))

    @property
    def structure(self) -> str:
        """What goes together, one of `STRUCTURES`."""
        return structure_of(self.recipe.granularity)

    @cached_property
    def profile(self) -> Profile:
        """What of its recipe is compared with others."""
        return profile(self.recipe)

    @property
    def needs(self) -> frozenset[str]:
        """Evidence that data must supply."""
        return self.recipe.needs()

    @property
    def needs_loss(self) -> bool:
        """Whether it takes data on which the loss can be computed."""
        return self.recipe.needs_loss or self.trains

    @property
    def needs_inputs(self) -> bool:
        """Whether it takes data, with labels or without; the shape of an input is no data."""
        return bool(self.needs - SHAPES)

    @property
    def recovery(self) -> str:
        """What the recovery works on: nothing, ``block``, ``units`` or ``task``."""
        return str(get("recovery", self.recipe.recovery).facts.get("data", ""))

    @property
    def trains(self) -> bool:
        """Whether it is part of a training run."""
        r = self.recipe
        return self.when in ("before", "during") or r.learns or r.driver != "once" or self.recovery == "task"

    @property
    def from_scratch(self) -> bool:
        """Whether weights that were trained before are of no use to it."""
        rewinds = self.recipe.recovery == "rewind" and bool(self.recipe.knobs_of("recovery").get("weights"))
        sparse_from_the_start = get("driver", self.recipe.driver).facts.get("survey") == "B2.2"
        return self.when == "before" or rewinds or (sparse_from_the_start and self.recipe.schedule == "one-shot")

    @property
    def runs(self) -> float:
        """How many training runs of full length it takes, beside the one that made the dense model."""
        if not self.trains:
            return 0.0
        knobs = self.recipe.knobs_of("recovery")
        if self.recovery == "task":
            each = float(knobs.get("length", 1.0 - float(knobs.get("to", 0.0))))
            own = 1.0 if self.when != "after" or self.recipe.learns or self.recipe.driver != "once" else 0.0
            return own + self.recipe.steps * each
        return 1.0


def structure_of(granularity: str) -> str:
    """What goes together in a granularity.

    >>> [structure_of(g) for g in ("row", "2:4", "block(1,4)", "channel", "depth")]
    ['weights', 'pattern', 'block', 'units', 'depth']
    """
    pattern = parse(granularity)
    if pattern.coupled:
        return str(pattern.coupled) if pattern.coupled in STRUCTURES else "units"
    if pattern.keep is not None:
        return "pattern"
    return "block" if pattern.name.startswith("block") else "weights"


def profile(recipe: Recipe) -> Profile:
    """What of a recipe is compared. Sparsity, seed and which layers are not."""
    found = []
    for axis in AXES:
        on = structure_of(recipe.granularity) if axis == "structure" else getattr(recipe, axis)
        found.append((on, repr(sorted((recipe.knobs.get(axis) or {}).items()))))
    return tuple(found)


def contender(label: str, recipe: Mapping[str, Any]) -> Candidate | None:
    """What a study calls a contender, as a candidate; None where its recipe is not understood here."""
    from ..errors import SecateurError
    from ..registry import parts

    try:
        made = Recipe.from_dict(recipe)
    except (SecateurError, TypeError):
        return None
    shelf = parts("method")
    if made.method in shelf:
        return replace(Candidate.of(shelf[made.method]), name=label, recipe=made)
    return Candidate(label, made, "during" if made.learns or made.driver != "once" else "after")
