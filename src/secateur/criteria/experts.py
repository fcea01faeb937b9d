"""Criteria of experts: what a mixture loses when its router sends nobody to one."""

from __future__ import annotations

import torch
from torch import Tensor

from ..registry import register


@register("criterion", name="expert-frequency", family="activation", paper="2310.01334", of="expert")
def expert_frequency(expert_tokens: Tensor) -> Tensor:
    """How often the router chooses an expert.

    :: s_j = |{x : j in topk(g(x))}|

    Choose it as the baseline of expert pruning: it needs nothing but the routing.

    Beware: an expert that is seldom chosen may matter where it is.

    >>> expert_frequency(torch.tensor([3, 0])).tolist()
    [3.0, 0.0]

    Source: the usage frequency of Li et al., MC-SMoE, arXiv 2310.01334, section 3.2, here for pruning; a baseline
    of Lasby et al., REAP, arXiv 2510.13999.
    """
    return expert_tokens.to(torch.float32)


@register("criterion", family="activation", paper="2510.13999", of="expert")
def reap(expert_gain: Tensor) -> Tensor:
    """What an expert adds to the hidden state on average, where it is chosen: routing weight times output norm.

    :: s_j = mean over x in X_j of g_j(x) ||f_j(x)||_2

    Choose it for mixture-of-experts language models: it looks at what the experts compute, not at how often alone.

    Beware: an expert that no calibration token reaches scores 0; give enough data.

    >>> reap(torch.tensor([0.5, 0.0])).tolist()
    [0.5, 0.0]

    Source: Lasby et al., REAP the experts, arXiv 2510.13999, equation 9.
    """
    return expert_gain
