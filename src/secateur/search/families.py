"""A model whose families of coupled units are searched: channels, neurons, heads, widths."""

from __future__ import annotations

from typing import Any

from torch import nn

from .. import granularity
from ..calibrate import Loss, batches_of, evidence_of
from ..errors import ModelError, RecipeError
from ..layers import find_layers, located
from ..recipe import Recipe
from ..registry import get
from ..structured import StructuredPlan, Target, plan_structured
from ..structured.allocate import ALLOCATIONS, gone, meet, names_of, sizes
from ..structured.choose import keep_divisible
from ..structured.make import Case
from ..structured.plan import zero
from ..structured.score import Probes
from ..surgery.shrink import kept_by_name
from ..units import plan_coupled
from .describe import Example, edges_of_families, facts_of
from .space import Counts, Node, Space
from .subject import Bounds, table_of


class Families:
    """The families of a model as nodes of a space, and how counts are put on them as masks.

    A family whose cut is not proven, or that the recipe may not cut, is no node and stays whole.

    Attributes:
        space: what may stay of each family.
        total: what the whole model costs.
        quantity: ``params``, ``flops`` or ``bytes``.

    Raises:
        RecipeError: the target cannot be counted, or the recipe is not one of units.
        ModelError: nothing can be cut.
    """

    def __init__(
        self, model: nn.Module, recipe: Recipe, *, target: Target | None, example: Example, data: Any,
        loss: Loss | None, bounds: Bounds, multiple: int = 8,
    ) -> None:  # fmt: skip
        self.model, self.recipe, self._example = model, recipe, example
        self._data, self._loss, self._multiple = data, loss, multiple
        pattern = granularity.parse(recipe.granularity)
        self.target = target or Target.parse(f"params {100 * recipe.sparsity:g}%")
        recipe.check(data=data is not None, loss=loss is not None)
        inputs = example[1] or example[0]
        self.case = Case(model, recipe, inputs)
        if self.target.quantity not in self.case.counted:
            raise RecipeError(
                f"a search meets a target that can be counted ({', '.join(self.case.counted)}): not '{self.target}'"
            )
        self._heals = get("recovery", recipe.recovery).facts.get("data") == "units" and data is not None
        known: list[dict[str, Any]] = []

        def evidence(probes: Probes) -> dict[str, Any]:
            if not known:
                batches = batches_of(data) if recipe.needs_data else []
                layers = find_layers(model)[0]
                measured = evidence_of(model, recipe, layers, batches, loss, probes.directions()) if batches else {}
                known.append(measured)
            return known[0]

        where = pattern.coupled
        start = recipe.override(allocation="uniform") if recipe.allocation == "explicit" else recipe
        plan = plan_structured(
            model, start, target=self.target, example=inputs, evidence=evidence, multiple=multiple, where=where
        )
        if not plan.kept:
            raise ModelError("nothing can be removed: " + "; ".join(plan.notes or ["no family is free"]))
        self.found = self.case.found
        keep_divisible(self.found, model)
        scores, _ = self.case.scores(model, evidence, where)
        active = [i for i, family in enumerate(plan.families) if not family.reason]
        self.families = [self.found.families[i] for i in active]
        self.scores = [scores[i] for i in active]
        self.quantity = self.target.quantity
        self._count = self.case.counted[self.quantity]
        self.total = float(self._count(frozenset()))
        limit = self.target.remaining(self.total)
        edges, first = edges_of_families(model, self.found, self.families)
        layers = find_layers(model)[0]
        by_parameter = {name: layer.name for layer, name, _ in located(model)}
        facts = facts_of(model, layers, example)
        names = names_of(self.found.families)
        nodes = []
        for i, family, weight in zip(active, self.families, first, strict=True):
            own = [n for s in family.slots for n in self.found.slots[s].names]
            called = [names[i], *own, *(n.rpartition(".")[0] for n in own)]
            low, high = bounds.of(called, limit / self.total)
            allowed = sizes(family, multiple)
            inside = [s for s in allowed if low * len(family) - 1e-9 <= s <= high * len(family) + 1e-9]
            above = next((s for s in allowed if s >= low * len(family)), allowed[-1])
            nodes.append(Node(names[i], len(family), inside or [above], facts.get(by_parameter.get(weight, ""), {})))
        self._costs: dict[Counts, float] = {}
        self.space = Space(tuple(nodes), self._cost, limit, edges=lambda: edges)

    def _cost(self, counts: Counts) -> float:
        if counts not in self._costs:
            self._costs[counts] = float(self._count(self._labels(counts)))
        return self._costs[counts]

    def _labels(self, counts: Counts) -> frozenset[int]:
        return gone(self.families, self.scores, counts)

    def own(self) -> list[float]:
        """What the recipe's own allocation keeps of each family."""
        _, counts = meet(self.families, self.scores, self.target, self.recipe.allocation, self._multiple, self._count)
        return [c / len(f) for c, f in zip(counts, self.families, strict=True)]

    @property
    def starts_from_own(self) -> bool:
        """Whether the recipe's allocation is one that `own` can give, other than uniform."""
        return self.recipe.allocation in ALLOCATIONS and self.recipe.allocation != "uniform"

    def found_sparsity(self, counts: Counts) -> float:
        """Share of the parameters that goes, rounded down so that a plan at that target finds it met."""
        count = self.case.counted["params"]
        share = 1.0 - count(self._labels(counts)) / count(frozenset())
        return max(1e-4, int(share * 1e4) / 1e4)

    def recipe_of(self, counts: Counts) -> Recipe:
        """The recipe that keeps these counts."""
        table = table_of(self.space, counts)
        return self.recipe.override(
            allocation="explicit", sparsity=self.found_sparsity(counts), knobs={"allocation": {"table": table}}
        )

    def apply(self, counts: Counts) -> None:
        """Set to zero, in place, what goes; what stays is healed where the recipe says how and data was given."""
        if not self._heals:
            zero(self.model, kept_by_name(self.found, self._labels(counts)))
            return
        plan = plan_coupled(
            self.model, self.recipe_of(counts), target=str(self.target), example=self._example[1] or self._example[0],
            data=self._data, loss=self._loss, multiple=self._multiple,
        )  # fmt: skip
        assert isinstance(plan, StructuredPlan)
        plan.mask()
