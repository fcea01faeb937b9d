"""Criteria that look at first derivatives of the loss."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..registry import register
from ..select import select


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


def _together(facts: Mapping[str, Tensor], count: int, *, sweeps: int) -> Tensor:
    change_bu = facts["unit_change"].double()
    kept = select(change_bu.square().sum(0)[None], count)[0]
    return rearranged(change_bu, kept, sweeps)


def rearranged(change_bu: Tensor, kept: Tensor, sweeps: int = 1) -> Tensor:
    """Exchange units that go for others, so that the squared sum of the changes of those that go is smaller.

    Each unit that stays, the least first, joins those that go, and the one without which the others change the loss
    least comes back; several ``sweeps`` until none is exchanged any more.

    Args:
        change_bu: of each batch and unit.
        kept: bool, ``(units,)``.

    >>> cancel = torch.tensor([[2.0, -2.0, 1.0, 1.5]])
    >>> rearranged(cancel, torch.tensor([True, True, False, False]), sweeps=2).tolist()
    [False, False, True, True]
    """
    fisher = change_bu.t() @ change_bu
    own = fisher.diagonal()
    gone = ~kept
    for _ in range(sweeps if bool(gone.any()) else 0):
        before = gone.clone()
        shared = fisher @ gone.to(fisher.dtype)
        for j in torch.argsort(own, stable=True).tolist():
            if gone[j]:
                continue
            gone[j] = True
            shared += fisher[j]
            left = (own - 2 * shared).masked_fill(~gone, torch.inf)  # |s - g_i|^2 - |s|^2
            back = int(left.argmin())
            back = j if bool(left[j] <= left[back]) else back
            gone[back] = False
            shared -= fisher[back]
        if torch.equal(gone, before):
            break
    return ~gone


@register(
    "criterion", name="mask-fisher", family="saliency", paper="2204.09656", of="unit", scales={"unit_change": 2},
    together=_together,
)  # fmt: skip
def mask_fisher(unit_change: Tensor, unit_flops: Tensor, *, sweeps: int = 1) -> Tensor:
    """Fisher information of a mask on the unit for each operation that goes with it; then what goes best together.

    :: s_u = 1 / (2 FLOPs_u) mean over batches of (sum over its weights of w dL/dw)^2,
       then in each family: min over sets Q of as many of mean over batches of (sum over Q and their weights)^2

    The first ranks heads and neurons of all layers in one list (allocation raw), which is what a search for the most
    information within the FLOPs comes to. The second takes the Fisher between the units of one family: each unit that
    stays is offered in exchange for one that goes, in ``sweeps`` over the family; 0 leaves the ranking as it is.

    Choose it with granularity channel and a target in FLOPs, for transformers that are not to be trained again.

    Beware: units of which each does little may do much together, and units that cancel do little: with fewer batches
    than units many sets seem to do nothing. Give hundreds of small batches.

    >>> mask_fisher(torch.tensor([[1.0, 2.0], [-1.0, 0.0]]), torch.tensor([1.0, 2.0])).tolist()
    [0.5, 0.5]

    Source: Kwon et al., A fast post-training pruning framework for transformers, arXiv 2204.09656, sections 4.1 and
    4.2, and its official code, whose rearrangement makes one sweep in this order.
    """
    return unit_change.square().mean(0) / (2 * unit_flops.to(unit_change.dtype))
