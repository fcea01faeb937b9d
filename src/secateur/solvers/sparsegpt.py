"""One-shot column sweep with optimal brain surgeon updates."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from ..errors import RecipeError
from ..granularity import Granularity
from ..registry import register
from ..select import keep_count, select
from .base import Solved
from .curvature import Curvature

_STRIP = 32  # columns swept at a time


@register("solver", paper="2301.00774", chooses="mask", integers="sparsegpt-gptq")
def sparsegpt(
    weight: Tensor,
    curvature: Curvature,
    keep: float,
    granularity: Granularity,
    mask: Tensor | None = None,
    *,
    damp: float = 0.01,
    block: int = 128,
) -> Solved:
    """Choose the mask block by block of columns and update the columns to the right after each removal.

    :: s = w^2 / [U]_jj^2,  w_right <- w_right - (w_j / U_jj) U_j,right,  H^-1 = U^T U

    Choose it for one-shot pruning of language models with calibration data: near wanda's cost, lower
    error, most of all at high sparsity and with N:M.

    Beware: the weights move, so a later step must not assume the dense values; the calibration text
    should resemble the text in use. What an earlier round took stays away; blocks of columns then keep in
    proportion to what they have left.

    Source: Frantar and Alistarh, SparseGPT, arXiv 2301.00774, algorithm 1.
    """
    return sweep(weight, curvature, keep, granularity, damp, block, held=mask)


class Snap(Protocol):
    """What survivors are rounded to as the sweep passes them."""

    #: Columns that begin together; a strip of the sweep ends where they do.
    group: int

    def begin(self, weight: Tensor, mask: Tensor) -> None:
        """A group begins: its columns as pruning alone would leave them, and their mask."""

    def column(self, weight: Tensor, index: int) -> Tensor:
        """The values nearest to those of a column."""


def sweep(
    weight: Tensor,
    curvature: Curvature,
    keep: float,
    granularity: Granularity,
    damp: float,
    block: int,
    *,
    snap: Snap | None = None,
    given: Tensor | None = None,
    held: Tensor | None = None,
) -> Solved:
    """Pass over the columns; what each loses goes into the columns that follow.

    Args:
        snap: what the survivors are rounded to; what rounding takes is made up for like what pruning takes.
        given: the mask, where it is chosen already.
        held: what an earlier round left: nothing else is chosen.
    """
    held = None if held is None or given is not None or bool(held.all()) else held
    shape = (weight.shape[0], weight.shape[1])
    columns = shape[1]
    units = granularity.pool_shape(*shape)[1]
    upper = curvature.inverse_factor(damp)
    diagonal = upper.diagonal()
    update = upper / diagonal[:, None]
    weigh = 1.0 / diagonal.square()
    w = weight.clone()
    w[:, curvature.dead] = 0
    mask = torch.ones(shape, dtype=torch.bool, device=w.device) if given is None else given.clone()
    run = granularity.run
    chosen = None if granularity.keep is None or given is not None else keep_count(keep, units)
    whole = run if snap is None or snap.group > block or snap.group % run else snap.group
    width = max(whole, block // whole * whole)  # a group begins when all before it has been made up for
    quota = _Quota(granularity, shape, keep, held)
    for a in range(0, columns, width):
        b = min(a + width, columns)
        if chosen is None and given is None:
            mask[:, a:b] = quota.mask(w[:, a:b].square() * weigh[a:b], a, b)
        lost = _sweep(w, mask, update, weigh, run, chosen, a, b, snap, held)
        if b < columns:
            w[:, b:].addmm_(lost, update[a:b, b:], alpha=-1)
    w *= mask
    return Solved(w, mask, tuple(curvature.notes))


class _Quota:
    """How many units each block of columns keeps, so that the whole matrix keeps exactly its count."""

    def __init__(
        self, granularity: Granularity, shape: tuple[int, int], keep: float, held: Tensor | None = None
    ) -> None:
        self.granularity = granularity
        self.columns = shape[1]
        self.count = keep_count(keep, granularity.pool_shape(*shape)[1])
        self.done = 0
        self.held = held
        if held is not None and granularity.pool_shape(*shape)[0] > 1:
            left = granularity.pool(held.float()).sum(1)
            if bool((left != left[0]).any()):
                raise RecipeError(
                    f"granularity '{granularity.name}': earlier steps left unequal numbers in its pools, and a sweep "
                    "needs equal ones: choose granularity element, or a solver that ranks"
                )

    def mask(self, score: Tensor, a: int, b: int) -> Tensor:
        """The mask of columns ``a:b``: the pool's share of its quota up to ``b``."""
        share = b / self.columns
        if self.held is not None:
            score = score.masked_fill(~self.held[:, a:b], -torch.inf)
            share = int(self.held[:, :b].count_nonzero()) / max(int(self.held.count_nonzero()), 1)
        due = round(self.count * share) if b < self.columns else self.count
        pooled = self.granularity.pool(score)
        take = min(due - self.done, pooled.shape[1])
        self.done += take
        return self.granularity.unpool(select(pooled, take), (score.shape[0], score.shape[1]))


