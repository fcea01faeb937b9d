"""Convolutions as pointwise, one short filter along each axis of the kernel, and pointwise: canonical polyadic."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..registry import register
from .lowrank import ROUNDING, Made, Options, counted, principal, wide
from .ranks import Curve
from .tucker import along

#: Singular values of a Gram matrix that count as none, over the largest.
_SMALL = 1e-13
#: Columns of the factor of each axis, ``(size, rank)``, in the order of the tensor's axes.
Factors = list[Tensor]


def compose(factors: Sequence[Tensor]) -> Tensor:
    """The tensor that factors stand for: the sum over their columns of outer products.

    >>> compose([torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [4.0]])]).tolist()
    [[3.0, 4.0], [6.0, 8.0]]
    """
    shape = tuple(f.shape[0] for f in factors)
    return (factors[0] @ rows(factors[1:]).mT).reshape(shape)


def rows(factors: Sequence[Tensor]) -> Tensor:
    """The Khatri-Rao product, ``(product of sizes, rank)``: positions of the last factor change fastest."""
    made = factors[0]
    for factor in factors[1:]:
        made = (made[:, None, :] * factor[None, :, :]).flatten(0, 1)
    return made


def alternate(tensor: Tensor, factors: Sequence[Tensor], iterations: int) -> tuple[Factors, float]:
    """Alternating least squares: each factor is the best for the others, in turn; the error never grows.

    Returns the factors, and their squared error.
    """
    found = list(factors)
    unfolded = [along(tensor, a) for a in range(tensor.dim())]
    whole = float(tensor.square().sum())
    error = float((tensor - compose(found)).square().sum())
    for _ in range(iterations):
        before, last = error, list(found)
        for a, matrix in enumerate(unfolded):
            others = [f / f.norm(dim=0).clamp_min(torch.finfo(f.dtype).tiny) for f in found[:a] + found[a + 1 :]]
            found[:a], found[a + 1 :] = others[:a], others[a:]
            square = math.prod([f.mT @ f for f in others], start=matrix.new_ones(()))
            inverse = torch.linalg.pinv(square, rtol=_SMALL, hermitian=True)  # columns may be dependent
            found[a] = matrix @ rows(others) @ inverse
        error = float((tensor - compose(found)).square().sum())
        if not error <= before:  # rounding, where columns are nearly the same
            return last, before
        if before - error <= 1e-9 * whole:
            break
    return found, error


def wider(tensor: Tensor, factors: Sequence[Tensor], rank: int, generator: torch.Generator) -> Factors:
    """More columns: the principal directions of what the factors miss, and random ones where an axis has no more.

    The first factor gets zeros, so that the error is as it was.
    """
    more = rank - factors[0].shape[1]
    rest = tensor - compose(factors)
    made = [torch.cat([factors[0], factors[0].new_zeros(factors[0].shape[0], more)], 1)]
    for a, factor in enumerate(factors[1:], 1):
        basis = principal(along(rest, a))[0][:, :more]
        drawn = torch.randn(factor.shape[0], more - basis.shape[1], generator=generator, dtype=torch.float64)
        made.append(torch.cat([factor, basis, drawn.to(factor)], 1))
    return made


@register("transform", paper="1412.6553", makes="factors", survey=("D2", "E1"), kinds=("conv",))
def cp(stored: Tensor, *, iterations: int = 25, ranks: int = 10, seed: int = 0) -> Options:
    """Four convolutions for each: to few channels, along one axis of the kernel, along the other, and back.

    :: W(o, c, x, y) ~ sum_r A(o, r) B(c, r) X(x, r) Y(y, r)

    Of a kernel over one or three axes there are three or five. Those along an axis see each channel by itself. Ranks
    are tried on a ladder of so many (``ranks``), each from the factors of the one before.

    Choose it for large kernels where much is to go: a rank costs ``o + c + x + y`` values, the least of all
    decompositions.

    Beware: no data is seen; alternating least squares finds a good fit, not the best, and takes its time; layers after
    another of few channels train badly with large steps, says the paper, which fits by nonlinear least squares. Four
    layers take longer to start than one; pointwise layers, which are matrices, are better served by low-rank.

    >>> kernel = torch.einsum("o,c,x,y->ocxy", *(torch.arange(1.0, n + 1) for n in (6, 5, 3, 3)))
    >>> options = cp(kernel, ranks=2)
    >>> int(options.curve.sizes[0]), float(options.curve.errors[0])  # 6 + 5 + 3 + 3 values for 270
    (17, 0.0)

    Source: Lebedev et al., arXiv 1412.6553, section 3, for the four convolutions; alternating least squares after
    Kolda and Bader, Tensor decompositions and applications, SIAM Review 2009, figure 3.3, in place of its nonlinear
    least squares; the start from wider factors of a smaller rank, and how ranks are spread over layers, are our own.
    """
    counted("cp", iterations=iterations, ranks=ranks)
    tensor = wide(stored)
    whole = max(float(tensor.square().sum()), torch.finfo(tensor.dtype).tiny)
    step = float(sum(tensor.shape))
    most = max(1, int((tensor.numel() - 1) // step))
    ladder = sorted({1, *(max(1, round(most * (k / ranks) ** 1.5)) for k in range(1, ranks + 1))})
    generator = torch.Generator().manual_seed(seed)
    factors: Factors = [tensor.new_zeros(n, 0) for n in tensor.shape]
    found: list[Factors] = []
    lost: list[float] = []
    for rank in ladder:
        factors, error = alternate(tensor, wider(tensor, factors, rank, generator), iterations)
        found.append(factors)
        lost.append(0.0 if error / whole < ROUNDING else error / whole)
        if lost[-1] == 0.0:
            break
    curve = Curve(step * np.array(ladder[: len(found)], dtype=float), np.minimum.accumulate(np.array(lost)))

    def make(option: int) -> Made:
        rank = ladder[option]
        own = balanced(found[option])
        return Made({"kind": "cp", "ranks": [rank]}, [own[1].mT, *(f.mT for f in own[2:]), own[0]], lost[option] ** 0.5)

    return Options(curve, make)


def balanced(factors: Sequence[Tensor]) -> Factors:
    """The same tensor, with columns of one norm in all factors."""
    norms = torch.stack([f.norm(dim=0) for f in factors]).clamp_min(torch.finfo(factors[0].dtype).tiny)
    each = norms.log().mean(0).exp()
    return [f * (each / n) for f, n in zip(factors, norms, strict=True)]
