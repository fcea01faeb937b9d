"""What a search does to a model: bounds by name, the table of the result, and putting everything back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Protocol

import torch
from torch import nn

from ..errors import RecipeError
from ..graph.trace import stored_tensors
from ..recipe import Recipe
from .space import Counts, Space


class Subject(Protocol):
    """A model as a search sees it."""

    model: nn.Module
    recipe: Recipe
    space: Space
    quantity: str
    total: float

    @property
    def starts_from_own(self) -> bool:
        """Whether the recipe's own allocation is a proposal of its own."""
        ...

    def own(self) -> list[float]:
        """What the recipe's own allocation keeps of each node."""
        ...

    def recipe_of(self, counts: Counts) -> Recipe:
        """The recipe that keeps these counts."""
        ...

    def apply(self, counts: Counts) -> None:
        """Prune the model in place."""
        ...


@dataclass(frozen=True)
class Bounds:
    """How little and how much of a node may stay.

    Attributes:
        low: as a share of what a uniform allocation keeps.
        table: glob over names -> the smallest and the largest keep.
    """

    low: float
    table: Mapping[str, Sequence[float]]

    @staticmethod
    def read(low: float, table: Mapping[str, Sequence[float]] | None) -> Bounds:
        """Check what a user gave.

        Raises:
            RecipeError: it is no pair of fractions.
        """
        if not 0.0 <= low <= 1.0:
            raise RecipeError(f"low is the share of a uniform keep that any layer has at least, in [0, 1], not {low}")
        for name, pair in (table or {}).items():
            if len(pair) != 2 or not 0.0 <= pair[0] <= pair[1] <= 1.0:
                raise RecipeError(f"bounds of '{name}' are two keeps in [0, 1], the smaller first, not {pair!r}")
        return Bounds(low, dict(table or {}))

    def of(self, names: Iterable[str], share: float) -> tuple[float, float]:
        """The bounds of what has these names, where a uniform allocation keeps ``share``."""
        found = (self.low * share, 1.0)
        for pattern, pair in self.table.items():
            if any(fnmatchcase(n, pattern) or fnmatchcase(n, f"*.{pattern}") for n in names):
                found = (float(pair[0]), float(pair[1]))
        return found


def table_of(space: Space, counts: Counts) -> dict[str, float]:
    """The table of the allocation ``explicit``: the sparsity of each node, to ten digits."""
    return {n.name: round(1.0 - c / n.units, 10) for n, c in zip(space.nodes, counts, strict=True)}


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Whatever happens inside, the model is bit by bit what it was: values, gradients, modes, batch-norm statistics.

    Costs one copy of the model.
    """
    before = {name: tensor.detach().clone() for name, tensor in stored_tensors(model).items()}
    objects = dict(stored_tensors(model))
    gradients = {id(p): None if p.grad is None else p.grad.detach().clone() for p in model.parameters()}
    modes = [(module, module.training) for module in model.modules()]
    norms = [(m, m.momentum) for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    try:
        yield
    finally:
        now = stored_tensors(model)
        with torch.no_grad():
            for name, tensor in objects.items():
                if now.get(name) is not tensor:  # a module may hang up another one, as some do in training
                    owner = model.get_submodule(name.rpartition(".")[0])
                    setattr(owner, name.rpartition(".")[2], tensor)
                tensor.detach().copy_(before[name])
        for parameter in model.parameters():
            if id(parameter) in gradients:
                parameter.grad = gradients[id(parameter)]
        for module, training in modes:
            module.training = training
        for norm, momentum in norms:
            norm.momentum = momentum
