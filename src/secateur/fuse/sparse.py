"""A matrix as a low-rank one plus a sparse one, found in turns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import RecipeError
from ..registry import register
from ..select import select
from ..solvers.curvature import Curvature
from ..solvers.least_squares import refit
from .lowrank import Made, counted, factors, principal, wide


@dataclass(frozen=True, eq=False)
class Split:
    """A budget in one way: how many ranks, and how many weights of their own."""

    rank: int
    nonzeros: int


def splits(shape: tuple[int, int], budget: float, mask_size: float, shares: tuple[float, ...]) -> Iterator[Split]:
    """Ways to spend a budget of stored values: ranks alone, weights alone, and shares of ranks between.

    Weights of their own take a mask, of ``mask_size`` values. Every way uses the budget up to the last rank or weight.
    """
    o, i = shape
    most = min(int(budget // (o + i)), o, i)
    single = min(int(budget - mask_size), o * i)
    if most >= 1:
        yield Split(most, 0)
    if single >= 1:
        yield Split(0, single)
    for rank in sorted({int(share * budget / (o + i)) for share in shares}):
        left = min(int(budget - mask_size - rank * (o + i)), o * i)
        if 1 <= rank <= most and left >= 1:
            yield Split(rank, left)


def lost(difference_oi: Tensor, gram: Tensor) -> float:
    """The squared error of the outputs."""
    return float(((difference_oi @ gram) * difference_oi).sum().clamp_min(0))


def chosen(residual_oi: Tensor, scale_i: Tensor, count: int) -> Tensor:
    """The largest entries of a matrix in the scale of its inputs, exactly ``count``; zero elsewhere."""
    score = (residual_oi.abs() * scale_i).reshape(1, -1)
    return residual_oi * select(score, count).view_as(residual_oi)


def projected(residual_oi: Tensor, basis_or: Tensor | None) -> Tensor:
    """A matrix on some directions; zero on none."""
    return torch.zeros_like(residual_oi) if basis_or is None else basis_or @ (basis_or.mT @ residual_oi)


def turned(residual_oi: Tensor, gram: Tensor, basis_or: Tensor) -> Tensor:
    """A step of orthogonal iteration towards the leading directions of the outputs of a matrix.

    What the projection on them holds never becomes less, and no eigenvectors are computed: three thin products.
    """
    basis: Tensor = torch.linalg.qr(residual_oi @ (gram @ (residual_oi.mT @ basis_or)))[0]
    return basis


@dataclass(frozen=True, eq=False)
class Terms:
    """A matrix in two terms: a projection on a basis (None without ranks), and a sparse one; and what is lost."""

    low: Tensor
    basis: Tensor | None
    sparse: Tensor
    error: float


def alternate(weight: Tensor, gram: Tensor, split: Split, iterations: int, leading_ok: Tensor | None = None) -> Terms:
    """The sparse term is taken from what the low-rank one leaves, and the low-rank one from what that leaves, in turns.

    Args:
        leading_ok: the leading directions of the outputs of the weight, from which the turns start; without them the
            sparse term is the first.

    Returns:
        The terms when they were best. Turns end early when one changes the error by less than a thousandth of it.
    """
    scale = gram.diagonal().clamp_min(0).sqrt()
    sparse = torch.zeros_like(weight) if leading_ok is not None else chosen(weight, scale, split.nonzeros)
    if leading_ok is None and split.rank:
        leading_ok = principal(weight - sparse, gram)[0].to(weight.dtype)
    basis = None if leading_ok is None or not split.rank else leading_ok[:, : split.rank]
    best: Terms | None = None
    before = float("inf")
    for turn in range(iterations if split.rank and split.nonzeros else 1):
        if turn and basis is not None:
            basis = turned(weight - sparse, gram, basis)
        low = projected(weight - sparse, basis)
        if split.nonzeros:
            sparse = chosen(weight - low, scale, split.nonzeros)
        error = lost(weight - low - sparse, gram)
        if best is None or error < best.error:
            best = Terms(low, basis, sparse, error)
        if abs(before - error) <= 1e-3 * error:
            break
        before = error
    assert best is not None
    return best


def fitted(weight: Tensor, curvature: Curvature, terms: Terms, iterations: int, rounds: int = 3) -> Terms:
    """Each term in turn moves to the best that it can be beside the other; what is zero stays zero.

    The sparse term's values are a least squares fit, the basis a step of orthogonal iteration: no step loses more.
    """
    gram, basis, low, sparse = curvature.gram, terms.basis, terms.low, terms.sparse
    mask = sparse != 0
    for step in range(rounds if basis is not None else 1):
        if step and basis is not None:
            basis = turned(weight - sparse, gram, basis)
            low = projected(weight - sparse, basis)
        sparse = refit(weight - low, mask, curvature, start=sparse, iterations=iterations)
    found = Terms(low, basis, sparse, lost(weight - low - sparse, gram))
    return found if found.error < terms.error else terms


def ordered(residual_oi: Tensor, gram: Tensor, basis_or: Tensor) -> Tensor:
    """The same directions, orthonormal up to rounding, by how much of the outputs lies in each, decreasing."""
    basis: Tensor = torch.linalg.qr(basis_or)[0]
    inner = basis.mT @ residual_oi
    square = inner @ gram @ inner.mT
    turn: Tensor = torch.linalg.eigh((square + square.mT) / 2)[1].flip(1)
    return basis @ turn


@register("transform", name="low-rank+sparse", paper="2409.13652", makes="factors", survey=("D2", "D5"))
def low_rank_sparse(
    weight: Tensor,
    gram: Tensor,
    budget: float,
    mask_size: float,
    *,
    iterations: int = 10,
    fit: int = 10,
    shares: tuple[float, ...] = (0.1, 0.25),
) -> Made:
    """Two narrow layers and one with zeros for each layer, in the split that changes its outputs least.

    :: W ~ U V + S,  rank(U V) (o + i) + |S|_0 = budget

    Choose it where single weights and a few directions matter at once, as in language models, and where a format or
    a kernel for zeros is at hand.

    Beware: fitted values with fewer tokens than input features fit the calibration text. The sparse term is as fast
    as a kernel makes it; dense kernels do more work than before. On disk it takes its values and a bit for each weight.

    >>> import torch
    >>> weight = torch.ones(4, 4) + 9 * torch.eye(4)[:, [1, 0, 2, 3]].tril(-1)
    >>> low_rank_sparse(weight, torch.eye(4), 9.0, 0.0, shares=(0.9,)).facts
    {'kind': 'low-rank+sparse', 'ranks': [1], 'nonzeros': 1}

    Source: Zhang and Papyan, OATS, arXiv 2409.13652, and its official code, for the turns of truncated SVD and
    hard thresholding in the scale of the inputs; with these deviations: the low-rank step sees the whole Gram matrix
    (SVD-LLM, arXiv 2403.07378), and is one step of orthogonal iteration from the basis before, not a decomposition;
    weights compete over the layer and not within a row, and either term may come first; the values of the sparse
    term, and the basis beside it, are fitted to the layer's outputs at the end (``fit`` conjugate gradient steps as in
    ALPS, arXiv 2406.07831; 0 leaves them as they are); and the best of all turns and of several splits is kept,
    either term alone among them. LoSparse (arXiv 2306.11222) has the same form, and trains.
    """
    counted("low-rank+sparse", iterations=iterations)
    if isinstance(fit, bool) or not isinstance(fit, int) or fit < 0:
        raise RecipeError(f"low-rank+sparse: fit is a whole number of iterations, or 0 for none, not {fit!r}")
    exact, square = wide(weight), wide(gram)
    leading, energy = principal(exact, square)
    basis, curvature = leading.to(weight.dtype), Curvature(gram.to(weight.dtype))
    best: tuple[Split, Terms] | None = None
    for split in splits((weight.shape[0], weight.shape[1]), budget, mask_size, tuple(shares)):
        terms = alternate(weight, curvature.gram, split, iterations, basis)
        if split.rank and split.nonzeros:
            other = alternate(weight, curvature.gram, split, iterations)
            terms = other if other.error < terms.error else terms
        if fit and split.nonzeros:
            terms = fitted(weight, curvature, terms, fit)
        if best is None or terms.error < best[1].error:
            best = (split, terms)
    if best is None:
        return Made({"kind": "dense"}, [], 0.0)
    split, terms = best
    sparse = wide(terms.sparse)
    tensors: tuple[Tensor, ...] = ()
    left = exact - sparse
    if terms.basis is not None:
        directions = ordered(left, square, wide(terms.basis)) if split.nonzeros else leading[:, : split.rank]
        tensors = factors(left, directions, split.rank)
        left = left - tensors[1] @ tensors[0]
    whole = max(float(energy.sum()), torch.finfo(exact.dtype).tiny)
    error = (lost(left, square) / whole) ** 0.5
    kind = "+".join(["low-rank"] * bool(split.rank) + ["sparse"] * bool(split.nonzeros))
    facts: dict[str, Any] = {"kind": kind} | ({"ranks": [split.rank]} if split.rank else {})
    facts |= {"nonzeros": split.nonzeros} if split.nonzeros else {}
    return Made(facts, [*tensors, *([sparse] if split.nonzeros else [])], error)
