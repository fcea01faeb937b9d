"""Criteria that look at a layer's inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from ..registry import register


@register("criterion", family="activation", paper="2306.11695", scales={"weight": 1, "input_norm": 1})
def wanda(weight: Tensor, input_norm: Tensor) -> Tensor:
    """The size of a weight times the norm of the input it reads.

    :: s = |w| ||x||_2

    Choose it for one-shot pruning of language models: as cheap as magnitude, near sparsegpt up to 50 %.

    Beware: it is meant to be compared within an output row (granularity row or N:M).

    >>> import torch
    >>> wanda(torch.tensor([[-2.0, 1.0]]), torch.tensor([0.5, 3.0])).tolist()
    [[1.0, 3.0]]

    Source: Sun et al., Wanda, arXiv 2306.11695, equation 1.
    """
    return weight.abs() * input_norm


@register("criterion", family="activation", scales={"weight": 0})
def ria(weight: Tensor, input_norm: Tensor, *, a: float = 0.5) -> Tensor:
    """A weight's share of its row and of its column, times a power of the norm of its input.

    :: s = (|w| / sum_row |w| + |w| / sum_column |w|) ||x||_2^a

    Choose it for one-shot pruning of language models at 2:4 or 50 % and more: no channel is emptied.

    Beware: shares do not compare between layers of different sizes, so not for a global ranking. The official
    code divides the norm by the square root of the number of samples: a constant in each layer.

    >>> import torch
    >>> ria(torch.tensor([[-2.0, 2.0], [0.0, 2.0]]), torch.tensor([4.0, 16.0])).tolist()
    [[3.0, 4.0], [0.0, 6.0]]

    Source: Zhang et al., Plug-and-play (RIA), ICLR 2024, and lib/prune.py of the official code.
    """
    size = weight.abs()
    # A row or column of zeros has no shares: 0 / tiny is 0 where 0 / 0 would be NaN.
    tiny = torch.finfo(size.dtype).tiny
    share = size / size.sum(1, keepdim=True).clamp_min(tiny) + size / size.sum(0, keepdim=True).clamp_min(tiny)
    return share * input_norm.pow(a)


@register("criterion", name="activation-norm", family="activation", paper="1611.06440", scales={"input_norm": 1})
def activation_norm(weight: Tensor, input_norm: Tensor) -> Tensor:
    """The norm of the input a weight reads, whatever the weight.

    :: s = ||x||_2

    Choose it for a contrast with wanda and magnitude: it shows what the activations alone can tell.

    Beware: all weights of an input feature tie, and ties go to the earlier output. So use granularity row or N:M,
    where they never compete; under element one feature is cut in part.

    >>> import torch
    >>> activation_norm(torch.tensor([[-2.0, 1.0], [1.0, 1.0]]), torch.tensor([0.5, 3.0])).tolist()
    [[0.5, 3.0], [0.5, 3.0]]

    Source: Molchanov et al., Pruning convolutional neural networks, arXiv 1611.06440, section 2.2 (activation).
    """
    return torch.ones_like(weight) * input_norm


@register("criterion", family="activation", paper="2312.11983", scales={"weight": 2, "input_var": 1})
def fluctuation(weight: Tensor, input_var: Tensor) -> Tensor:
    """The variance of the input a weight reads, times the squared weight.

    :: s = var(x) w^2

    Choose it for structured pruning of language models with granularity channel: an input that hardly varies can
    be replaced by its mean, which a bias carries.

    Beware: it presumes that the mean is made up for; without recovery refit or a bias it underrates inputs with a
    large mean.

    >>> import torch
    >>> fluctuation(torch.tensor([[-2.0, 1.0]]), torch.tensor([0.5, 3.0])).tolist()
    [[2.0, 3.0]]

    Source: An et al., FLAP, arXiv 2312.11983, equation 5 (WIFV), summed over a unit's weights.
    """
    return weight.square() * input_var


@register("criterion", name="activation-mean", family="activation", paper="2407.14679", scales={"input_abs": 1})
def activation_mean(weight: Tensor, input_abs: Tensor) -> Tensor:
    """The mean size of the input a weight reads, whatever the weight.

    :: s = E|x|

    Choose it for structured pruning of language models with granularity channel, when training follows.

    Beware: what a layer does with the input is not looked at.

    >>> import torch
    >>> activation_mean(torch.tensor([[-2.0, 1.0]]), torch.tensor([0.5, 3.0])).tolist()
    [[0.5, 3.0]]

    Source: Muralidharan et al., Minitron, arXiv 2407.14679, section 2.2 (activation-based importance, mean).
    """
    return torch.ones_like(weight) * input_abs


@register("criterion", family="activation", paper="1607.03250", scales={"input_nonzero": 1})
def apoz(weight: Tensor, input_nonzero: Tensor) -> Tensor:
    """How often the input a weight reads is not zero.

    :: s = 1 - APoZ = P(x != 0)

    Choose it for networks with ReLU and granularity channel: units that rarely fire go first.

    Beware: without ReLU nothing is ever zero, and all units tie.

    >>> import torch
    >>> apoz(torch.tensor([[-2.0, 1.0]]), torch.tensor([0.25, 1.0])).tolist()
    [[0.25, 1.0]]

    Source: Hu et al., Network trimming, arXiv 1607.03250, equation 1.
    """
    return torch.ones_like(weight) * input_nonzero
