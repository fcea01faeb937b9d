"""What a model reads while it is trained for integers: rounded weights, shared values, rounded activations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RecipeError
from ..formats import Grid, OnGrid, grid
from ..formats.grid import check_grid
from ..layers import Layer

#: Values that the survivors of a layer may share.
_VALUES = 256


class Rounded:
    """Layers whose weights lie on a grid after each step; zeros stay zero.

    Args:
        given: grids that stay as they are, by layer; any other is found anew each time. Where some are given, no other
            layers are rounded.
        activations: 8 to round what linear layers read, too; 0 not to.

    Raises:
        RecipeError: a layer cannot have such a grid.
    """

    def __init__(
        self, layers: Iterable[Layer], given: Mapping[str, OnGrid], bits: int, group: int, activations: int
    ) -> None:  # fmt: skip
        self._given = {n: g for n, g in given.items() if isinstance(g, Grid)}
        self._layers = [x for x in layers if not self._given or x.name in self._given]
        self._bits, self._group = bits, group
        if activations not in (0, 8):
            raise RecipeError(f"activations is {activations!r}: 8 rounds them to int8, 0 leaves them as they are")
        for layer in self._layers:
            if layer.name not in self._given:
                check_grid(layer.shape, layer.name, bits=bits, group=group)
        readers = (
            {id(x.module): x.module for x in self._layers if isinstance(x.module, nn.Linear)} if activations else {}
        )
        self._hooks = [m.register_forward_pre_hook(_read, with_kwargs=True) for m in readers.values()]

    def write(self) -> None:
        """Round the weights."""
        for layer in self._layers:
            weight, known = layer.weight().float(), self._given.get(layer.name)
            found = grid(weight, self._bits, self._group, clip="absmax") if known is None else known
            layer.write(found.round(weight))

    def close(self) -> None:
        """Linear layers read floats again."""
        for hook in self._hooks:
            hook.remove()


class Tied:
    """Layers whose weights share values, and go on sharing them.

    Attributes:
        cluster: layer -> which value each weight has, ``(o, i)``; -1 for zeros.

    Raises:
        RecipeError: a layer has too many values for that.
    """

    def __init__(self, layers: Iterable[Layer]) -> None:
        self._layers, self.cluster = list(layers), dict[str, Tensor]()
        for layer in self._layers:
            weight = layer.weight()
            values, place = torch.unique(weight[weight != 0], return_inverse=True)
            if len(values) > _VALUES:
                raise RecipeError(
                    f"{layer.name} has {len(values):,} values, and at most {_VALUES} can be shared: quantize it first "
                    "(--quantize shared:5)"
                )
            found = torch.full(layer.shape, -1, dtype=torch.int16, device=weight.device)
            found[weight != 0] = place.to(torch.int16)
            self.cluster[layer.name] = found

    def write(self) -> None:
        """Give all weights of a value the same one: what moved them may have rounded differently."""
        for layer in self._layers:
            weight, which = layer.weight(), self.cluster[layer.name].long()
            there = (which >= 0) & (weight != 0)
            place = which[there]
            if not place.numel():
                continue
            count = torch.bincount(place)
            mean = torch.bincount(place, weight[there].double()) / count.clamp_min(1)
            new = torch.zeros_like(weight)
            new[there] = mean[place].to(weight.dtype)
            layer.write(new)

    def close(self) -> None:
        """Nothing is kept."""


def eight_bits(x: Tensor) -> Tensor:
    """Each token, along the last axis, rounded to int8 times a scale of its own; the gradient goes straight through.

    >>> eight_bits(torch.tensor([[127.0, 0.4, -63.6]])).tolist()
    [[127.0, 0.0, -64.0]]
    """
    given = x.detach().float()
    most = given.abs().amax(-1, keepdim=True)
    inverse = torch.where(most > 0, 127 / most, 0.0)
    found = (given * inverse).round() * (most / 127)
    return found.to(x.dtype) + (x - x.detach())


def _read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    change: Callable[[Any], Any] = lambda x: eight_bits(x) if isinstance(x, Tensor) else x  # noqa: E731
    return tuple(map(change, args)), {n: change(x) for n, x in kwargs.items()}
