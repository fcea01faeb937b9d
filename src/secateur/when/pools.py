"""What a penalty looks at, as pools ``(pools, units, elements)`` that can be read with gradient and written back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .. import granularity
from ..allocation import Sketch
from ..errors import ModelError, RecipeError
from ..granularity import Granularity
from ..graph import Dependencies
from ..layers import Layer, located
from ..learned.gated import form_of, wide
from ..recipe import Recipe
from ..registry import get
from ..solve import allocate, layer_facts
from ..structured import Target
from ..structured.allocate import meet
from ..structured.choose import chosen
from ..structured.make import Case


class Pool(Protocol):
    """Units that compete, wherever their weights lie."""

    @property
    def name(self) -> str:
        """What messages and saved states call it."""

    @property
    def parameters(self) -> Sequence[nn.Parameter]:
        """Whose weights it holds."""

    def read(self) -> Tensor:
        """``(pools, units, elements)``, in float32 or better; gradients reach the parameters."""

    def write(self, x: Tensor) -> None:
        """The inverse of `read`, in place."""


@dataclass(frozen=True, eq=False)
class MatrixPool:
    """The units of a granularity in one matrix."""

    name: str
    form: Layer
    whole: nn.Parameter
    pattern: Granularity

    @staticmethod
    def of(layer: Layer, pattern: Granularity) -> MatrixPool:
        """The pool of a layer."""
        return MatrixPool(layer.name, form_of(layer), getattr(layer.module, layer.parameter), pattern)

    @property
    def parameters(self) -> Sequence[nn.Parameter]:
        return (self.whole,)

    def _stored(self) -> Tensor:
        return self.whole if self.form.index is None else self.whole[self.form.index]

    def read(self) -> Tensor:
        return self.pattern.split(wide(self.form.to_oi(self._stored())))

    @torch.no_grad()
    def write(self, x: Tensor) -> None:
        stored = self._stored()
        stored.copy_(self.form.from_oi(self.pattern.join(x, self.form.shape)).to(stored.dtype))


@dataclass(frozen=True, eq=False)
class Part:
    """Where units lie in one parameter: ``places`` ``(units, positions of each)`` along ``axis``."""

    whole: nn.Parameter
    axis: int
    places: Tensor
    owner: tuple[nn.Module, str] | None = None


@dataclass(frozen=True, eq=False)
class UnitPool:
    """Units that lie in several parameters, a family of the dependency analysis; or the scales of a normalization."""

    name: str
    parts: tuple[Part, ...]

    @property
    def parameters(self) -> Sequence[nn.Parameter]:
        return [p.whole for p in self.parts]

    def read(self) -> Tensor:
        found = [wide(p.whole.movedim(p.axis, 0)[p.places.to(p.whole.device)]).flatten(1) for p in self.parts]
        return torch.cat(found, 1)[None]

    @torch.no_grad()
    def write(self, x: Tensor) -> None:
        first = 0
        for part in self.parts:
            line = part.whole.movedim(part.axis, 0)
            units, each = part.places.shape
            size = each * (line[0].numel() if line.dim() > 1 else 1)
            values = x[0, :, first : first + size].reshape(units * each, *line.shape[1:])
            line.index_copy_(0, part.places.reshape(-1).to(line.device), values.to(line.dtype))
            first += size


@dataclass(frozen=True, eq=False)
class Units:
    """Families of units of a model: the pools, what makes each unit, and how many would stay.

    Attributes:
        keeps: the fraction of each pool by the norms of its units.
        counts: how many units of each pool stay by other scores, within the same target.
    """

    pools: tuple[UnitPool, ...]
    makers: tuple[UnitPool, ...]
    keeps: dict[str, float]
    counts: Callable[[Sequence[NDArray[np.float64]]], list[int]]

    @property
    def density(self) -> float:
        """The share of the weights in the pools whose units stay, by their norms."""
        sizes = {p.name: p.read().numel() for p in self.pools}
        return sum(self.keeps[n] * size for n, size in sizes.items()) / sum(sizes.values())


def scale_pools(model: nn.Module, penalty: str) -> list[Pool]:
    """The scales of all batch normalizations.

    Raises:
        ModelError: there are none.
    """
    pools: list[Pool] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and isinstance(module.weight, nn.Parameter):
            places = torch.arange(len(module.weight))[:, None]
            pools.append(UnitPool(f"{name}.weight" if name else "weight", (Part(module.weight, 0, places),)))
    if not pools:
        raise ModelError(f"penalty '{penalty}' works on the scales of batch normalizations, and this model has none")
    return pools


def allocated(
    recipe: Recipe, layers: Sequence[Layer], scores: Mapping[str, Tensor], sparsity: float
) -> dict[str, float]:
    """What each layer keeps by the recipe's allocation, which may rank by these scores ``(o, i)``.

    Raises:
        RecipeError: the allocation looks at something else.
    """
    measure = get("allocation", recipe.allocation).facts.get("measure")
    facts = {}
    for layer in layers:
        sketch = None
        if measure is not None:
            names = measure.__code__.co_varnames[: measure.__code__.co_argcount]
            if unknown := set(names) - {"score", "weight"}:
                raise RecipeError(
                    f"allocation '{recipe.allocation}' needs {sorted(unknown)[0]}, which a training run does not show: "
                    "choose uniform, erk or global"
                )
            sketch = Sketch(measure(*[scores[layer.name] for _ in names]))
        facts[layer.name] = layer_facts(layer, None, sketch)
    return allocate(recipe, facts, sparsity)


def find_units(
    model: nn.Module, recipe: Recipe, example: object, target: str | None = None, multiple: int = 8
) -> Units:  # fmt: skip
    """The families that the recipe may cut, by one forward pass of the example.

    ``pools`` hold the weights that the granularity counts, ``makers`` all that makes a unit: its weights, biases and
    the scale and shift behind it, whose zeros make its output zero.

    Args:
        target: see `structured.Target`; without it the recipe's sparsity is the share of the parameters that goes.
        multiple: sizes that remain are multiples of it.

    Raises:
        ModelError: nothing can be cut.
        RecipeError: the target is in what can only be measured.
    """
    where = granularity.parse(recipe.granularity).coupled
    case = Case(model, recipe, example)
    found = case.found
    owners = {
        id(p): (m, k) for m in model.modules() for k, p in m.named_parameters(recurse=False, remove_duplicate=False)
    }
    known = dict(model.named_parameters(remove_duplicate=False))
    outputs = {name: output for _, name, output in located(model)}
    active, _ = chosen(found, recipe, model, case.remade)
    pools: list[UnitPool] = []
    makers: list[UnitPool] = []
    kept: list[int] = []
    for number in active:
        family = found.families[number]
        weights: dict[str, list[Part]] = {"output": [], "input": []}
        vectors: list[Part] = []
        for s in family.slots:
            slot = found.slots[s]
            name = next((n for n in slot.names if n in known), None)
            if name is None:  # a buffer
                continue
            part = Part(known[name], slot.axis, torch.from_numpy(np.ascontiguousarray(family.places(s))),
                        owners[id(known[name])])  # fmt: skip
            matrix = next((n for n in slot.names if n in outputs), None)
            if matrix is None:
                vectors.append(part)
            else:
                weights["output" if slot.axis == outputs[matrix] else "input"].append(part)
        everything = [*weights["output"], *weights["input"]]
        counted = everything if where == "coupled" else weights[where] or everything
        if counted:
            name = family.name if family.name not in {p.name for p in pools} else f"{family.name} ({number})"
            kept.append(number)
            pools.append(UnitPool(name, tuple(counted)))
            makers.append(UnitPool(name, (*weights["output"], *vectors) or tuple(counted)))
    if not pools:
        raise ModelError("no channel, neuron or head of this model can be cut (see 'secateur plan')")
    scores = [p.read().detach().square().sum(-1).sqrt()[0].double().cpu().numpy() for p in pools]
    goal = None
    if target is not None or recipe.sparsity:
        goal = Target.parse(target if target is not None else f"params {100 * recipe.sparsity:g}%")
    measured = found.parameters if goal is None else case.counting(goal)
    families = [found.families[i] for i in kept]
    _forget(found)

    def counts(scores: Sequence[NDArray[np.float64]]) -> list[int]:
        if goal is None:
            return [len(f) for f in families]
        return meet(families, scores, goal, recipe.allocation, multiple, measured)[1]

    keeps = {p.name: c / len(f) for p, c, f in zip(pools, counts(scores), families, strict=True)}
    return Units(tuple(pools), tuple(makers), keeps, counts)


def _forget(found: Dependencies) -> None:
    """Let go of the copy of the model that was analysed: to count, shapes are enough."""
    shapes: dict[int, Tensor] = {}
    for s in found.slots:
        bare = torch.empty_like(s.tensor, device="meta", requires_grad=False)
        shapes[id(s.tensor)] = nn.Parameter(bare) if s.is_parameter else bare
    found.trace.slots[:] = [replace(s, tensor=shapes[id(s.tensor)]) for s in found.slots]
    found.trace.outputs.clear()
