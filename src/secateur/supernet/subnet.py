"""Sub-networks: modules of their own sizes that compute with the weights of the whole model."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..graph.state import duplicate
from ..graph.trace import stored_tensors
from ..search.space import Counts
from ..surgery.prove import twin
from .cut import Cut, made, resized, shared
from .elastic import Elastic
from .kernels import add_matrices, center, name_of, remove_matrices

#: Sub-networks whose modules are kept for the next step that has the same.
_KEPT = 16


class SubNetwork(nn.Module):
    """Modules of a sub-network's sizes that run with given tensors, through which gradients reach the whole model."""

    def __init__(self, shell: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        object.__setattr__(self, "_shell", shell)
        object.__setattr__(self, "_tensors", tensors)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        shell: Any = self._shell
        given: Any = self._tensors
        shell.train(self.training)
        return functional_call(shell, dict(given), args, kwargs)


class Supernet:
    """A model while it is trained as all of its sub-networks.

    Matrices of elastic kernels are parameters of its convolutions from here on, until `close`.

    Args:
        elastic: of the model, or of another one of the same kind.
    """

    def __init__(self, model: nn.Module, elastic: Elastic) -> None:
        self.model, self.elastic = model, elastic
        self._blank = twin(model, meta=True)
        self._shells: OrderedDict[Counts, tuple[Cut, nn.Module]] = OrderedDict()
        add_matrices(model, elastic.kernels)

    def _shell(self, counts: Counts) -> tuple[Cut, nn.Module]:
        if counts not in self._shells:
            cut = self.elastic.cut(counts)
            self._shells[counts] = cut, resized(self._blank, cut)
            if len(self._shells) > _KEPT:
                self._shells.popitem(last=False)
        self._shells.move_to_end(counts)
        return self._shells[counts]

    def sub(self, counts: Counts) -> SubNetwork:
        """A sub-network that computes with the weights as they are now; good for one step."""
        cut, shell = self._shell(counts)
        tensors = shared(self.model, cut)
        names = set(stored_tensors(shell))
        return SubNetwork(shell, {n: t for n, t in tensors.items() if n in names}).train(self.model.training)

    def small(self, counts: Counts) -> nn.Module:
        """A sub-network with weights of its own: a plain module."""
        cut, shell = self._shell(counts)
        return made(self.model, cut, shell)

    @staticmethod
    def small_of(model: nn.Module, elastic: Elastic, counts: Counts) -> nn.Module:
        """A sub-network of a model that is no supernet: kernels are cropped."""
        return made(model, elastic.cut(counts))

    def close(self) -> None:
        """Take the matrices away again; sub-networks with smaller kernels cannot be made any more."""
        remove_matrices(self.model, self.elastic.kernels)

    def applied(self, counts: Counts) -> nn.Module:
        """A copy of the whole model, without matrices, whose smaller kernels stand in the middle of the larger ones."""
        copy = duplicate(self.model)
        remove_matrices(copy, self.elastic.kernels)
        cut, stored = self.elastic.cut(counts), stored_tensors(self.model)
        with torch.no_grad():
            for kernel, size in cut.kernels.items():
                weight = stored_tensors(copy)[kernel.weight]
                inner = center(weight.clone(), kernel, size, stored)
                weight.zero_()
                place = weight
                for axis in range(2, 2 + kernel.dims):
                    place = place.narrow(axis, kernel.positions(size).start, size)
                place.copy_(inner)
        return copy


def matrices_of(elastic: Elastic) -> list[str]:
    """Names of the parameters that a model has only while it is a supernet."""
    return [name_of(k, s) for k in elastic.kernels for s in k.sizes[:-1]]
