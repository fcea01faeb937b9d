"""Exact greedy optimal brain surgeon for layers that are small enough."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import RecipeError
from ..granularity import Granularity
from ..registry import register
from ..select import keep_count, select
from .base import Solved
from .curvature import Curvature


@register("solver", paper="2208.11580", chooses="mask", integers="obq")
def obc(
    weight: Tensor,
    curvature: Curvature,
    keep: float,
    granularity: Granularity,
    *,
    damp: float = 0.01,
    chunk: int = 32,
    max_flops: float = 4e11,
) -> Solved:
    """Remove one weight at a time from each row, the one that costs least, with exact updates (ExactOBS).

    :: p = argmin w_p^2 / [H^-1]_pp;  w <- w - w_p / [H^-1]_pp H^-1_:p;  H^-1 <- H^-1 - H^-1_:p H^-1_p: / [H^-1]_pp

    With ``element`` each row is run to its end and the weights of all rows are removed in the order of
    their losses; with ``row`` and N:M each row stops at its count.

    Choose it for small layers (convolutions, heads, up to about 256 inputs) where the last bit of
    accuracy matters, and as the yardstick of the faster solvers.

    Beware: about ``2 o i^3`` operations in float64; a layer above ``max_flops`` is refused.

    Source: Frantar, Singh, Alistarh, Optimal brain compression, arXiv 2208.11580, algorithms 1 and 2.
    """
    rows, columns = shape = (weight.shape[0], weight.shape[1])
    pools, units, elements = granularity.pool_shape(*shape)
    if elements != 1:
        raise RecipeError(
            f"solver 'obc' removes single weights, and granularity '{granularity.name}' has units of {elements}: "
            "use solver 'sparsegpt'"
        )
    count = keep_count(keep, units)
    across = pools != rows and granularity.keep is None  # all rows compete
    steps = columns if across else columns - pools // rows * count
    if 2.0 * rows * steps * columns**2 > max_flops:
        raise RecipeError(
            f"solver 'obc' would need {2.0 * rows * steps * columns**2:.0e} operations for a layer of "
            f"{rows}x{columns}: use solver 'sparsegpt', or raise max_flops"
        )
    upper = curvature.inverse_factor(damp).double()
    inverse = upper.t() @ upper
    w = weight.double()
    w[:, curvature.dead] = 0
    group = columns if granularity.keep is None else units
    quota = columns if granularity.keep is None else units - count
    order, cost = [], []
    for a in range(0, rows, chunk):
        found = _eliminate(w[a : a + chunk], inverse, steps, group, quota)
        order.append(found[0])
        cost.append(found[1])
    order_os, cost_os = torch.cat(order), torch.cat(cost)
    gone = torch.ones_like(cost_os, dtype=torch.bool)
    if across:
        # A cheap removal that lies behind a dear one waits for it: the running maximum keeps the order.
        trace = torch.cummax(cost_os, dim=1).values
        gone = select(-trace.reshape(1, -1), rows * columns - count).reshape(trace.shape)
    mask = torch.ones(shape, dtype=torch.bool, device=w.device)
    mask.scatter_(1, order_os, ~gone)
    solved = torch.cat([_compensate(w[a : a + chunk], mask[a : a + chunk], inverse) for a in range(0, rows, chunk)])
    return Solved(solved.float() * mask, mask, tuple(curvature.notes))


def _eliminate(w: Tensor, inverse: Tensor, steps: int, group: int, quota: int) -> tuple[Tensor, Tensor]:
    """The order in which weights leave each row and what each costs, ``(rows, steps)`` both.

    No run of ``group`` columns loses more than ``quota``.
    """
    rows, columns = w.shape
    w = w.clone()
    h = inverse.repeat(rows, 1, 1)
    r = torch.arange(rows, device=w.device)
    closed = torch.zeros_like(w, dtype=torch.bool)
    left = torch.full((rows, columns // group), quota, device=w.device)
    order = torch.empty((rows, steps), dtype=torch.long, device=w.device)
    cost = torch.empty((rows, steps), dtype=w.dtype, device=w.device)
    for step in range(steps):
        score = w.square() / h.diagonal(dim1=1, dim2=2)
        score[closed] = float("inf")
        least, p = score.min(1)
        order[:, step], cost[:, step] = p, least
        column = h[r, p]
        d = column[r, p]
        w.addcmul_(column, (w[r, p] / d)[:, None], value=-1)
        h.baddbmm_(column[:, :, None], (column / d[:, None])[:, None, :], alpha=-1)
        h[r, p, p] = 1.0  # what is left there is rounding; one is safe to divide by
        w[r, p] = 0
        closed[r, p] = True
        left[r, p // group] -= 1
        if group < columns:
            closed |= (left <= 0).repeat_interleave(group, dim=1)
    return order, cost


def _compensate(w: Tensor, mask: Tensor, inverse: Tensor) -> Tensor:
    """The best survivors for the mask: ``w - H^-1[:, gone] (H^-1[gone, gone])^-1 w[gone]`` in every row."""
    gone = (~mask).double()
    inner = inverse * gone[:, :, None] * gone[:, None, :] + torch.diag_embed(mask.double())
    multiplier = torch.cholesky_solve((w * gone)[:, :, None], torch.linalg.cholesky(inner))[:, :, 0]
    return w - (multiplier * gone) @ inverse
