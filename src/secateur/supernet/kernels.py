"""Elastic kernels: a smaller one is the center of the next larger one, through a small matrix that is learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..surgery.shrink import Mend


@dataclass(frozen=True)
class Kernel:
    """A convolution whose kernel may be smaller.

    Attributes:
        path: of the convolution.
        sizes: that its kernel may have, ascending; the last is its own.
        dims: how many axes the kernel has.
    """

    path: str
    sizes: tuple[int, ...]
    dims: int

    @property
    def weight(self) -> str:
        """The name of the weight."""
        return f"{self.path}.weight" if self.path else "weight"

    def positions(self, size: int) -> range:
        """Which positions along an axis of the kernel stay."""
        off = (self.sizes[-1] - size) // 2
        return range(off, off + size)


def elastic_kernels(model: nn.Module, least: int) -> list[Kernel]:
    """The convolutions with odd, square kernels above ``least`` whose padding can follow a smaller kernel.

    A weight that several modules share stays as it is.

    >>> net = nn.Sequential(nn.Conv2d(3, 4, 7, padding=3), nn.Conv2d(4, 4, 5, padding=1), nn.Conv2d(4, 4, 3))
    >>> [(k.path, k.sizes) for k in elastic_kernels(net, 3)]
    [('0', (3, 5, 7)), ('1', (3, 5))]
    """
    shared = [id(p) for _, p in model.named_parameters(remove_duplicate=False)]
    found = []
    for path, module in model.named_modules():
        if type(module) not in (nn.Conv1d, nn.Conv2d, nn.Conv3d) or module.padding_mode != "zeros":
            continue
        own = module.kernel_size[0]
        if set(module.kernel_size) != {own} or own % 2 == 0 or shared.count(id(module.weight)) > 1:
            continue
        sizes = [n for n in range(max(1, least + 1 - least % 2), own, 2) if _paddings(module, n) is not None]
        if sizes:
            found.append(Kernel(path, (*sizes, own), len(module.kernel_size)))
    return found


def _paddings(module: nn.modules.conv._ConvNd, size: int) -> tuple[int, ...] | str | None:
    """The padding with which a smaller kernel gives outputs of the same size; None where there is none."""
    if module.padding == "same":
        return "same"
    if isinstance(module.padding, str):
        return None
    less = [d * (k - size) // 2 for k, d in zip(module.kernel_size, module.dilation, strict=True)]
    found = tuple(p - x for p, x in zip(module.padding, less, strict=True))
    return found if min(found) >= 0 else None


def mends(module: nn.modules.conv._ConvNd, path: str, size: int) -> list[Mend]:
    """The numbers of a convolution that a kernel of this size changes."""
    found = [Mend(path, "kernel_size", i, k, size) for i, k in enumerate(module.kernel_size)]
    paddings = _paddings(module, size)
    if isinstance(paddings, tuple):
        old = [int(p) for p in module.padding]
        found += [Mend(path, "padding", i, p, n) for i, (p, n) in enumerate(zip(old, paddings, strict=True))]
    return [m for m in found if m.old != m.new]


def name_of(kernel: Kernel, size: int) -> str:
    """The name under which a model holds the matrix that leads to this size, while it is a supernet."""
    return f"{kernel.path}.to_{size}".lstrip(".")


def add_matrices(model: nn.Module, kernels: Sequence[Kernel]) -> None:
    """Give each elastic convolution its matrices, which are identities at first."""
    for kernel in kernels:
        module = model.get_submodule(kernel.path)
        like: Tensor = module.weight  # type: ignore[assignment]
        for size in kernel.sizes[:-1]:
            eye = torch.eye(size**kernel.dims, dtype=like.dtype, device=like.device)
            module.register_parameter(name_of(kernel, size).rpartition(".")[2], nn.Parameter(eye))


def remove_matrices(model: nn.Module, kernels: Sequence[Kernel]) -> None:
    """The inverse of `add_matrices`."""
    for kernel in kernels:
        module = model.get_submodule(kernel.path)
        for size in kernel.sizes[:-1]:
            del module._parameters[name_of(kernel, size).rpartition(".")[2]]


def center(weight: Tensor, kernel: Kernel, size: int, matrices: Mapping[str, Tensor]) -> Tensor:
    """The kernel of this size: from each size to the next smaller one, crop and multiply.

    :: W_s = (center of W_{s+2}, as a row) T_s^T

    Args:
        matrices: by `name_of`; where one is missing the crop is taken as it is.

    >>> k = Kernel("", (1, 3), 2)
    >>> w = torch.arange(9.0).reshape(1, 1, 3, 3)
    >>> center(w, k, 1, {}).item(), center(w, k, 1, {"to_1": torch.tensor([[2.0]])}).item()
    (4.0, 8.0)
    """
    for large, small in zip(reversed(kernel.sizes), reversed(kernel.sizes[:-1]), strict=False):
        if large <= size:
            break
        off = (large - small) // 2
        for axis in range(2, 2 + kernel.dims):
            weight = weight.narrow(axis, off, small)
        matrix = matrices.get(name_of(kernel, small))
        if matrix is not None:
            shape = weight.shape
            weight = nn.functional.linear(weight.flatten(2), matrix.to(weight.dtype)).reshape(shape)
    return weight
