"""A matrix as the product of two narrow ones, best in what its outputs, or its weights, lose."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import RecipeError
from ..registry import register
from .ranks import Curve

#: A squared relative error that the rounding of float32 weights explains.
ROUNDING = 1e-12


@dataclass(frozen=True, eq=False)
class Made:
    """What one layer became: as data, as matrices in the order in which they are applied, and its relative error."""

    facts: dict[str, Any]
    tensors: Sequence[Tensor]
    error: float


@dataclass(frozen=True, eq=False)
class Options:
    """What one layer may become.

    Attributes:
        curve: sizes in stored values, and squared errors over the square of what is approximated.
        make: an option, as matrices.
    """

    curve: Curve
    make: Callable[[int], Made]


def counted(method: str, **numbers: int) -> None:
    """Refuse knobs that are no whole numbers from 1."""
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise RecipeError(f"{method}: {name} is a whole number, at least 1, not {value!r}")


def wide(tensor: Tensor) -> Tensor:
    """In float64 where the device has it."""
    return tensor.float() if tensor.device.type == "mps" else tensor.double()


def principal(weight_oi: Tensor, gram_ii: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The directions in which outputs vary most, ``(o, k)``, and the sums of their squares, decreasing.

    These are the left singular vectors of ``W S``, and its squared singular values, for any ``S`` with ``S S^T`` equal
    to the Gram matrix; without one, of ``W``. They are found as eigenvectors of ``W G W^T``, so that ``S`` is not
    needed, and the Gram matrix may be singular.
    """
    matrix = wide(weight_oi)
    turned = None
    if matrix.shape[0] > matrix.shape[1]:  # W G W^T has no higher rank than W has columns
        turned, matrix = torch.linalg.qr(matrix)
    seen = matrix if gram_ii is None else matrix @ wide(gram_ii)
    square = seen @ matrix.mT
    energy, basis = torch.linalg.eigh((square + square.mT) / 2)
    energy, basis = energy.flip(0).clamp_min(0), basis.flip(1)
    return (basis if turned is None else turned @ basis), energy


def factors(weight_oi: Tensor, basis_ok: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """``(r, i)`` and ``(o, r)`` whose product is the weight projected on the first ``rank`` directions.

    A row of the first and the column of the second that belong together have the same norm.
    """
    up = wide(basis_ok[:, :rank])
    down = up.mT @ wide(weight_oi)
    scale = down.norm(dim=1).clamp_min(torch.finfo(down.dtype).tiny).sqrt()
    return down / scale[:, None], up * scale


def tails(energy: Tensor) -> Tensor:
    """What is lost at rank 1, 2, ...: the sums of what comes behind, over the sum of all."""
    total = energy.sum().clamp_min(torch.finfo(energy.dtype).tiny)
    behind = energy.flip(0).cumsum(0).flip(0)
    lost = torch.cat([behind[1:], behind.new_zeros(1)]) / total
    return torch.where(lost < ROUNDING, 0.0, lost)


def spectrum(weight: Tensor, gram: Tensor | None) -> Options:
    """All ranks that save something, at least one, and what each loses in the Gram matrix's norm."""
    o, i = weight.shape
    basis, energy = principal(weight, gram)
    most = max(1, min(energy.shape[0], (o * i - 1) // (o + i)))
    lost = tails(energy)[:most]
    curve = Curve((o + i) * np.arange(1.0, most + 1), lost.double().cpu().numpy())
    basis = basis[:, :most].to(weight.dtype)

    def make(option: int) -> Made:
        rank = option + 1
        return Made({"kind": "low-rank", "ranks": [rank]}, factors(weight, basis, rank), float(lost[option].sqrt()))

    return Options(curve, make)


@register("transform", makes="factors", survey="D2")
def svd(weight: Tensor) -> Options:
    """Two narrow layers for each layer, by the singular value decomposition of its weight.

    :: W ~ U_r S_r V_r^T

    Choose it where there is no data; and as the baseline of the others.

    Beware: the inputs of a layer are far from white in most networks, so that what it keeps of the weights is not what
    matters to the outputs.

    >>> import torch
    >>> options = svd(torch.tensor([[3.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]))
    >>> options.curve.sizes.tolist(), [round(x, 3) for x in options.curve.errors.tolist()]
    ([6.0], [0.1])

    Source: Eckart and Young, The approximation of one matrix by another of lower rank, Psychometrika 1936.
    """
    return spectrum(weight, None)


@register("transform", paper="2312.05821", makes="factors", survey=("D2", "E4"))
def asvd(weight: Tensor, input_abs: Tensor, *, alpha: float = 0.5) -> Options:
    """Two narrow layers for each layer, by the singular value decomposition of the weight scaled by its inputs.

    :: W ~ svd_r(W S) S^-1,  S = diag(mean |x|)^alpha

    Choose it where a Gram matrix of the inputs is too large to keep.

    Beware: correlations between inputs are not seen; low-rank, which sees them, loses less of a layer's outputs at
    every rank on the data that it is fitted to.

    >>> import torch
    >>> options = asvd(torch.eye(3), torch.tensor([4.0, 1.0, 1.0]))
    >>> [round(x, 3) for x in options.curve.errors.tolist()]
    [0.333]

    Source: Yuan et al., ASVD, arXiv 2312.05821, section 3, and its official code (absolute means); how ranks are spread
    over the layers is our own.
    """
    return spectrum(weight, torch.diag(wide(input_abs) ** (2 * alpha)))


@register("transform", name="low-rank", paper="2403.07378", makes="factors", survey=("D2", "E4"))
def low_rank(weight: Tensor, gram: Tensor) -> Options:
    """Two narrow layers for each layer, such that its outputs change as little as a rank allows.

    :: W ~ svd_r(W S) S^-1 = U_r U_r^T W,  S S^T = X^T X

    Choose it first of the decompositions, with a few windows of data like those to come.

    Beware: the weights of language models have flat spectra; the official code advises to take no more than 30 % away
    where the factors are not trained afterwards. It is fitted to the dense model's inputs, all layers at once, so the
    Gram matrices of all layers are in memory together.

    >>> import torch
    >>> options = low_rank(torch.eye(3), torch.diag(torch.tensor([7.0, 2.0, 1.0])))
    >>> options.curve.sizes.tolist(), [round(x, 3) for x in options.curve.errors.tolist()]
    ([6.0], [0.3])

    Source: Wang et al., SVD-LLM, arXiv 2403.07378, section 3.1 (truncation-aware whitening), and its official code;
    without its update of the factors, and with no inverse of S, which the projection makes unnecessary. How ranks are
    spread over the layers is our own.
    """
    return spectrum(weight, gram)
