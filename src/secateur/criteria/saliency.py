"""Criteria that look at first derivatives of the loss."""

from __future__ import annotations

from torch import Tensor

from ..registry import register


@register("criterion", family="saliency", paper="1810.02340", scales={"weight": 1, "gradient": 1})
def saliency(weight: Tensor, gradient: Tensor) -> Tensor:
    """How much the loss moves, to first order, when the weight goes: SNIP's score and the Taylor score alike.

    :: s = |w dL/dw|

    Choose it for pruning at initialization (SNIP) and for ranking weights of all layers together.

    Beware: near a minimum gradients cancel over batches and the score is noise; then use fisher. SNIP divides
    by the sum over the network and Molchanov et al. square: neither changes the order of single weights.

    >>> import torch
    >>> saliency(torch.tensor([[-2.0, 1.0]]), torch.tensor([[0.5, 3.0]])).tolist()
    [[1.0, 3.0]]

    Source: Lee et al., SNIP, arXiv 1810.02340; Molchanov et al., Importance estimation,
    arXiv 1906.10771.
    """
    return (weight * gradient).abs()


@register("criterion", family="saliency", scales={"gradient": 1})
def gradient(gradient: Tensor) -> Tensor:
    """The size of the gradient, whatever the weight.

    :: s = |dL/dw|

    Choose it for growing connections (the weights that are zero now and want to move), as RigL does.

    Beware: as a criterion for removal it ignores what the weight does now.

    >>> import torch
    >>> gradient(torch.tensor([[-2.0, 1.0]])).tolist()
    [[2.0, 1.0]]

    Source: Evci et al., RigL, arXiv 1911.11134, section 3 (4), where it chooses what to grow.
    """
    return gradient.abs()
