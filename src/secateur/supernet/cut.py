"""What a sub-network leaves out of the whole model, and the modules and tensors that are left."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from ..graph.labels import Array
from ..graph.state import duplicate
from ..graph.trace import stored_tensors
from ..search.space import Counts
from ..surgery.depth import BLOCKS
from ..surgery.prove import twin
from ..surgery.shrink import Mend, shrink
from .kernels import Kernel, center
from .stages import renamed


@dataclass(frozen=True, eq=False)
class Cut:
    """What a sub-network leaves out of the whole model.

    Attributes:
        counts: how much of each node stays.
        labels: that go with its widths.
        removed: path of a list -> numbers of the blocks that are left out.
        kept: name of a tensor of the whole model -> axis -> positions that stay.
        kernels: those that are smaller -> their size.
        mends: numbers that change in modules, by the modules' names in the sub-network.
    """

    counts: Counts
    labels: frozenset[int] = field(repr=False)
    removed: Mapping[str, list[int]]
    kept: Mapping[str, Mapping[int, Array]] = field(repr=False)
    kernels: Mapping[Kernel, int]
    mends: tuple[Mend, ...] = field(repr=False)

    def name(self, whole: str) -> str | None:
        """What a tensor or a module is called in the sub-network; None where it is not there."""
        return renamed(whole, self.removed)

    @property
    def kept_there(self) -> dict[str, dict[int, Array]]:
        """``kept`` by the names in the sub-network, the positions of smaller kernels included."""
        found = {n: dict(axes) for name, axes in self.kept.items() if (n := self.name(name)) is not None}
        for kernel, size in self.kernels.items():
            name = self.name(kernel.weight)
            if name is not None:
                found.setdefault(name, {}).update(
                    {2 + a: np.asarray(kernel.positions(size)) for a in range(kernel.dims)}
                )
        return found


def shared(model: nn.Module, cut: Cut) -> dict[str, Tensor]:
    """The tensors of a sub-network by its own names, computed from those of the whole model.

    Gradients flow into the whole model's parameters; statistics of batch norms are copies. Tied parameters are one
    tensor.
    """
    stored = stored_tensors(model)
    kernels = {k.weight: (k, s) for k, s in cut.kernels.items()}
    made: dict[int, Tensor] = {}
    found: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        there = cut.name(name)
        if there is None:
            continue
        if id(tensor) not in made:
            part = tensor
            for axis, positions in cut.kept.get(name, {}).items():
                part = part.index_select(axis, torch.from_numpy(positions).to(tensor.device))
            if name in kernels:
                part = center(part, *kernels[name], stored)
            made[id(tensor)] = part if isinstance(tensor, nn.Parameter) else part.clone()
        found[there] = made[id(tensor)]
    return found


def resized(blank: nn.Module, cut: Cut) -> nn.Module:
    """A copy of a model without data that has the sizes of a sub-network."""
    shell = duplicate(blank)
    BLOCKS.remove(shell, cut.removed)
    shrink(shell, cut.kept_there, cut.mends)
    return shell


def made(model: nn.Module, cut: Cut, shell: nn.Module | None = None) -> nn.Module:
    """A sub-network with weights of its own, copied from those of the whole model."""
    small = resized(twin(model, meta=True), cut) if shell is None else duplicate(shell)
    own: dict[int, Tensor] = {}
    with torch.no_grad():
        values = shared(model, cut)
    for name, tensor in stored_tensors(small).items():
        path, _, leaf = name.rpartition(".")
        module, value = small.get_submodule(path), values[name]
        if id(value) not in own:
            copy = value.detach().clone().contiguous()
            is_parameter = isinstance(tensor, nn.Parameter)
            own[id(value)] = nn.Parameter(copy, tensor.requires_grad) if is_parameter else copy
        if leaf in module._parameters:
            module._parameters[leaf] = own[id(value)]  # type: ignore[assignment]
        else:
            module._buffers[leaf] = own[id(value)]
    return small.train(model.training)
