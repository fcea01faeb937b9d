"""What is added to the loss so that a gate reaches a density."""

from __future__ import annotations

import torch
from torch import Tensor

from ..registry import register
from .base import Now, Penalty, Values


@register("penalty", family="control", paper="2204.00408", on="density")
def lagrangian(*, gain: float = 0.03, stiffness: float = 1.0) -> Penalty:
    """Multipliers that grow until the expected density of a gate is the target.

    :: G (a (d - t) + b (d - t)^2); after each step a <- a + gain (d - t), b <- b + gain (d - t)^2

    d is the expected fraction of weights that stays, t the target at this moment (by the driver and the schedule),
    G the number of gates, so that each feels the multiplier itself; b starts at ``stiffness``.

    Choose it with any gate that has a density: the sparsity is then given, not a strength to be searched for.

    Beware: gates that many weights share (str) need larger multipliers. Targets that fall faster than gates can move
    overshoot: give the driver a longer way, or the gates a larger learning rate. The count is exact only when the
    session ends, by the gate's score.

    Source: Wang et al., Structured pruning of large language models, arXiv 1910.04732, and Xia et al., CoFi, arXiv
    2204.00408, whose official code ascends both multipliers with an optimizer; the scale by G is ours.
    """

    def start(x: Tensor, now: Now) -> dict[str, Tensor]:
        return {
            "linear": torch.zeros((), device=x.device),
            "square": torch.full((), stiffness, device=x.device),
            "target": torch.tensor(now.keep, device=x.device),
        }

    def update(x: Tensor, state: Values, now: Now) -> dict[str, Tensor]:
        far = x - state["target"]
        return {
            "linear": state["linear"] + gain * far,
            "square": state["square"] + gain * far.square(),
            "target": torch.tensor(now.keep, device=x.device),
        }

    def value(x: Tensor, state: Values) -> Tensor:
        far = x - state["target"]
        return state["linear"] * far + state["square"] * far.square()

    return Penalty(value=value, start=start, update=update)


@register("penalty", family="control", paper="1712.01312", on="regularizer")
def regularizer(*, strength: float = 1e-4, warmup: float = 0.0) -> Penalty:
    """What the gate's own paper adds to the loss, times a strength.

    :: min(1, progress / warmup) strength R, R the gate's regularizer

    Of l0 and continuous-sparsification R is the (expected) number of units that stay, of dst the sum of exp(-t), of
    variational-dropout the divergence from the prior, of gumbel-nm minus the squares of what stays.

    Choose it in place of lagrangian to follow a paper, or where no sparsity is given beforehand.

    Beware: the sparsity that it leads to follows from ``strength``; what is missing to the recipe's sparsity, or too
    much, is made up by the gate's score when the session ends.

    Source: the papers of the gates; the linear warm-up as in Molchanov et al., arXiv 1701.05369.
    """

    def start(x: Tensor, now: Now) -> dict[str, Tensor]:
        return {"strength": torch.tensor(0.0 if warmup else strength, device=x.device)}

    def update(x: Tensor, state: Values, now: Now) -> dict[str, Tensor]:
        share = min(1.0, now.progress / warmup) if warmup else 1.0
        return {"strength": torch.tensor(strength * share, device=x.device)}

    return Penalty(value=lambda x, state: state["strength"] * x, start=start, update=update)
