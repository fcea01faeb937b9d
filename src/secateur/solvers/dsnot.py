"""Prune and grow without training."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import RecipeError
from ..granularity import Granularity
from ..registry import register
from ..select import select
from .base import Solved


@register("solver", paper="2310.08915")
def dsnot(
    weight: Tensor,
    score: Tensor,
    keep: float,
    granularity: Granularity,
    input_mean: Tensor,
    input_var: Tensor,
    input_norm: Tensor,
    *,
    max_cycles: int = 50,
    threshold: float = 0.1,
    pow_of_var: float = 1.0,
    length: int = 2048,
    same_sign: bool = False,
) -> Solved:
    """Swap pruned for kept weights in each row until the expected change of its output is small.

    :: e = sum_pruned w E[x];  grow argmax sign(e) w E[x] / Var[x]^p,  prune the least |w| ||x|| of the other sign

    ``e`` is summed over a sequence of ``length`` tokens before it meets ``threshold``, as in the
    authors' code. With N:M a swap stays in its group and must not turn the sign of ``e``; ``same_sign``
    asks that of the other granularities too. Every weight moves at most once, so counts stay exact.

    Choose it for a better mask at no cost in weights: after magnitude or wanda at high sparsity, where no
    weight may change.

    Beware: it looks only at the mean of the output; where inputs have mean zero there is nothing to
    correct, and it can raise the squared error.

    Source: Zhang et al., Dynamic sparse no training, arXiv 2310.08915, and the authors' code.
    """
    shape = (weight.shape[0], weight.shape[1])
    if granularity.pool_shape(*shape)[2] != 1:
        raise RecipeError(
            f"solver 'dsnot' swaps single weights, which granularity '{granularity.name}' forbids: "
            "use element, row or N:M, or solver 'sparsegpt'"
        )
    mask = granularity.unpool(select(granularity.pool(score), keep), shape).clone()
    effect = weight * (input_mean * length)
    error = torch.where(mask, 0.0, effect).sum(1)
    grow = torch.where(mask, 0.0, effect) / input_var.clamp_min(torch.finfo(torch.float32).tiny) ** pow_of_var
    value = score.clone() if granularity.keep is not None else weight.abs() * input_norm
    if granularity.keep is None:
        _swap(mask, effect, error, grow, value, max_cycles, threshold, same_sign)
    else:
        _swap_in_groups(mask, effect, error, grow, value, max_cycles, threshold, granularity.run)
    return Solved(weight * mask, mask)


def _queues(key: Tensor, most: int, descending: bool) -> Tensor:
    """Indices of the ``most`` first of each row, in order."""
    return torch.sort(key, dim=1, descending=descending, stable=True).indices[:, :most]


def _take(queues: tuple[Tensor, Tensor], used: tuple[Tensor, Tensor], upper: Tensor) -> Tensor:
    """The head of the second queue where ``upper``, else of the first; that head is used up."""
    depth = queues[0].shape[1] - 1
    heads = [q.gather(1, n.clamp_max(depth)[:, None])[:, 0] for q, n in zip(queues, used, strict=True)]
    used[0].add_(~upper)
    used[1].add_(upper)
    return torch.where(upper, heads[1], heads[0])


def _counters(rows: int, like: Tensor) -> tuple[Tensor, Tensor]:
    zero = torch.zeros(rows, dtype=torch.long, device=like.device)
    return zero, zero.clone()


def _swap(
    mask: Tensor, effect: Tensor, error: Tensor, grow: Tensor, value: Tensor, cycles: int, threshold: float, same: bool
) -> None:
    """Swap anywhere in the row; in place. A row ends when it has no candidate of the sign it needs."""
    rows, columns = mask.shape
    most = min(cycles, columns)
    if most == 0:
        return
    growing = (_queues(grow, most, False), _queues(grow, most, True))
    inf = float("inf")
    pruning = (
        _queues(torch.where(mask & (effect < 0), value, inf), most, False),
        _queues(torch.where(mask & (effect > 0), value, inf), most, False),
    )
    kept = mask.clone()
    grown_n, pruned_n = _counters(rows, mask), _counters(rows, mask)
    r = torch.arange(rows, device=mask.device)
    sign = error.sign()
    live = torch.ones_like(error, dtype=torch.bool)
    for _ in range(most):
        up = _take(growing, grown_n, error > 0)
        down = _take(pruning, pruned_n, error < 0)
        gain, loss = effect[r, up], effect[r, down]
        after = error + loss - gain
        live &= error.abs() > threshold
        live &= ~kept[r, up] & kept[r, down] & (gain * error > 0) & (loss * error < 0)
        if same:
            live &= after.sign() == sign
        if not live.any():
            return
        mask[r[live], up[live]] = True
        mask[r[live], down[live]] = False
        error = torch.where(live, after, error)


def _swap_in_groups(
    mask: Tensor, effect: Tensor, error: Tensor, grow: Tensor, value: Tensor, cycles: int, threshold: float, run: int
) -> None:
    """Swap within runs; in place. What goes is the lowest score of the group that never moved."""
    rows, columns = mask.shape
    most = min(cycles, columns)
    if most == 0:
        return
    growing = (_queues(grow, most, False), _queues(grow, most, True))
    kept = mask.clone()
    value[~mask] = float("inf")
    used = _counters(rows, mask)
    r = torch.arange(rows, device=mask.device)
    within = torch.arange(run, device=mask.device)
    sign = error.sign()
    live = torch.ones_like(error, dtype=torch.bool)
    for _ in range(most):
        up = _take(growing, used, error > 0)
        group = (up - up % run)[:, None] + within
        least = value.gather(1, group).min(1)
        down = group.gather(1, least.indices[:, None])[:, 0]
        gain, loss = effect[r, up], effect[r, down]
        after = error + loss - gain
        live &= (error.abs() > threshold) & ~kept[r, up] & (gain * error > 0)
        free = torch.isfinite(least.values)  # a group whose survivors have all moved is passed over
        live &= ~free | (after.sign() == sign)
        if not live.any():
            return
        now = live & free
        mask[r[now], up[now]] = True
        mask[r[now], down[now]] = False
        value[r[now], down[now]] = float("inf")
        error = torch.where(now, after, error)
