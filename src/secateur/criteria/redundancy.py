"""Criteria that look for what others already do."""

from __future__ import annotations

import torch
from torch import Tensor

from ..registry import register


@register("criterion", family="redundancy", paper="1811.00250", scales={"weight": 1})
def fpgm(weight: Tensor) -> Tensor:
    """The sum of the distances of a filter to all filters of its layer, shared out evenly over its weights.

    :: s_i = sum_j ||w_i - w_j||_2

    Choose it with granularity filter where filters' norms are alike: near the geometric median a filter can be
    replaced by the others.

    Beware: a filter of zeros is not the first to go.

    >>> fpgm(torch.tensor([[0.0], [1.0], [3.0]])).tolist()
    [[4.0], [3.0], [5.0]]

    Source: He et al., Filter pruning via geometric median, arXiv 1811.00250, equation 4 and the official code.
    """
    rows = weight.double()
    distance = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").sum(1, keepdim=True)
    return (distance / weight.shape[1]).expand(weight.shape).to(weight.dtype).clone()


@register("criterion", name="norm-scale", family="norm", paper="1708.06519", of="norm", scales={"scale": 1})
def norm_scale(scale: Tensor) -> Tensor:
    """The size of the scale of the normalization behind a unit.

    :: s = |gamma|

    ``scale`` is ``(units,)``, the weight of a batch, layer or group norm.

    Choose it for networks trained with a penalty on their batch norms' scales.

    Beware: without such training scales tell little; units with no normalization behind them are left alone.

    >>> norm_scale(torch.tensor([-2.0, 1.0])).tolist()
    [2.0, 1.0]

    Source: Liu et al., Network slimming, arXiv 1708.06519, section 3.
    """
    return scale.abs()
