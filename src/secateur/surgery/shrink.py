"""Make tensors smaller in place, and mend the sizes that modules keep as plain numbers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..graph.labels import Array
from ..graph.units import Dependencies

#: Name of a stored tensor -> axis -> positions that stay.
Kept = Mapping[str, Mapping[int, Array]]


@dataclass(frozen=True)
class Mend:
    """A number that a module keeps and that repeats a size: ``module.attribute[item]`` becomes ``new``.

    ``item`` is None for a plain number, an index for a member of a tuple or list.
    """

    module: str
    attribute: str
    item: int | None
    old: int
    new: int


def kept_by_name(found: Dependencies, gone: Iterable[int]) -> dict[str, dict[int, Array]]:
    """What stays of each tensor that loses something, under every name it has."""
    kept: dict[str, dict[int, Array]] = {}
    for i, positions in found.kept(gone).items():
        for name in found.slots[i].names:
            kept.setdefault(name, {})[found.slots[i].axis] = positions
    return kept


def shrink(model: nn.Module, kept: Kept, mends: Sequence[Mend] = ()) -> None:
    """Keep only these positions of each tensor, in place; tied tensors stay tied.

    Args:
        kept: tensor name -> axis -> positions that stay.
        mends: numbers to change in modules; those of torch's own layers follow from the tensors by themselves.
    """
    made: dict[int, Tensor] = {}
    regrouped: set[int] = set()
    for name, axes in kept.items():
        module = model.get_submodule(name.rpartition(".")[0])
        if 0 in axes and id(module) not in regrouped and name.rpartition(".")[2] == "weight":
            regrouped.add(id(module))  # a module may have several names
            _regroup(module, axes[0])
    before = {name: _stored(model, name) for name in kept}
    for name, axes in kept.items():
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        old = before[name]
        if id(old) not in made:
            data = old.detach()
            for axis, positions in axes.items():
                data = data.index_select(axis, torch.from_numpy(positions).to(data.device))
            data = data.contiguous()
            made[id(old)] = nn.Parameter(data, old.requires_grad) if isinstance(old, nn.Parameter) else data
        new = made[id(old)]
        if leaf in module._parameters:
            module._parameters[leaf] = new  # type: ignore[assignment]
        else:
            module._buffers[leaf] = new
    mend(model, mends)
    for module in model.modules():
        _follow(module)


def mend(model: nn.Module, mends: Iterable[Mend]) -> None:
    """Change these numbers, in place."""
    for one in mends:
        _mend(model.get_submodule(one.module), one)


def _stored(model: nn.Module, name: str) -> Tensor:
    path, _, leaf = name.rpartition(".")
    found: Tensor = getattr(model.get_submodule(path), leaf)
    return found


def _regroup(module: nn.Module, positions: Array) -> None:
    """The number of groups that a convolution or a group norm has left: those with a position that stays."""
    attribute = "groups" if isinstance(module, nn.modules.conv._ConvNd) else "num_groups"
    weight = getattr(module, "weight", None)
    if isinstance(module, (nn.modules.conv._ConvNd, nn.GroupNorm)) and weight is not None:
        groups = int(getattr(module, attribute))
        if groups > 1:
            setattr(module, attribute, len(np.unique(positions // (weight.shape[0] // groups))))


def _mend(module: nn.Module, mend: Mend) -> None:
    value = getattr(module, mend.attribute)
    if mend.item is None:
        setattr(module, mend.attribute, mend.new)
        return
    changed = list(value)
    changed[mend.item] = mend.new
    setattr(module, mend.attribute, type(value)(changed) if isinstance(value, (tuple, list)) else value)


def _follow(module: nn.Module) -> None:
    """Set what torch's own layers say of their sizes from the tensors they hold."""
    weight: Any = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.dim() >= 1:
        shape = weight.shape
        if isinstance(module, nn.Linear) and weight.dim() == 2:
            module.out_features, module.in_features = shape
        elif isinstance(module, nn.modules.conv._ConvNd) and weight.dim() >= 3:
            first, second = int(shape[0]), int(shape[1])
            if module.transposed:
                module.in_channels = first
                module.out_channels = second * module.groups
            else:
                module.out_channels = first
                module.in_channels = second * module.groups
        elif isinstance(module, nn.modules.batchnorm._NormBase):
            module.num_features = shape[0]
        elif isinstance(module, nn.GroupNorm):
            module.num_channels = shape[0]
        elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
            module.normalized_shape = tuple(shape)
        elif isinstance(module, nn.Embedding) and weight.dim() == 2:
            module.embedding_dim = shape[1]
    running = getattr(module, "running_mean", None)
    if isinstance(module, nn.modules.batchnorm._NormBase) and isinstance(running, Tensor):
        module.num_features = running.shape[0]


def candidates(
    model: nn.Module, found: Dependencies, gone: Iterable[int]
) -> dict[tuple[str, int, str, int | None], list[Mend]]:
    """Numbers of modules that equal a size which changes in their own ``forward``.

    Returns:
        ``(module, size, attribute, item) -> what it may become``, by order of appearance in the run. Usually one.
    """
    options: dict[tuple[str, int, str, int | None], list[Mend]] = {}
    modules = dict(model.named_modules())
    for name, sizes in found.sizes(gone).items():
        if name in found.trace.calls:
            continue  # see `exact`
        for attribute, item, value in _numbers(modules[name]):
            if value in sizes:
                key = (name, value, attribute, item)
                options[key] = [Mend(name, attribute, item, value, new) for new in sizes[value]]
    return options


def exact(model: nn.Module, found: Dependencies, gone: Iterable[int]) -> tuple[Mend, ...]:
    """What becomes of the sizes that modules of a program keep: each is known to be that of one axis."""
    mask = found.mask(gone)
    mends = []
    for name, (inputs, outputs) in found.trace.calls.items():
        module: Any = model.get_submodule(name)
        lengths = module.lengths(inputs, outputs, lambda axis: ~mask[found.trace.labels.roots(axis)])
        mends += [Mend(name, "size", i, old, n) for i, n in lengths.items() if (old := module.size[i]) != n]
    return tuple(mends)


_SIZES = (
    "groups",
    "in_channels",
    "out_channels",
    "num_groups",
    "num_channels",
    "num_features",
    "in_features",
    "out_features",
    "normalized_shape",
    "embedding_dim",
)
_OWN = (
    nn.Linear,
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.Embedding,
)


def _numbers(module: nn.Module) -> Iterator[tuple[str, int | None, int]]:
    """Whole numbers a module keeps, but for those of torch's own layers that `_follow` sets."""
    if type(module) in _OWN:
        return
    known = _SIZES if isinstance(module, (nn.modules.conv._ConvNd, nn.GroupNorm, *_OWN)) else ()
    for attribute, value in vars(module).items():
        if attribute.startswith("_") or attribute == "training" or attribute in known:
            continue
        if type(value) is int:
            yield attribute, None, value
        elif type(value) in (tuple, list) and len(value) <= 8:
            for i, x in enumerate(value):
                if type(x) is int:
                    yield attribute, i, x
