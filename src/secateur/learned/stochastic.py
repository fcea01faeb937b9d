"""Gates that are drawn while the model trains: what stays is learned as a distribution."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from ..errors import RecipeError
from ..granularity import Granularity
from ..registry import register
from .base import Gate, Now, Values

_GAMMA, _ZETA = -0.1, 1.1  # how far the concrete distribution is stretched
_EDGE = 1e-6  # of the uniform draws


def open_probability(log_alpha: Tensor, beta: float) -> Tensor:
    """The probability that a hard concrete gate is not zero."""
    return torch.sigmoid(log_alpha - beta * math.log(-_GAMMA / _ZETA))


@register("gate", family="stochastic", paper="1712.01312", units=True)
def l0(
    pool_shape: tuple[int, int], generator: torch.Generator, *, drop: float = 0.1, beta: float = 2 / 3,
    lr: float | None = 0.1,
) -> Gate:  # fmt: skip
    """Hard concrete gates: the expected number of weights, or of units, is a function that can be minimized.

    :: z = min(1, max(0, s (zeta - gamma) + gamma)), s = sigmoid((log u - log(1 - u) + log alpha) / beta)
       P(z > 0) = sigmoid(log alpha - beta log(-gamma / zeta)), zeta 1.1, gamma -0.1

    One gate for each unit of the granularity: a weight, a block, or with granularity coupled a channel, neuron or
    head of the whole model. ``drop`` is the rate at which gates are closed at first. In evaluation the gate is
    ``min(1, max(0, sigmoid(log alpha) (zeta - gamma) + gamma))``.

    Choose it to learn which units go by gradient, under any target that penalty lagrangian or L0 itself sets.

    Beware: noise slows training, and gates want a larger learning rate than weights (``lr``), and Adam. One draw serves
    all examples of a step, as in the official code of convolutions. Closed gates that the count wants back are
    left at sigmoid(log alpha).

    >>> round(float(open_probability(torch.tensor(0.0), 2 / 3)), 4)
    0.8318

    Source: Louizos et al., Learning sparse neural networks through L0 regularization, arXiv 1712.01312, and its
    official code, whose bounds on log alpha (1/100 to 100) are kept.
    """
    first = torch.empty(pool_shape, device=generator.device)
    first.normal_(math.log(1 - drop) - math.log(drop), 1e-2, generator=generator)

    def settle(w: Tensor, learned: Values, now: Now) -> dict[str, Tensor]:
        log_alpha = learned["log_alpha"]
        log_alpha.clamp_(math.log(1e-2), math.log(1e2))
        u = torch.empty_like(log_alpha).uniform_(_EDGE, 1 - _EDGE, generator=now.generator)
        return {"noise": u.log() - (-u).log1p()}

    def factor(learned: Values, fixed: Values, training: bool) -> Tensor:
        log_alpha = learned["log_alpha"]
        s = torch.sigmoid((log_alpha + fixed["noise"]) / beta) if training else torch.sigmoid(log_alpha)
        return (s * (_ZETA - _GAMMA) + _GAMMA).clamp(0.0, 1.0)

    def density(w: Tensor, learned: Values, fixed: Values) -> Tensor:
        return open_probability(learned["log_alpha"], beta)

    def final(w: Tensor, learned: Values, fixed: Values, kept: Tensor) -> Tensor:
        gate = factor(learned, fixed, False)
        return torch.where(gate > 0, gate, torch.sigmoid(learned["log_alpha"]))

    return Gate(
        factor=factor,
        score=lambda w, learned: learned["log_alpha"],
        learned={"log_alpha": first},
        settle=settle,
        density=density,
        regularizer=lambda w, learned, fixed: density(w, learned, fixed).sum(),
        final=final,
        lr=lr,
    )


@register("gate", name="variational-dropout", family="stochastic", paper="1701.05369")
def variational_dropout(weight: Tensor, *, start: float = -10.0, lr: float | None = None) -> Gate:
    """A noise level learned for each weight: what can be drowned in noise can be left out.

    :: w' = w + sigma e, e normal, log alpha = log sigma^2 - log w^2
       KL = sum of 0.5 log(1 + 1/alpha) - k1 sigmoid(k2 + k3 log alpha) + k1

    ``start`` is log sigma^2 at first. k1, k2, k3 = 0.63576, 1.87320, 1.48695. The paper drops where log alpha > 3.

    Choose it where the noise level of weights is of interest by itself.

    Beware: the paper draws noise for each example in the layer's output (local reparameterization); a layer's input
    is not seen here, so noise is added to the weights, once for a step, and gradients vary more. The paper trains for
    long, with the KL switched on slowly (penalty regularizer, ``warmup``), and divides it by the number of examples.

    >>> gate = variational_dropout(torch.ones(1, 1), start=0.0)
    >>> learned = {"log_sigma2": torch.zeros(1, 1)}
    >>> round(float(gate.regularizer(torch.ones(1, 1), learned, {})), 3)  # 0.3466 + 0.63576 (1 - 0.8668)
    0.431

    Source: Molchanov et al., Variational dropout sparsifies deep neural networks, arXiv 1701.05369; start and
    bounds as in Gale et al., arXiv 1902.09574.
    """

    def log_alpha(w: Tensor, learned: Values) -> Tensor:
        return (learned["log_sigma2"] - (w.square() + 1e-8).log()).clamp(-8.0, 8.0)

    def effective(w: Tensor, learned: Values, fixed: Values, training: bool) -> Tensor:
        if not training:
            return w * (log_alpha(w, learned) < 3)
        return w + (0.5 * learned["log_sigma2"]).exp() * fixed["noise"]

    def settle(w: Tensor, learned: Values, now: Now) -> dict[str, Tensor]:
        return {"noise": torch.empty_like(w).normal_(generator=now.generator)}

    def divergence(w: Tensor, learned: Values, fixed: Values) -> Tensor:
        a = log_alpha(w, learned)
        return (0.5 * torch.nn.functional.softplus(-a) + 0.63576 * (1 - torch.sigmoid(1.87320 + 1.48695 * a))).sum()

    return Gate(
        weight=effective,
        score=lambda w, learned: (w.square() + 1e-30).log() - learned["log_sigma2"],
        learned={"log_sigma2": torch.full_like(weight, start)},
        settle=settle,
        density=lambda w, learned, fixed: torch.sigmoid(3 - log_alpha(w, learned)),
        regularizer=divergence,
        lr=lr,
    )


def candidates(n: int, m: int) -> Tensor:
    """Every mask that keeps ``n`` of ``m``, ``(C(m, n), m)``.

    >>> candidates(1, 2).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    chosen = list(itertools.combinations(range(m), n))
    made = torch.zeros(len(chosen), m)
    for row, columns in enumerate(chosen):
        made[row, list(columns)] = 1.0
    return made