def _sweep(
    whole: Tensor,
    mask_of: Tensor,
    update: Tensor,
    weigh: Tensor,
    run: int,
    chosen: int | None,
    start: int,
    stop: int,
    snap: Snap | None = None,
    held: Tensor | None = None,
) -> Tensor:
    """Prune the columns ``start:stop`` in place; returns what each column lost, ``(rows, columns)``.

    ``update`` is ``U`` with each row divided by its diagonal, ``weigh`` is one over its squared diagonal.
    ``chosen`` is N when the mask of each run of M columns is chosen as the sweep reaches it, among what ``held`` has.
    """
    w, mask = whole[:, start:stop], mask_of[:, start:stop]
    if snap is not None:
        ahead = partial(_ahead, whole, mask_of, update, weigh, run, chosen, held=held)
    update, weigh = update[start:stop, start:stop], weigh[start:stop]
    columns = w.shape[1]
    error = torch.empty_like(w)
    for a, b in _strips(start, stop, run, 0 if snap is None else snap.group):
        # Column-major strips: a column is contiguous, its update of the others is one outer product in cache.
        strip = w[:, a:b].t().contiguous()
        gone = torch.empty_like(strip) if chosen is not None else (~mask[:, a:b]).t().to(w.dtype, copy=True)
        gone = gone.contiguous()
        lost = torch.empty_like(strip)
        local = update[a:b, a:b]
        columns_of, gone_of, lost_of, row_of = strip.unbind(), gone.unbind(), lost.unbind(), local.unbind()
        last = b - a - 1
        if snap is not None and (start + a) % snap.group == 0:
            snap.begin(*ahead(start + a, start + a + snap.group))
        for j in range(b - a):
            if chosen is not None and j % run == 0:
                score = strip[j : j + run].square().mul_(weigh[a + j : a + j + run, None]).t()
                if held is not None:
                    score = score.masked_fill(~held[:, start + a + j : start + a + j + run], -torch.inf)
                kept = select(score, chosen)
                mask[:, a + j : a + j + run] = kept
                gone[j : j + run] = ~kept.t()
            torch.mul(columns_of[j], gone_of[j], out=lost_of[j])
            if snap is not None:
                kept_of = snap.column(columns_of[j] - lost_of[j], start + a + j)
                torch.sub(columns_of[j], kept_of, out=lost_of[j])
                columns_of[j].copy_(kept_of)
            if j < last:
                strip[j + 1 :].addr_(row_of[j][j + 1 :], lost_of[j], alpha=-1)
        w[:, a:b] = strip.t()
        error[:, a:b] = lost.t()
        if b < columns:
            w[:, b:].addmm_(error[:, a:b], update[a:b, b:], alpha=-1)
    return error


def _ahead(
    whole: Tensor,
    mask_of: Tensor,
    update: Tensor,
    weigh: Tensor,
    run: int,
    chosen: int | None,
    a: int,
    b: int,
    held: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The columns ``a:b`` as pruning alone would leave them, and their mask; nothing is changed."""
    w, mask = whole[:, a:b].clone(), mask_of[:, a:b].clone()
    _sweep(w, mask, update[a:b, a:b], weigh[a:b], run, chosen, 0, b - a, held=None if held is None else held[:, a:b])
    return w.mul_(mask), mask


def _strips(start: int, stop: int, run: int, group: int) -> Iterator[tuple[int, int]]:
    """Cut a block into strips of whole runs, and where a group begins; positions count from ``start``."""
    a, inner = start, max(run, _STRIP // run * run)
    while a < stop:
        b = min(a + inner, stop, a // group * group + group if group else stop)
        yield a - start, b - start
        a = b
