"""Convolutions as pointwise, a small kernel between few channels, and pointwise: Tucker-2."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..registry import register
from .lowrank import ROUNDING, Made, Options, principal, wide
from .ranks import Curve


def project(tensor: Tensor, bases: tuple[Tensor, Tensor]) -> Tensor:
    """The tensor ``(o, c, ...)`` seen in two bases of columns: the core."""
    half = torch.einsum("oc...,or->rc...", tensor, bases[0])
    return torch.einsum("rc...,cs->rs...", half, bases[1])


def expand(core: Tensor, bases: tuple[Tensor, Tensor]) -> Tensor:
    """The inverse of `project`, of what lies in the bases."""
    half = torch.einsum("rs...,or->os...", core, bases[0])
    return torch.einsum("os...,cs->oc...", half, bases[1])


def along(tensor: Tensor, axis: int) -> Tensor:
    """The tensor as a matrix whose rows are the positions of one axis."""
    return tensor.movedim(axis, 0).flatten(1)


def hooi(tensor: Tensor, bases: tuple[Tensor, Tensor], iterations: int) -> tuple[Tensor, Tensor]:
    """Higher-order orthogonal iteration: each basis is the best for the other, in turn; the error never grows."""
    first, second = bases
    for _ in range(iterations):
        first = principal(along(torch.einsum("oc...,cs->os...", tensor, second), 0))[0][:, : first.shape[1]]
        second = principal(along(torch.einsum("oc...,or->rc...", tensor, first), 1))[0][:, : second.shape[1]]
    return first, second


@register("transform", makes="factors", survey=("D2", "E1"), kinds=("conv",))
def tucker(stored: Tensor, *, iterations: int = 5) -> Options:
    """Three convolutions for each: to few channels, the kernel between these, and back.

    :: W ~ C x_1 U x_2 V,  U and V the leading left singular vectors of W unfolded by outputs and by inputs

    Choose it for convolutions with large kernels and many channels, where both sides have few directions.

    Beware: no data is seen; three layers take longer to start than one, and pointwise layers, which are matrices, are
    better served by low-rank. Kernels are not factored over their positions.

    >>> import torch
    >>> kernel = torch.diag(torch.tensor([4.0, 2.0, 1.0, 1.0])).reshape(4, 4, 1, 1).expand(4, 4, 3, 3)
    >>> options = tucker(kernel)
    >>> int(options.curve.sizes[0]), round(float(options.curve.errors[0]), 3)  # 4 + 4 + 9 values for 144; 6 / 22
    (17, 0.273)

    Source: De Lathauwer, De Moor and Vandewalle, A multilinear singular value decomposition, SIAM J. Matrix Anal. Appl.
    2000, for the bases, and On the best rank-(R1, ..., RN) approximation, ibid. 2000, for their refinement; Kim et al.,
    arXiv 1511.06530, for convolutions, a two-mode Tucker
    decomposition (the paper was not read here). How ranks are spread over the layers is our own.
    """
    tensor = wide(stored)
    bases = tuple(principal(along(tensor, a))[0] for a in (0, 1))
    full = project(tensor, (bases[0], bases[1]))
    held = full.flatten(2).square().sum(2).cumsum(0).cumsum(1)  # of what the first a and b directions hold
    whole = held[-1, -1].clamp_min(torch.finfo(tensor.dtype).tiny)
    rest = (1 - held / whole).clamp_min(0)
    lost = torch.where(rest < ROUNDING, 0.0, rest).double().cpu().numpy()
    o, c, *kernel = stored.shape
    a, b = (np.arange(1.0, n + 1) for n in lost.shape)
    sizes = a[:, None] * o + b[None, :] * c + a[:, None] * b[None, :] * float(np.prod(kernel))
    useless = (b[None, :] > a[:, None] * np.prod(kernel)) | (a[:, None] > b[None, :] * np.prod(kernel))
    order = np.lexsort((lost.ravel(), sizes.ravel()))
    order = order[~useless.ravel()[order]]  # the core would have more rows, or columns, than rank
    errors = lost.ravel()[order]
    best = np.minimum.accumulate(errors)
    order = order[np.append(True, best[1:] < best[:-1])]  # larger ones must lose less
    curve = Curve(sizes.ravel()[order], lost.ravel()[order])

    def make(option: int) -> Made:
        first, second = (int(n) + 1 for n in divmod(int(order[option]), lost.shape[1]))
        found = hooi(tensor, (bases[0][:, :first], bases[1][:, :second]), iterations)
        core = project(tensor, found)
        error = float((1 - core.square().sum() / whole).clamp_min(0))
        facts = {"kind": "tucker", "ranks": [first, second]}
        return Made(facts, [found[1].mT, core, found[0]], 0.0 if error < ROUNDING else error**0.5)

    return Options(curve, make)
