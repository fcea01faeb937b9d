"""Criteria that look at what only a training run shows: momentum, and what gathers over steps."""

from __future__ import annotations

from torch import Tensor

from ..registry import register


@register("criterion", family="saliency", paper="2110.14032")
def mest(weight: Tensor, gradient: Tensor, *, lam: float = 1.0) -> Tensor:
    """The size of a weight, and how fast it changes.

    :: s = |w| + lam |dL/dw|

    Choose it for removal in sparse training: a small weight that moves is spared.

    Beware: the two terms are on different scales, which ``lam`` bridges.

    >>> import torch
    >>> mest(torch.tensor([[-2.0, 1.0]]), torch.tensor([[0.5, -3.0]]), lam=2.0).tolist()
    [[3.0, 7.0]]

    Source: Yuan et al., MEST, arXiv 2110.14032, section 3.1; the paper's value of ``lam`` could not be read here.
    """
    return weight.abs() + lam * gradient.abs()


@register("criterion", family="movement", paper="1907.04840", scales={"momentum": 1}, survey="B2.2")
def momentum(momentum: Tensor) -> Tensor:
    """The size of the optimizer's momentum.

    :: s = |m|

    Choose it to grow weights that reduce the loss in step after step, not in the last one alone.

    Beware: it takes an optimizer that has momentum, and keeps it for weights that are gone (hold zero-weight).

    >>> import torch
    >>> momentum(torch.tensor([[-2.0, 1.0]])).tolist()
    [[2.0, 1.0]]

    Source: Dettmers and Zettlemoyer, Sparse networks from scratch (SNFS), arXiv 1907.04840, section 3.
    """
    return momentum.abs()


@register("criterion", family="movement", paper="2005.07683", scales={"movement": 1})
def movement(movement: Tensor) -> Tensor:
    """How far training has moved a weight away from zero.

    :: s = - sum over steps of w dL/dw

    Choose it for fine-tuning a model that was trained on something else, at high sparsity.

    Beware: weak at low sparsity, and it needs many steps before its first cut.

    >>> import torch
    >>> movement(torch.tensor([[-2.0, 1.0]])).tolist()
    [[-2.0, 1.0]]

    Source: Sanh et al., Movement pruning, arXiv 2005.07683, equation 3, without the learning rate of the scores, which
    changes no order while it is constant.
    """
    return movement.clone()


@register("criterion", family="movement", paper="2206.12562", scales={"sensitivity": 1, "uncertainty": 1})
def platon(sensitivity: Tensor, uncertainty: Tensor, *, beta1: float = 0.85, beta2: float = 0.95) -> Tensor:
    """The smoothed sensitivity of a weight times how uncertain it is: what is not known well is kept a while.

    :: s = I U, I <- beta1 I + (1 - beta1) |w dL/dw|, U <- beta2 U + (1 - beta2) | |w dL/dw| - I |

    Choose it for fine-tuning transformers, where sensitivities of single batches are noise.

    Beware: two numbers are kept for each weight.

    >>> import torch
    >>> platon(torch.tensor([[2.0, 1.0]]), torch.tensor([[0.5, 3.0]])).tolist()
    [[1.0, 3.0]]

    Source: Zhang et al., PLATON, arXiv 2206.12562, equations 5 to 8; the official code also takes the mean of the
    sensitivity between two masks.
    """
    return sensitivity * uncertainty


@register("criterion", name="kept-sign", family="movement", paper="1711.05136", scales={"weight": 1}, survey="B2.2")
def kept_sign(weight: Tensor, sign: Tensor) -> Tensor:
    """The weight in the direction of the sign that it was born with; below zero once it has crossed zero.

    :: s = w sign

    Choose it for deep rewiring, where a weight goes when its sign flips.

    >>> import torch
    >>> kept_sign(torch.tensor([[-2.0, 1.0]]), torch.tensor([[False, False]])).tolist()
    [[2.0, -1.0]]

    Source: Bellec et al., Deep rewiring, arXiv 1711.05136, section 2.
    """
    return weight * (sign.to(weight.dtype) * 2 - 1)
