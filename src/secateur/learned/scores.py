"""Gates by a score that is learned for each weight or unit."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..registry import register
from ..select import select
from .base import Gate, Now, Values, straight_through


@register("gate", name="continuous-sparsification", family="score", paper="1912.04427", units=True)
def continuous_sparsification(
    pool_shape: tuple[int, int], *, start: float = 0.0, final: float = 200.0, lr: float | None = 0.1
) -> Gate:
    """A sigmoid gate for each unit that hardens over the run, until it is a step.

    :: w' = w sigmoid(beta s) / sigmoid(start), beta = final^progress; density sigmoid(beta s)

    Choose it for a deterministic relaxation of L0: nothing is drawn.

    Beware: ``start`` sets how much stays without a target (the official code uses values around 0, from -0.3 to
    0.3); scores must move away from 0 before ``final`` makes them steps, so give them a learning rate (``lr``).

    >>> gate = continuous_sparsification((1, 2))
    >>> fixed = gate.settle(torch.zeros(1, 2), gate.learned, Now(1, 2, 0.5, torch.Generator()))
    >>> round(float(fixed["beta"]), 3), gate.factor({"s": torch.tensor([[0.0, 9.0]])}, fixed, True).tolist()
    (14.142, [[1.0, 2.0]])

    Source: Savarese et al., Winning the lottery with continuous sparsification, arXiv 1912.04427, and its
    official code; its rounds of rewinding are left to the user.
    """
    scale = 1.0 + math.exp(-start)

    def settle(w: Tensor, learned: Values, now: Now) -> dict[str, Tensor]:
        return {"beta": torch.tensor(final ** min(1.0, now.progress), device=learned["s"].device)}

    def gate(learned: Values, fixed: Values) -> Tensor:
        return torch.sigmoid(fixed["beta"] * learned["s"])

    return Gate(
        factor=lambda learned, fixed, training: scale * gate(learned, fixed),
        score=lambda w, learned: learned["s"],
        learned={"s": torch.full(pool_shape, start)},
        settle=settle,
        density=lambda w, learned, fixed: gate(learned, fixed),
        regularizer=lambda w, learned, fixed: gate(learned, fixed).sum(),
        lr=lr,
    )


@register("gate", name="edge-popup", family="score", paper="1911.13299", units=True)
def edge_popup(
    weight: Tensor, pool_shape: tuple[int, int], generator: torch.Generator, *, train_weights: bool = False,
    lr: float | None = None,
) -> Gate:  # fmt: skip
    """Scores are learned for weights that are not: the best of each layer are a network in the random one.

    :: w' = w [|s| among the largest]; backward the bracket counts as |s| (straight through)

    Choose it to ask how good a subnetwork of an untrained network can be.

    Beware: only the weights of the pruned layers are frozen; biases and normalizations train unless the user freezes
    them (the paper has none). Signed constants as first weights (``+-std`` of Kaiming's rule) do best in the paper.

    >>> gate = edge_popup(torch.ones(1, 4), (1, 4), torch.Generator())
    >>> learned = {"s": torch.tensor([[0.1, -0.9, 0.3, 0.2]])}
    >>> fixed = gate.settle(torch.ones(1, 4), learned, Now(0, 1, 0.5, torch.Generator()))
    >>> gate.factor(learned, fixed, True).tolist()
    [[0.0, 1.0, 1.0, 0.0]]

    Source: Ramanujan et al., What's hidden in a randomly weighted neural network?, arXiv 1911.13299, and its
    official code.
    """
    first = torch.empty(pool_shape, device=generator.device)
    bound = 1 / math.sqrt(weight.shape[1])  # kaiming_uniform with a = sqrt(5), as in the official code
    first.uniform_(-bound, bound, generator=generator)

    def settle(w: Tensor, learned: Values, now: Now) -> dict[str, Tensor]:
        return {"mask": select(learned["s"].abs(), now.keep)}

    def factor(learned: Values, fixed: Values, training: bool) -> Tensor:
        score = learned["s"]
        return straight_through(fixed["mask"].to(score.dtype), score.abs())

    return Gate(
        factor=factor,
        score=lambda w, learned: learned["s"].abs(),
        learned={"s": first},
        settle=settle,
        lr=lr,
        frozen=not train_weights,
    )
