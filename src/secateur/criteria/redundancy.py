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


@register("criterion", family="redundancy", paper="2002.10179", of="map")
def hrank(map_rank: Tensor) -> Tensor:
    """The rank of a feature map, on average over images.

    :: s_c = mean over images of rank(F_c)

    Choose it for convolutional networks, with a few hundred images and no labels.

    Beware: ranks of small or all positive maps tell little; ties go to the earlier channel.

    >>> hrank(torch.tensor([4.0, 1.0])).tolist()
    [4.0, 1.0]

    Source: Lin et al., HRank, arXiv 2002.10179, section 3; the maps are those that the next layer reads.
    """
    return map_rank


@register("criterion", family="redundancy", paper="2110.13981", of="map")
def chip(map_independence: Tensor) -> Tensor:
    """How much of the nuclear norm of all feature maps together goes with one.

    :: s_c = mean over images of ||A||_* - ||A without row c||_*

    Choose it for convolutional networks: a map that the others span is redundant, whatever its size.

    Beware: an eigenvalue problem for each channel and image; a few dozen images do.

    >>> chip(torch.tensor([0.5, 0.0])).tolist()
    [0.5, 0.0]

    Source: Sui et al., CHIP: channel independence-based pruning, arXiv 2110.13981, and its official code.
    """
    return map_independence
