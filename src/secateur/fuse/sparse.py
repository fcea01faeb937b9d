"""A matrix as a low-rank one plus a sparse one, found in turns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..registry import register
from ..select import select
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


def alternate(
    weight: Tensor, gram: Tensor, split: Split, iterations: int, sparse_first: bool = False
) -> tuple[Tensor, Tensor, float]:
    """The low-rank term is refitted to what the sparse one leaves, and the sparse one to what that leaves, in turns.

    Returns the two terms when they were best, and their squared error.
    """
    scale = gram.diagonal().clamp_min(0).sqrt()
    low = torch.zeros_like(weight)
    sparse = chosen(weight, scale, split.nonzeros) if sparse_first else torch.zeros_like(weight)
    best: tuple[Tensor, Tensor, float] | None = None
    for turn in range(iterations if split.rank and split.nonzeros else 1):
        if split.rank:
            basis, _ = principal(weight - sparse, gram)
            low = basis[:, : split.rank] @ (basis[:, : split.rank].mT @ (weight - sparse))
            if turn or sparse_first or not split.nonzeros:
                best = _better(best, weight, low, sparse, gram)
        if split.nonzeros:
            sparse = chosen(weight - low, scale, split.nonzeros)
            best = _better(best, weight, low, sparse, gram)
    assert best is not None
    return best


def _better(
    best: tuple[Tensor, Tensor, float] | None, weight: Tensor, low: Tensor, sparse: Tensor, gram: Tensor
) -> tuple[Tensor, Tensor, float]:
    error = lost(weight - low - sparse, gram)
    return (low, sparse, error) if best is None or error < best[2] else best


@register("transform", name="low-rank+sparse", paper="2409.13652", makes="factors", survey=("D2", "D5"))
def low_rank_sparse(
    weight: Tensor,
    gram: Tensor,
    budget: float,
    mask_size: float,
    *,
    iterations: int = 10,
    shares: tuple[float, ...] = (0.25, 0.5),
) -> Made:
    """Two narrow layers and one with zeros for each layer, in the split that changes its outputs least.

    :: W ~ U V + S,  rank(U V) (o + i) + |S|_0 = budget

    Choose it where single weights and a few directions matter at once, as in language models, and where a format or
    a kernel for zeros is at hand.

    Beware: the sparse term is as fast as a kernel makes it; dense kernels do more work than before. On disk it takes
    its values and a bit for each weight.

    >>> import torch
    >>> weight = torch.ones(4, 4) + 9 * torch.eye(4)[:, [1, 0, 2, 3]].tril(-1)
    >>> low_rank_sparse(weight, torch.eye(4), 9.0, 0.0, shares=(0.9,)).facts
    {'kind': 'low-rank+sparse', 'ranks': [1], 'nonzeros': 1}

    Source: Zhang and Papyan, OATS, arXiv 2409.13652, and its official code, for the turns of truncated SVD and
    hard thresholding in the scale of the inputs; with these deviations: the low-rank step sees the whole Gram matrix
    (SVD-LLM, arXiv 2403.07378), weights compete over the layer and not within a row, either term may come first, and
    the best of all turns and of several splits is kept, either term alone among them. LoSparse (arXiv 2306.11222) has
    the same form, and trains.
    """
    counted("low-rank+sparse", iterations=iterations)
    matrix, square = wide(weight), wide(gram)
    whole = max(lost(matrix, square), torch.finfo(matrix.dtype).tiny)
    best: tuple[Split, Tensor, Tensor, float] | None = None
    for split in splits((matrix.shape[0], matrix.shape[1]), budget, mask_size, tuple(shares)):
        for first in (False, True) if split.rank and split.nonzeros else (False,):
            found = alternate(matrix, square, split, iterations, first)
            if best is None or found[2] < best[3]:
                best = (split, *found)
    if best is None:
        return Made({"kind": "dense"}, [], 0.0)
    split, low, sparse, error = best
    facts: dict[str, Any] = {"kind": "low-rank+sparse", "ranks": [split.rank], "nonzeros": split.nonzeros}
    relative = (error / whole) ** 0.5
    if not split.rank:
        return Made({"kind": "sparse", "nonzeros": split.nonzeros}, [sparse], relative)
    narrow = factors(low, principal(low, square)[0], split.rank)
    if not split.nonzeros:
        return Made({"kind": "low-rank", "ranks": [split.rank]}, narrow, relative)
    return Made(facts, [*narrow, sparse], relative)
