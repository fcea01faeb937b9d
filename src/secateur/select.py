"""The only place that ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import NumericalError


def keep_count(keep: float, units: int) -> int:
    """How many of ``units`` stay when the fraction ``keep`` stays: ``round(keep * units)``, half up."""
    return min(units, max(0, int(keep * units + 0.5 + 1e-9)))


def is_finite(x: Tensor) -> bool:
    """Whether no element is NaN or infinite; one pass over memory in the common case."""
    return bool(torch.isfinite(x.sum())) or bool(torch.isfinite(x).all())


def select(score_pu: Tensor, keep: float | int) -> Tensor:
    """Keep the highest scores of every pool, by count and never by threshold.

    Args:
        score_pu: scores, float, shape ``(pools, units)``; higher means keep.
        keep: the fraction that stays (float), or the number that stays (int), in each pool.

    Returns:
        Boolean mask of the same shape; exactly ``round(keep * units)`` True in each row, ties go to
        the earlier index.

    Raises:
        NumericalError: a score is NaN.

    >>> select(torch.tensor([[1.0, 1.0, 1.0, 1.0]]), 0.5).tolist()
    [[True, True, False, False]]
    """
    # The sum of finite scores is no NaN; +inf and -inf together are why the elements are looked at then.
    if bool(torch.isnan(score_pu.sum())) and bool(torch.isnan(score_pu).any()):
        raise NumericalError("a score is NaN: the weights or the calibration activations are not finite")
    pools, units = score_pu.shape
    count = keep if isinstance(keep, int) else keep_count(keep, units)
    if count >= units or count <= 0 or pools == 0:
        return torch.full_like(score_pu, count >= units, dtype=torch.bool)
    # The count-th largest value, then ties by position. Cheaper than a stable sort of everything.
    if units <= 4096:
        edge = torch.topk(score_pu, count, dim=1, sorted=False).values.amin(1, keepdim=True)
    else:
        edge = torch.kthvalue(score_pu, units - count + 1, dim=1, keepdim=True).values
    above = score_pu > edge
    at_edge = score_pu == edge
    missing = count - above.sum(1, keepdim=True)
    rank_at_edge = torch.cumsum(at_edge, 1, dtype=torch.int32)
    return above | (at_edge & (rank_at_edge <= missing))
