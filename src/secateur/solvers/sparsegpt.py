"""One-shot column sweep with optimal brain surgeon updates."""

from __future__ import annotations

import torch
from torch import Tensor

from ..granularity import Granularity
from ..registry import register
from ..select import keep_count, select
from .base import Solved
from .curvature import Curvature

_STRIP = 32  # columns swept at a time


@register("solver", paper="2301.00774", chooses="mask")
def sparsegpt(
    weight: Tensor, curvature: Curvature, keep: float, granularity: Granularity, *, damp: float = 0.01, block: int = 128
) -> Solved:
    """Choose the mask block by block of columns and update the columns to the right after each removal.

    :: s = w^2 / [U]_jj^2,  w_right <- w_right - (w_j / U_jj) U_j,right,  H^-1 = U^T U

    Choose it for one-shot pruning of language models with calibration data: near wanda's cost, lower
    error, most of all at high sparsity and with N:M.

    Beware: the weights move, so a later step must not assume the dense values; the calibration text
    should resemble the text in use.

    Source: Frantar and Alistarh, SparseGPT, arXiv 2301.00774, algorithm 1.
    """
    shape = (weight.shape[0], weight.shape[1])
    columns = shape[1]
    units = granularity.pool_shape(*shape)[1]
    upper = curvature.inverse_factor(damp)
    diagonal = upper.diagonal()
    update = upper / diagonal[:, None]
    weigh = 1.0 / diagonal.square()
    w = weight.clone()
    w[:, curvature.dead] = 0
    mask = torch.ones(shape, dtype=torch.bool, device=w.device)
    run = granularity.run
    chosen = None if granularity.keep is None else keep_count(keep, units)
    width = max(run, block // run * run)
    quota = _Quota(granularity, shape, keep)
    for a in range(0, columns, width):
        b = min(a + width, columns)
        if chosen is None:
            mask[:, a:b] = quota.mask(w[:, a:b].square() * weigh[a:b], a, b)
        lost = _sweep(w[:, a:b], mask[:, a:b], update[a:b, a:b], weigh[a:b], run, chosen)
        if b < columns:
            w[:, b:].addmm_(lost, update[a:b, b:], alpha=-1)
    w *= mask
    return Solved(w, mask, tuple(curvature.notes))


class _Quota:
    """How many units each block of columns keeps, so that the whole matrix keeps exactly its count."""

    def __init__(self, granularity: Granularity, shape: tuple[int, int], keep: float) -> None:
        self.granularity = granularity
        self.columns = shape[1]
        self.count = keep_count(keep, granularity.pool_shape(*shape)[1])
        self.done = 0

    def mask(self, score: Tensor, a: int, b: int) -> Tensor:
        """The mask of columns ``a:b``: the pool's share of its quota up to ``b``."""
        due = round(self.count * b / self.columns) if b < self.columns else self.count
        pooled = self.granularity.pool(score)
        take = min(due - self.done, pooled.shape[1])
        self.done += take
        return self.granularity.unpool(select(pooled, take), (score.shape[0], score.shape[1]))


def _sweep(w: Tensor, mask: Tensor, update: Tensor, weigh: Tensor, run: int, chosen: int | None) -> Tensor:
    """Prune the columns of one block in place; returns what each column lost, ``(rows, columns)``.

    ``update`` is ``U`` with each row divided by its diagonal, ``weigh`` is one over its squared diagonal.
    ``chosen`` is N when the mask of each run of M columns is chosen as the sweep reaches it.
    """
    columns = w.shape[1]
    error = torch.empty_like(w)
    inner = max(run, _STRIP // run * run)
    for a in range(0, columns, inner):
        b = min(a + inner, columns)
        # Column-major strips: a column is contiguous, its update of the others is one outer product in cache.
        strip = w[:, a:b].t().contiguous()
        gone = torch.empty_like(strip) if chosen is not None else (~mask[:, a:b]).t().to(w.dtype, copy=True)
        gone = gone.contiguous()
        lost = torch.empty_like(strip)
        local = update[a:b, a:b]
        columns_of, gone_of, lost_of, row_of = strip.unbind(), gone.unbind(), lost.unbind(), local.unbind()
        last = b - a - 1
        for j in range(b - a):
            if chosen is not None and j % run == 0:
                score = strip[j : j + run].square().mul_(weigh[a + j : a + j + run, None]).t()
                kept = select(score, chosen)
                mask[:, a + j : a + j + run] = kept
                gone[j : j + run] = ~kept.t()
            torch.mul(columns_of[j], gone_of[j], out=lost_of[j])
            if j < last:
                strip[j + 1 :].addr_(row_of[j][j + 1 :], lost_of[j], alpha=-1)
        w[:, a:b] = strip.t()
        error[:, a:b] = lost.t()
        if b < columns:
            w[:, b:].addmm_(error[:, a:b], update[a:b, b:], alpha=-1)
    return error
