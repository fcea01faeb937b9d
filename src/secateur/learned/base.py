"""What a gate and a penalty are: a few functions each, which the training session calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

#: Tensors by name: what a gate learns, what it computes before a step, what a penalty remembers.
Values = Mapping[str, Tensor]


@dataclass(frozen=True)
class Now:
    """The moment at which a gate is settled or a penalty moves on.

    Attributes:
        at, steps: steps of the optimizer taken so far, and of the whole run.
        keep: the fraction of the units of this layer, or pool, that is to stay at this moment.
        generator: fresh at every step and for every layer, so that a resumed run draws what it would have drawn.
        lr: the learning rate of these weights; 0 where no optimizer is known.
        final: the fraction of these units that is to stay at the end.
    """

    at: int
    steps: int
    keep: float
    generator: torch.Generator = field(default_factory=torch.Generator)
    lr: float = 0.0
    final: float = 0.0

    @property
    def progress(self) -> float:
        """The share of the run that lies behind."""
        return self.at / max(self.steps, 1)


def _nothing(weight: Tensor, learned: Values, now: Now) -> dict[str, Tensor]:
    return {}


@dataclass(frozen=True)
class Gate:
    """How one layer's weight is computed while a gate is trained. Weights are ``(o, i)``.

    Attributes:
        score: ``(weight, learned)`` -> of each weight, or of each unit where there is a ``factor``: who stays.
        weight: ``(weight, learned, fixed, training) -> (o, i)``: the effective weight, differentiable.
        factor: in place of ``weight``: ``(learned, fixed, training) -> (pools, units)``, by which the weights of each
            unit are multiplied. Such a gate also works on units of the whole model.
        learned: names and first values of what is trained.
        settle: ``(weight, learned, now) -> fixed``: what is computed once for all passes of a step, without gradient:
            draws of noise, thresholds, temperatures. It may correct what is learned in place.
        density: ``(weight, learned, fixed) -> Tensor`` whose mean is the expected fraction that stays, differentiable;
            None where the method sets the count itself.
        regularizer: ``(weight, learned, fixed) -> scalar``: what the method's own paper adds to the loss, but for its
            strength.
        final: ``(weight, learned, fixed, kept)`` -> the weight, or the factor of the units, that is left when the
            session ends; ``kept`` is who stays, in the shape of the score. Without it they are those of evaluation,
            and what evaluation would close and the count wants stays as it is behind the gate.
        lr, weight_decay: of what is learned; the optimizer's own learning rate where None.
        frozen: the weights themselves are not trained.
    """

    score: Callable[[Tensor, Values], Tensor]
    weight: Callable[[Tensor, Values, Values, bool], Tensor] | None = None
    factor: Callable[[Values, Values, bool], Tensor] | None = None
    learned: Values = field(default_factory=dict)
    settle: Callable[[Tensor, Values, Now], Mapping[str, Tensor]] = _nothing
    density: Callable[[Tensor, Values, Values], Tensor] | None = None
    regularizer: Callable[[Tensor, Values, Values], Tensor] | None = None
    final: Callable[[Tensor, Values, Values, Tensor], Tensor] | None = None
    lr: float | None = None
    weight_decay: float = 0.0
    frozen: bool = False


def _same(x: Tensor, state: Values, now: Now) -> dict[str, Tensor]:
    return dict(state)


@dataclass(frozen=True)
class Penalty:
    """What is added to the loss for one pool, and what happens to it after the optimizer's step.

    What it looks at, ``x``, is said by the part's fact ``on``: ``unit``, ``zero-invariant`` or ``scale`` for
    ``(pools, units, elements)`` (see `secateur.when.pools`), ``density`` for the expected fraction that a gate lets
    stay, ``regularizer`` for what the gate's paper adds to the loss.

    Attributes:
        value: ``(x, state) -> scalar``, added to the loss; None where there is only the step.
        start: ``(x, now) -> state``: tensors by name, saved with the session.
        update: ``(x, state, now) -> state``, after each step of the optimizer.
        step: ``(x, state, now) -> x`` after ``update``: a proximal operator or a projection; None where there is none.
    """

    value: Callable[[Tensor, Values], Tensor] | None = None
    start: Callable[[Tensor, Now], Mapping[str, Tensor]] = lambda x, now: {}
    update: Callable[[Tensor, Values, Now], Mapping[str, Tensor]] = _same
    step: Callable[[Tensor, Values, Now], Tensor] | None = None


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """The value of ``hard`` with the gradient of ``soft``."""
    return hard.detach() + (soft - soft.detach())


def long_tailed_step(x: Tensor) -> Tensor:
    """The unit step, with ``2 - 4|x|`` up to 0.4, then 0.4 up to 1, then 0 for its derivative.

    >>> x = torch.tensor([-2.0, -0.1, 0.2, 0.7], requires_grad=True)
    >>> y = long_tailed_step(x)
    >>> y.sum().backward()
    >>> y.tolist(), [round(g, 3) for g in x.grad.tolist()]
    ([0.0, 0.0, 1.0, 1.0], [0.0, 1.6, 1.2, 0.4])
    """
    near, far = x.clamp(-0.4, 0.4), x.clamp(-1.0, 1.0)
    integral = 2 * near - 2 * near * near.abs() + 0.4 * (far - near)  # of the derivative
    return straight_through((x > 0).to(x.dtype), integral)


def rows(x: Tensor) -> Tensor:
    """l2 norms of the units of ``(pools, units, elements)``; their gradient at zero is zero.

    >>> rows(torch.tensor([[[3.0, 4.0], [0.0, 0.0]]])).tolist()
    [[5.0, 0.0]]
    """
    square = x.square().sum(-1)
    nonzero = square > 0
    return torch.where(nonzero, torch.where(nonzero, square, 1.0).sqrt(), 0.0)
