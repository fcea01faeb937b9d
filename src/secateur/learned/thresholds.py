"""Gates by thresholds on the size of a weight."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import RecipeError
from ..granularity import Granularity
from ..registry import register
from ..select import select
from .base import Gate, Now, Values, long_tailed_step


@register("gate", name="str", family="threshold", paper="2002.03231")
def soft_threshold(weight: Tensor, *, start: float = -5.0, decay: float = 0.0, lr: float | None = 0.05) -> Gate:
    """Soft thresholds, one learned for each layer: weights shrink by it, and are zero below it.

    :: w' = sign(w) relu(|w| - sigmoid(s))

    ``start`` is s at first, ``decay`` the weight decay on s that makes thresholds rise in the paper (with a negative
    ``start`` it pulls s toward 0, that is the threshold toward 1/2); with penalty lagrangian it is not needed.

    Choose it to learn how much each layer keeps, with allocation global.

    Beware: the official code starts at s from -3200 to -5, by model; sigmoid(-5) is 0.0067, which should lie below
    most weights. The density's gradient, which the paper does not need, is that of DST's long-tailed step. Where the
    count wants more than a threshold leaves, the threshold is lowered to it.

    >>> gate = soft_threshold(torch.zeros(1, 3))
    >>> s = {"s": torch.tensor(0.0)}
    >>> gate.weight(torch.tensor([[-2.0, 0.4, 1.0]]), s, {}, True).tolist()
    [[-1.5, 0.0, 0.5]]

    Source: Kusupati et al., Soft threshold weight reparameterization (STR), arXiv 2002.03231, and its official
    code.
    """

    def margin(w: Tensor, learned: Values) -> Tensor:
        return w.abs() - torch.sigmoid(learned["s"])

    def final(w: Tensor, learned: Values, fixed: Values, kept: Tensor) -> Tensor:
        smallest = w.abs().masked_fill(~kept, torch.inf).amin()
        edge = torch.minimum(torch.sigmoid(learned["s"]), 0.999 * smallest)
        return w.sign() * (w.abs() - edge)

    return Gate(
        weight=lambda w, learned, fixed, training: w.sign() * margin(w, learned).relu(),
        score=margin,
        learned={"s": torch.tensor(start)},
        density=lambda w, learned, fixed: long_tailed_step(margin(w, learned)),
        final=final,
        lr=lr,
        weight_decay=decay,
    )


@register("gate", family="threshold", paper="2005.06870")
def dst(weight: Tensor, *, lr: float | None = None) -> Gate:
    """Trainable masked layers: a threshold learned for each output row, weights below it do not count.

    :: w' = w S(|w| - t_row), S the unit step with a long-tailed derivative; regularizer sum of exp(-t)

    Choose it where neurons and filters should be able to differ in how many weights they keep.

    Beware: thresholds of a layer that would keep less than 1 % are set to 0 again, as in the paper.

    >>> gate = dst(torch.zeros(2, 2))
    >>> gate.weight(torch.tensor([[0.3, -1.0], [0.3, -1.0]]), {"t": torch.tensor([[0.5], [0.0]])}, {}, True).tolist()
    [[0.0, -1.0], [0.30000001192092896, -1.0]]

    Source: Liu et al., Dynamic sparse training with trainable masked layers, arXiv 2005.06870, and its official
    code.
    """

    def margin(w: Tensor, learned: Values) -> Tensor:
        return w.abs() - learned["t"]

    def settle(w: Tensor, learned: Values, now: Now) -> dict[str, Tensor]:
        empty = (margin(w, learned) > 0).sum() <= 0.01 * w.numel()
        learned["t"].masked_fill_(empty, 0.0)
        return {}

    return Gate(
        weight=lambda w, learned, fixed, training: w * long_tailed_step(margin(w, learned)),
        score=margin,
        learned={"t": torch.zeros(weight.shape[0], 1)},
        settle=settle,
        density=lambda w, learned, fixed: long_tailed_step(margin(w, learned)),
        regularizer=lambda w, learned, fixed: (-learned["t"]).exp().sum(),
        lr=lr,
    )


@register("gate", family="threshold", paper="2305.11203")
def pdp(weight: Tensor, granularity: Granularity, *, tau: float = 1e-4) -> Gate:
    """A soft mask without parameters: the odds of a weight against the threshold that the target sets.

    :: w' = w exp(w^2 / tau) / (exp(w^2 / tau) + exp(t^2 / tau)), t halfway between the last kept and the first dropped

    Choose it in place of gmp: weights near the threshold are still trained, and nothing is learned beside them.

    Beware: ``tau`` is to be compared with the squares of weights near the threshold. Single weights only, in any
    pools; the paper's channels are left out, and layers share the target as the recipe's allocation says (the paper
    ranks the whole model once, after a warm-up).

    >>> from ..granularity import parse
    >>> w = torch.tensor([[0.0, 1.0, 3.0]])
    >>> gate = pdp(w, parse("element"), tau=1.0)
    >>> fixed = gate.settle(w, {}, Now(0, 1, 1 / 3, torch.Generator()))
    >>> fixed["square"].tolist(), [round(x, 3) for x in gate.weight(w, {}, fixed, True)[0].tolist()]
    ([[4.0]], [0.0, 0.047, 2.98])

    Source: Cho et al., PDP: parameter-free differentiable pruning, arXiv 2305.11203; from descriptions of its
    equations and two independent implementations, as the paper itself could not be read.
    """
    shape = (weight.shape[0], weight.shape[1])
    if granularity.pool_shape(*shape)[2] != 1:
        raise RecipeError(f"gate 'pdp' masks single weights, not the units of granularity '{granularity.name}'")

    def settle(w: Tensor, learned: Values, now: Now) -> dict[str, Tensor]:
        size = granularity.pool(w.abs())
        kept = select(size, now.keep)
        last = size.masked_fill(~kept, torch.inf).amin(1, keepdim=True)
        first = size.masked_fill(kept, -torch.inf).amax(1, keepdim=True)
        edge = (last + first) / 2  # infinite where all stay, or none
        return {"square": edge * edge.abs()}

    def effective(w: Tensor, learned: Values, fixed: Values, training: bool) -> Tensor:
        w_pu = granularity.pool(w)
        return granularity.join((w_pu * ((w_pu.square() - fixed["square"]) / tau).sigmoid())[..., None], shape)

    return Gate(weight=effective, score=lambda w, learned: w.abs(), settle=settle)
