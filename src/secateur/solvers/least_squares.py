"""Re-fit of the survivors on a fixed support."""

from __future__ import annotations

import torch
from torch import Tensor

from ..granularity import Granularity
from ..registry import register
from ..select import select
from .base import Solved
from .curvature import Curvature


def refit(
    weight_target: Tensor,
    mask: Tensor,
    curvature: Curvature,
    *,
    damp: float = 0.0,
    iterations: int = 50,
    tol: float = 1e-3,
    start: Tensor | None = None,
) -> Tensor:
    """Minimize ``||(w - w') X||^2 + damp * mean(diag H) ||w - w'||^2`` over ``w'`` that is zero off the mask.

    All rows at once by conjugate gradients with the diagonal as preconditioner: one matrix product for
    each iteration, where a factorization for each row would cost ``o k^3 / 3``.

    Args:
        weight_target: ``(o, i)``, whose outputs are to be kept.
        mask: ``(o, i)`` bool, True keeps.
        curvature: of the layer's input.
        damp: weight of the pull towards ``weight_target``.
        iterations: at most so many.
        tol: stop when an iteration lowers the error by less than this fraction of it.
        start: where to start, zero off the mask; default the target itself on the mask.

    Returns:
        ``(o, i)`` float32. In no row is the output error larger than at ``start``.
    """
    h = curvature.gram if damp == 0 else curvature.damped(damp)
    # A dead feature has no gradient: with a zero preconditioner it does not move.
    inverse_diagonal = torch.where(curvature.dead, 0.0, 1.0 / h.diagonal())
    first = weight_target * mask if start is None else start * mask
    gap = weight_target - first
    pull = gap @ h
    error_o = (pull * gap).sum(1)
    x = first.clone()
    residual = pull.mul_(mask)
    z = residual * inverse_diagonal
    p = z.clone()
    rz = (residual * z).sum(1)
    error = float(error_o.sum())
    for _ in range(iterations):
        q = (p @ h).mul_(mask)
        pq = (p * q).sum(1)
        alpha = torch.where(pq > 0, rz / pq, 0.0)
        x.addcmul_(p, alpha[:, None])
        residual.addcmul_(q, alpha[:, None], value=-1)
        gain = float((alpha * rz).sum())
        error -= gain
        if not gain > tol * error:
            break
        torch.mul(residual, inverse_diagonal, out=z)
        new = (residual * z).sum(1)
        p.mul_(torch.where(rz > 0, new / rz, 0.0)[:, None]).add_(z)
        rz = new
    # Rounding, or damping when the start is not the target's, could undo the promise: keep the better row.
    gap = weight_target - x
    final_o = ((gap @ curvature.gram) * gap).sum(1)
    if damp != 0:
        gap = weight_target - first
        error_o = ((gap @ curvature.gram) * gap).sum(1)
    return torch.where((final_o <= error_o)[:, None], x, first)


@register("solver", name="least-squares", paper="2401.02938")
def least_squares(
    weight: Tensor,
    score: Tensor,
    curvature: Curvature,
    keep: float,
    granularity: Granularity,
    *,
    damp: float = 0.0,
    iterations: int = 50,
    tol: float = 1e-3,
) -> Solved:
    """Choose the mask by score, then move the survivors to the best fit of the dense layer's outputs.

    :: min_w' ||(w - w') X||^2  subject to  w' = 0 where the mask is False

    Choose it for a mask that another criterion chose well (wanda, a pattern), to get all that the
    remaining weights can give; in no row is the error above that of `rank` with the same mask.

    Beware: with fewer tokens than input features it fits the calibration text; raise ``damp`` then. It
    stops within a percent or so of the optimum; lower ``tol`` and raise ``iterations`` for more.

    Source: the problem of Boza, Fast and effective weight update for pruned LLMs, arXiv 2401.02938; solved by
    preconditioned conjugate gradients as in Meng et al., ALPS, arXiv 2406.07831.
    """
    mask = granularity.unpool(select(granularity.pool(score), keep), (weight.shape[0], weight.shape[1]))
    return Solved(refit(weight, mask, curvature, damp=damp, iterations=iterations, tol=tol), mask)