@register("gate", name="gumbel-nm", family="stochastic", paper="2409.17481")
def gumbel_nm(
    weight: Tensor, granularity: Granularity, generator: torch.Generator, *, hot: float = 4.0, cold: float = 0.05,
    low: float = 1e2, high: float = 5e2, prior: float = 3.0, train_weights: bool = False, lr: float | None = None,
) -> Gate:  # fmt: skip
    """A choice among all N:M masks of each run of M weights, learned by Gumbel softmax.

    :: mask = softmax((kappa logits + g) / tau) S, g Gumbel noise, S the candidate masks

    tau falls from ``hot`` to ``cold`` and kappa grows from ``low`` to ``high`` over the run, linearly. ``prior`` times
    the logits' standard deviation is what the mask of largest weights starts ahead. The regularizer is minus the sum of
    squares of the weights that stay, which keeps gradients alive.

    Choose it for 2:4 on language models, when a few thousand steps of training are affordable and weights should
    stay what they are.

    Beware: six numbers for four weights at 2:4, seventy for eight at 4:8. The weights are not trained
    (``train_weights`` trains them). The paper starts from SparseGPT's mask; the prior here is magnitude's.

    >>> from ..granularity import parse
    >>> gate = gumbel_nm(torch.tensor([[1.0, -3.0, 2.0, 0.0]]), parse("2:4"), torch.Generator())
    >>> gate.score(torch.zeros(1, 4), gate.learned).tolist()
    [[0.0, 1.0, 1.0, 0.0]]

    Source: Fang et al., MaskLLM: learnable semi-structured sparsity for large language models, arXiv 2409.17481, and
    its official code and scripts.
    """
    if granularity.keep is None:
        raise RecipeError(f"gate 'gumbel-nm' chooses N:M masks: granularity '{granularity.name}' is none, write 2:4")
    m = granularity.run
    options = candidates(round(granularity.keep * m), m).to(weight.device)
    shape = (weight.shape[0], weight.shape[1])
    logits = torch.empty(weight.numel() // m, len(options), device=weight.device)
    logits.normal_(0.0, 0.01, generator=generator)
    largest = weight.abs().reshape(-1, m).topk(round(granularity.keep * m), 1).indices
    overlap = torch.zeros(len(logits), m, device=weight.device).scatter_(1, largest, 1.0) @ options.t()
    logits += (overlap - overlap.mean(1, keepdim=True)) * logits.std() * prior

    def settle(w: Tensor, learned: Values, now: Now) -> dict[str, Tensor]:
        u = torch.empty_like(learned["logits"]).uniform_(_EDGE, 1 - _EDGE, generator=now.generator)
        t = min(1.0, now.progress)
        tau, kappa = hot + (cold - hot) * t, low + (high - low) * t
        return {
            "noise": -(-u.log()).log(),
            "scale": torch.tensor([kappa / tau, 1 / tau], device=w.device),
        }

    def soft(learned: Values, fixed: Values) -> Tensor:
        z = learned["logits"] * fixed["scale"][0] + fixed["noise"] * fixed["scale"][1]
        return (z.softmax(1) @ options.to(z.device)).reshape(shape)

    def hard(learned: Values) -> Tensor:
        logits = learned["logits"]
        return options.to(logits.device)[logits.argmax(1)].reshape(shape)

    def effective(w: Tensor, learned: Values, fixed: Values, training: bool) -> Tensor:
        return w * (soft(learned, fixed) if training else hard(learned))

    return Gate(
        weight=effective,
        score=lambda w, learned: hard(learned),
        learned={"logits": logits},
        settle=settle,
        regularizer=lambda w, learned, fixed: -(w.detach() * soft(learned, fixed)).square().sum(),
        lr=lr,
        frozen=not train_weights,
    )
