"""Layer-wise reconstruction under a count constraint, by the alternating direction method of multipliers."""

from __future__ import annotations

import torch
from torch import Tensor

from ..granularity import Granularity
from ..registry import register
from ..select import select
from .base import Solved
from .curvature import Curvature, output_error
from .least_squares import refit
from .sparsegpt import sparsegpt

_EVERY = 3  # iterations between two updates of rho
_FULL = 30  # iterations for which the paper's growth of rho is meant; fewer get a steeper one


@register("solver", paper="2406.07831", chooses="mask")
def admm(
    weight: Tensor,
    curvature: Curvature,
    keep: float,
    granularity: Granularity,
    *,
    damp: float = 0.01,
    iterations: int = 30,
    rho: float = 0.1,
    refit_iterations: int = 20,
) -> Solved:
    """Alternate between the best dense fit and the nearest sparse matrix, then re-fit the survivors (ALPS).

    :: B = (G - V + rho D)(H + rho I)^-1,  D = project(B + V / rho),  V <- V + rho (B - D),  G = W H

    ``H`` is scaled to a unit diagonal, and ``rho`` grows as long as the support still changes.

    Choose it for the lowest layer error of the one-shot solvers, most of all at high sparsity and with
    N:M; the error on the calibration data is never above that of `sparsegpt` at the same ``damp``.

    Beware: some tens of matrix products for each layer, ten to twenty times the time of `sparsegpt`;
    fewer ``iterations`` make ``rho`` grow faster and trade error for time.

    Source: Meng, Behdin, Wang, Mazumder, ALPS, arXiv 2406.07831.
    """
    shape = (weight.shape[0], weight.shape[1])
    floor = sparsegpt(weight, curvature, keep, granularity, damp=damp)
    if iterations < 1:
        return floor
    size = curvature.gram.diagonal().sqrt()
    scale = torch.where(curvature.dead, 0.0, 1.0 / size)
    values, vectors = curvature.eigh()
    values = values.clamp_min(0.0) + damp
    dense = weight * size
    goal = (weight @ curvature.gram).mul_(scale).add_(dense, alpha=damp)
    steeper = max(1.0, _FULL / iterations)

    def project(x: Tensor) -> Tensor:
        return granularity.unpool(select(granularity.pool(x.square()), keep), shape)

    def inverse() -> Tensor:
        return (vectors / (values + rho)) @ vectors.t()

    first = mask = project(dense)
    survivors = max(int(mask.sum()), 1)
    d = dense * mask
    v = torch.zeros_like(dense)
    b, solve = d, inverse()
    growing = False
    for step in range(1, iterations + 1):
        b = torch.add(goal, d, alpha=rho).sub_(v) @ solve
        d = torch.add(b, v, alpha=1 / rho)
        support = project(d)
        d.mul_(support)
        v.add_(b, alpha=rho).sub_(d, alpha=rho)
        if step % _EVERY:
            continue
        changed = int((support ^ mask).sum())
        mask = support
        share = changed / survivors
        if share > 0.005 or (changed and growing):
            growing = True
            rho *= (1.3 if share > 0.1 else 1.2 if share > 0.005 else 1.1) ** steeper
        elif growing:
            break
        else:  # rho was so large that the support could not move: begin again with a smaller one
            rho /= 5
            if changed:
                mask, d = first, dense * first
                v.zero_()
        solve = inverse()
    mask = project(b)
    start = b.mul_(mask).mul_(scale)
    solved = refit(weight, mask, curvature, start=start, iterations=refit_iterations)
    if output_error(weight, solved, curvature.gram) > output_error(weight, floor.weight, curvature.gram):
        moved = refit(weight, floor.mask, curvature, start=floor.weight, iterations=refit_iterations)
        return Solved(moved, floor.mask, (*floor.notes, "admm ended above sparsegpt: took sparsegpt's mask, re-fitted"))
    return Solved(solved, mask, floor.notes)
