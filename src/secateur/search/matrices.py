"""A model whose layers are searched one by one: single weights, rows, N:M and blocks."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import nn

from .. import granularity
from ..calibrate import Loss, batches_of, evidence_of
from ..errors import RecipeError
from ..layers import find_layers, located
from ..prune import prune
from ..recipe import Recipe
from ..solve import allocate, layer_facts, sketch_layer, solve_layer
from ..stream import find_blocks
from ..structured import Target
from ..structured.make import Case
from .describe import Example, edges_of_layers, facts_of, operations_of
from .space import Counts, Node, Space, bounded
from .subject import Bounds, table_of


class Matrices:
    """The layers of a model as nodes of a space, and how counts are put on them.

    Attributes:
        space: what may stay of each layer. A count is of units in each pool.
        total: of all weights of the layers, or of the operations of the model.
        quantity: ``weights``, or ``flops`` that a kernel without zeros would take.
    """

    def __init__(
        self, model: nn.Module, recipe: Recipe, *, target: Target | None, example: Example | None, data: Any,
        loss: Loss | None, bounds: Bounds,
    ) -> None:  # fmt: skip
        self.model, self.recipe, self._data, self._loss, self._example = model, recipe, data, loss, example
        blocks = find_blocks(model)
        self._paths = [] if blocks is None else blocks.paths()
        self.layers, _ = find_layers(model, recipe.only, recipe.skip, self._paths or None)
        recipe.check(self.layers, data=data is not None, loss=loss is not None)
        pattern = granularity.parse(recipe.granularity)
        # Evidence does not change while the model is as it was; what a block gives on to the next one does.
        self._whole = recipe.recovery == "none" and not (recipe.needs_data and blocks is not None)
        batches = batches_of(data) if self._whole and recipe.needs_data else []
        self._evidence: dict[str, Any] = {}
        if self._whole:
            self._evidence = evidence_of(model, recipe, self.layers, batches, loss)
        facts = facts_of(model, self.layers, example)
        sizes = [pattern.pool_shape(*x.shape) for x in self.layers]
        weights = [float(pools * elements) for pools, _, elements in sizes]
        self.quantity, fixed = "weights", 0.0
        self.total = float(sum(x.numel for x in self.layers))
        limit = float(round((1.0 - recipe.sparsity) * self.total))
        prices = weights
        if target is not None:
            if target.quantity != "flops" or example is None:
                raise RecipeError(
                    f"granularity '{recipe.granularity}' takes a sparsity, or a target in FLOPs with an example: not "
                    f"'{target}'"
                )
            operations = operations_of(model, example)
            if unknown := [x.name for x in self.layers if not operations.get(x.name)]:
                raise RecipeError(
                    f"the operations of {unknown[0]} cannot be told apart: skip it (--skip {unknown[0]}), or search "
                    "at a sparsity"
                )
            self.quantity, self.total = "flops", float(operations[""])
            limit = target.remaining(self.total)
            prices = [w * operations[x.name] / x.numel for w, x in zip(weights, self.layers, strict=True)]
            fixed = self.total - sum(operations[x.name] for x in self.layers)
        share = max(0.0, limit - fixed) / (self.total - fixed)
        nodes = []
        for layer, (_, units, _) in zip(self.layers, sizes, strict=True):
            low, high = bounds.of([layer.name], share)
            nodes.append(Node(layer.name, units, bounded(1, units, 1, low, high), facts[layer.name]))
        self.space = Space(tuple(nodes), partial(_linear, tuple(prices), fixed), limit, tuple(prices), self._edges)

    def _edges(self) -> list[tuple[int, int]]:
        if self._example is None:
            raise RecipeError("strategy 'graph' follows one forward pass: give inputs for it with example=")
        args, kwargs = self._example
        found = Case(self.model, Recipe(), kwargs or args).found
        names = {id(x.module): name for x, name, _ in located(self.model)}
        return edges_of_layers(self.model, found, [names.get(id(x.module), x.name) for x in self.layers])

    def own(self) -> list[float]:
        """What the recipe's own allocation keeps of each layer.

        Raises:
            RecipeError: it looks at what only the pass over the blocks of a language model measures.
        """
        facts = {}
        for x in self.layers:
            block = next((p for p in self._paths if x.name.startswith(f"{p}.")), None)
            if not self._whole:
                raise RecipeError(f"allocation '{self.recipe.allocation}' is not a start for this search")
            facts[x.name] = layer_facts(x, block, sketch_layer(x, self.recipe, self._evidence.get(x.name), True))
        keeps = allocate(self.recipe, facts)
        return [keeps[x.name] for x in self.layers]

    @property
    def starts_from_own(self) -> bool:
        """Whether the recipe's allocation is one that `own` can give, other than uniform."""
        return self._whole and self.recipe.allocation not in ("uniform", "explicit")

    def recipe_of(self, counts: Counts) -> Recipe:
        """The recipe that keeps these counts."""
        fields: dict[str, Any] = {}
        if granularity.parse(self.recipe.granularity).keep is None:
            kept = sum(c / n.units * x.numel for c, n, x in zip(counts, self.space.nodes, self.layers, strict=True))
            fields["sparsity"] = max(0.0, 1.0 - kept / sum(x.numel for x in self.layers))
        table = table_of(self.space, counts)
        return self.recipe.override(allocation="explicit", knobs={"allocation": {"table": table}}, **fields)

    def apply(self, counts: Counts) -> None:
        """Prune the model in place."""
        if not self._whole:
            prune(self.model, self.recipe_of(counts), data=self._data, loss=self._loss)
            return
        evidence: Mapping[str, Any] = self._evidence
        for layer, node, count in zip(self.layers, self.space.nodes, counts, strict=True):
            solve_layer(layer, self.recipe, count / node.units, evidence=evidence.get(layer.name))


def _linear(prices: tuple[float, ...], fixed: float, counts: Counts) -> float:
    return fixed + sum(p * c for p, c in zip(prices, counts, strict=True))
