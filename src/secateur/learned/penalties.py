"""Penalties on weights, units and scales of normalizations."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import RecipeError
from ..registry import register
from ..select import select
from .base import Now, Penalty, Values, rows


def soft(x: Tensor, amount: float) -> Tensor:
    """The proximal operator of ``amount |x|``.

    >>> soft(torch.tensor([-3.0, 0.5, 2.0]), 1.0).tolist()
    [-2.0, 0.0, 1.0]
    """
    return x.sign() * (x.abs() - amount).relu()


def soft_rows(x_pue: Tensor, amount: float) -> Tensor:
    """The proximal operator of ``amount`` times the sum of the l2 norms of units.

    >>> soft_rows(torch.tensor([[[3.0, 4.0], [0.6, 0.8]]]), 1.0).tolist()
    [[[2.4000000953674316, 3.200000047683716], [0.0, 0.0]]]
    """
    norm = rows(x_pue)[..., None]
    return x_pue * (1 - amount / norm.clamp_min(torch.finfo(x_pue.dtype).tiny)).relu()


@register("penalty", family="norm", paper="1506.02626", on="unit")
def l1(*, strength: float = 1e-4, proximal: bool = False) -> Penalty:
    """The sum of the sizes of all weights, which pulls each toward zero at the same rate.

    :: strength sum |w|; proximal: w <- sign(w) relu(|w| - lr strength) after the optimizer's step

    Choose it before magnitude pruning: the weights that go are small by then.

    Beware: it shrinks what stays too; without ``proximal`` weights hover about zero and few are exactly zero.

    Source: l1 regularization before pruning in Han et al., Learning both weights and connections, arXiv 1506.02626;
    the proximal step is ISTA's.
    """
    if proximal:
        return Penalty(step=lambda x, state, now: soft(x, now.lr * strength))
    return Penalty(value=lambda x, state: strength * x.abs().sum())


@register("penalty", name="group-lasso", family="norm", paper="1608.03665", on="unit")
def group_lasso(*, strength: float = 1e-4, proximal: bool = False, sized: bool = True) -> Penalty:
    """The sum of the l2 norms of units: whole filters, channels, blocks or coupled units go to zero together.

    :: strength sum over units sqrt(size) ||w_u||_2; proximal: w_u <- w_u relu(1 - lr strength sqrt(size) / ||w_u||)

    Units are those of the granularity: of ``filter`` the weights that compute a channel, of ``channel`` those that read
    it, of ``coupled`` both, of ``block`` a block, of ``element`` a weight (it is l1 then). ``sized`` weighs units by
    the square root of their size.

    Choose it to train a network that ``plan`` then makes smaller with little loss.

    Beware: the proximal step goes through the families one after the other; where they share weights, as coupled ones
    do, that is not the operator of their sum. SSL's official code leaves ``sqrt(size)`` out.

    Source: Wen et al., Learning structured sparsity in deep neural networks (SSL), arXiv 1608.03665.
    """

    def amount(x: Tensor) -> float:
        return strength * (x.shape[2] ** 0.5 if sized else 1.0)

    if proximal:
        return Penalty(step=lambda x, state, now: soft_rows(x, now.lr * amount(x)))
    return Penalty(value=lambda x, state: amount(x) * rows(x).sum())


@register("penalty", family="norm", paper="1708.06519", on="scale")
def slimming(*, strength: float = 1e-4) -> Penalty:
    """The sum of the sizes of the scales of batch normalizations.

    :: strength sum |gamma|

    Choose it for convolutional networks with batch normalization, before method network-slimming makes them smaller.

    Beware: weight decay on the scales does part of the same; a scale times its convolution is what counts, and only
    the first is penalized.

    Source: Liu et al., Learning efficient convolutional networks through network slimming, arXiv 1708.06519,
    and its official code.
    """
    return Penalty(value=lambda x, state: strength * x.abs().sum())


@register("penalty", name="ista-bn", family="norm", paper="1802.00124", on="scale")
def ista_bn(*, strength: float = 1e-2) -> Penalty:
    """Iterative shrinkage of the scales of batch normalizations: they become exactly zero.

    :: gamma <- sign(gamma) relu(|gamma| - lr strength) after each step

    Choose it in place of slimming, where scales of exactly zero should show how many channels are needed.

    Beware: the paper scales each layer's strength by the memory that a channel costs, first divides the scales by
    a constant that it multiplies into the next layer, and folds what a constant channel adds into the next bias; here
    all scales have one strength and nothing is rescaled. Momentum and Adam shrink less evenly than plain SGD.

    Source: Ye et al., Rethinking the smaller-norm-less-informative assumption, arXiv 1802.00124, from its abstract and
    an independent implementation; the paper could not be read.
    """
    return Penalty(step=lambda x, state, now: soft(x, now.lr * strength))


@register("penalty", family="growing", paper="2012.09243", on="unit")
def greg(*, rise: float = 1e-4, every: int = 5, ceiling: float = 1.0) -> Penalty:
    """A weight decay that grows, on the units that are to go: they fade while the others take over.

    :: lambda_u / 2 ||w_u||^2 for the units of smallest norm, lambda_u <- min(ceiling, lambda_u + rise) every so often

    Units are chosen by count when the session begins, and stay chosen.

    Choose it in place of one cut from a trained network: nothing is removed before it has become small.

    Beware: ``ceiling / rise * every`` steps until the last is reached (50,000 at the defaults, which are the paper's
    for ImageNet): raise ``rise`` for shorter runs. The chosen units are nearly zero, not zero; they are cut after it.

    Source: Wang et al., Neural pruning via growing regularization (GReg-1), arXiv 2012.09243, algorithm 1, and its
    official code, which ranks by mean absolute value.
    """
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise RecipeError(f"penalty 'greg': every is a whole number of steps of at least 1, not {every!r}")

    def start(x: Tensor, now: Now) -> dict[str, Tensor]:
        gone = ~select(x.abs().mean(-1), now.final)
        return {"gone": gone, "strength": torch.zeros((), device=x.device)}

    def update(x: Tensor, state: Values, now: Now) -> dict[str, Tensor]:
        grown = state["strength"] + (rise if now.at % every == 0 else 0.0)
        return {"gone": state["gone"], "strength": grown.clamp_max(ceiling)}

    def value(x: Tensor, state: Values) -> Tensor:
        return 0.5 * state["strength"] * (x.square().sum(-1) * state["gone"]).sum()

    return Penalty(value=value, start=start, update=update)
