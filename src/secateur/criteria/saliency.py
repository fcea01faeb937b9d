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

    >>> gradient(torch.tensor([[-2.0, 1.0]])).tolist()
    [[2.0, 1.0]]

    Source: Evci et al., RigL, arXiv 1911.11134, section 3 (4), where it chooses what to grow.
    """
    return gradient.abs()


@register("criterion", name="group-fisher", family="saliency", paper="2108.00708", of="unit", scales={"unit_change": 2})
def group_fisher(unit_change: Tensor) -> Tensor:
    """The mean squared first-order change of the loss without the unit: the Fisher information of its mask.

    :: s_u = 1 / 2 mean over batches of (sum over its weights of w dL/dw)^2

    Choose it with granularity channel when there are labels: terms of one unit may cancel, as they do in the model.

    Beware: give batches of one example for the textbook's Fisher. Liu et al. divide by the memory that goes.

    >>> group_fisher(torch.tensor([[1.0, 2.0], [-1.0, 0.0]])).tolist()
    [0.5, 1.0]

    Source: Liu et al., Group Fisher pruning, arXiv 2108.00708, and its official code: at the inputs of layers, summed
    over coupled ones before it is squared. Molchanov et al., arXiv 1906.10771, is the same without the half.
    """
    return unit_change.square().mean(0) / 2


@register("criterion", name="unit-taylor", family="saliency", paper="1611.06440", of="unit", scales={"unit_change": 1})
def unit_taylor(unit_change: Tensor) -> Tensor:
    """The mean size of the first-order change of the loss without the unit.

    :: s_u = mean over batches of |sum over its weights of w dL/dw|

    Choose it with granularity channel, where the sum is that of a feature map times its gradient.

    >>> unit_taylor(torch.tensor([[1.0, 2.0], [-1.0, 0.0]])).tolist()
    [1.0, 1.0]

    Source: Molchanov et al., Pruning convolutional neural networks for resource efficient inference,
    arXiv 1611.06440, section 2.2 (Taylor expansion); scores are not scaled by layer here, the allocation does that.
    """
    return unit_change.abs().mean(0)
