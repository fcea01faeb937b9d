"""Weights that another network generates: what MetaPruning and DHP share.

The model's own modules compute with weights that are handed in for one pass (`torch.func.functional_call`), so any
model whose channels the dependency analysis finds will do. What is left out is zero, which computes the same as a
smaller model: weights, biases and the scales and shifts of batch norms go together.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..calibrate import batches_of, recalibrate
from ..errors import RecipeError
from ..graph.trace import stored_tensors
from ..layers import located
from ..prune import prune
from ..recipe import Recipe
from ..structured import Target
from ..structured.plan import inputs
from .families import Families
from .space import Counts
from .subject import Bounds


class Channels:
    """Which unit of which family each position of each parameter belongs to.

    Attributes:
        subject: the families of the model as a space.
        convolutions: names of the weights that are generated: those of ungrouped convolutions.
        places: parameter -> axis -> (family of each position, -1 for none; its unit in there).
    """

    def __init__(self, model: nn.Module, subject: Families) -> None:
        self.model, self.subject = model, subject
        found = subject.found
        self.places: dict[str, dict[int, tuple[Tensor, Tensor]]] = {}
        for number, family in enumerate(subject.families):
            for slot in (found.slots[i] for i in family.slots):
                axes = self.places.setdefault(slot.names[0], {})
                size = slot.tensor.shape[slot.axis]
                fresh = torch.full((size,), -1), torch.zeros(size, dtype=torch.long)
                owner, unit = axes.setdefault(slot.axis, fresh)
                for k, single in enumerate(family.units):
                    positions = torch.from_numpy(single.places[found.slots.index(slot)])
                    owner[positions], unit[positions] = number, k
        self.convolutions = [
            name
            for layer, name, _ in located(model)
            if layer.kind == "conv" and getattr(layer.module, "groups", 1) == 1
        ]
        if not self.convolutions:
            raise RecipeError("weights are generated for convolutions, and the model has none")

    def kept(self, name: str, axis: int, stay: Sequence[Tensor]) -> Tensor:
        """1 for each position of an axis that stays, 0 for others; ``stay`` says which units of each family do."""
        size = stored_tensors(self.model)[name].shape[axis]
        found = torch.ones(size)
        if axis in self.places.get(name, {}):
            owner, unit = self.places[name][axis]
            for number, units in enumerate(stay):
                mine = owner == number
                found[mine] = units[unit[mine]].float()
        return found

    def masked(self, parameters: Mapping[str, Tensor], stay: Sequence[Tensor]) -> dict[str, Tensor]:
        """Parameters with zeros for what does not stay."""
        found = {}
        for name, whole in parameters.items():
            tensor = whole
            for axis in self.places.get(name, {}):
                shape = [-1 if a == axis else 1 for a in range(tensor.dim())]
                tensor = tensor * self.kept(name, axis, stay).to(tensor).reshape(shape)
            found[name] = tensor
        return found

    def first(self, counts: Counts) -> list[Tensor]:
        """The first so many units of each family."""
        return [torch.arange(len(f)) < c for f, c in zip(self.subject.families, counts, strict=True)]


class Bound(nn.Module):
    """A model that computes with the parameters it is given; its own stay what they are."""

    def __init__(self, model: nn.Module, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        object.__setattr__(self, "_inner", model)
        object.__setattr__(self, "_given", parameters)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        inner: Any = self._inner
        given: Any = self._given
        buffers = {n: b.clone() for n, b in inner.named_buffers()}
        return functional_call(inner, {**given, **buffers}, args, kwargs)


def prepared(
    model: nn.Module, data: Any, target: str | None, example: Any, multiple: int, low: float,
    bounds: Mapping[str, Sequence[float]] | None, sparsity: float, seed: int,
) -> tuple[nn.Module, Channels, list[Any]]:  # fmt: skip
    """A copy of the model, its channels, and batches to train on."""
    batches = batches_of(data)
    if example is None:
        raise RecipeError("channels are found by one forward pass: give inputs for it with example=")
    twin = copy.deepcopy(model)
    recipe = Recipe.of("group-norm", sparsity=sparsity, seed=seed, recovery="none", allocation="uniform")
    subject = Families(
        twin, recipe, target=None if target is None else Target.parse(target), example=inputs(example), data=None,
        loss=None, bounds=Bounds.read(low, bounds), multiple=multiple,
    )  # fmt: skip
    return twin, Channels(twin, subject), batches


@torch.no_grad()
def write(model: nn.Module, parameters: Mapping[str, Tensor]) -> None:
    """Store parameters in a model, in place."""
    stored = stored_tensors(model)
    for name, tensor in parameters.items():
        stored[name].copy_(tensor)


def smaller(
    model: nn.Module, recipe: Recipe, parameters: Mapping[str, Tensor], batches: Iterable[Any], example: Any,
    multiple: int,
) -> nn.Module:  # fmt: skip
    """The model that holds these parameters without their zeros, proven, with batch norms measured on the batches."""
    write(model, parameters)
    recalibrate(model, list(batches))
    small: nn.Module = prune(model, recipe, example=example, multiple=multiple).shrink()
    return small
