"""Criteria of the channels of one input, scored as the model computes them, or before it does."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import linear

from ..registry import register


@register(
    "criterion", name="predicted-saliency", family="activation", paper="1810.05331", of="channel", survey=("B4", "C1.3")
)
def predicted_saliency(channel_size: Tensor, gate_weight: Tensor, gate_bias: Tensor) -> Tensor:
    """How salient each channel that a convolution can make will be, predicted from the size of those that it reads.

    :: g(x) = (ss(x) phi + rho)_+,  ss(x)_c = mean |x_c|

    ``channel_size`` is ``(batch, inputs)``, the gate's weight ``(outputs, inputs)``: it is learned with the model.

    Choose it to leave out channels before they are computed (fbs).

    Beware: a fresh gate knows nothing; it wants training.

    >>> import torch
    >>> size = torch.tensor([[2.0, 1.0]])
    >>> predicted_saliency(size, torch.tensor([[1.0, 0.0], [0.0, -3.0]]), torch.ones(2)).tolist()
    [[3.0, 0.0]]

    Source: Gao et al., Dynamic channel pruning: feature boosting and suppression, arXiv 1810.05331, equations 5 and 6,
    read in the official code (mayo).
    """
    return linear(channel_size.float(), gate_weight.float(), gate_bias.float()).relu()


@register(
    "criterion", name="channel-peak", family="activation", paper="2110.08232", of="channel", survey=("B4", "C1.3")
)
def channel_peak(channel_map: Tensor) -> Tensor:
    """How strongly a channel fires somewhere in the picture.

    :: s_c = max over positions of |a_c|

    ``channel_map`` is ``(..., channels, positions)``.

    Choose it for what a channel was worth to an input, once it is computed: a gate learns to foretell it (ftwt).

    Beware: one bright point is enough.

    >>> import torch
    >>> channel_peak(torch.tensor([[[1.0, -4.0], [2.0, 2.0]]])).tolist()
    [[4.0, 2.0]]

    Source: Elkerdawy et al., Fire together wire together, arXiv 2110.08232, the official code's criterion of heatmaps.
    """
    return channel_map.float().abs().amax(-1)
