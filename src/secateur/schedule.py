"""How fast the target is approached: functions from progress in [0, 1] to the share of the target reached."""

from __future__ import annotations

from .registry import get, register


@register("schedule", name="one-shot")
def one_shot(t: float) -> float:
    """All at once.

    Choose it for one-shot pruning, where a single step removes everything.

    Source: the default of post-training methods.
    """
    return 1.0


@register("schedule")
def linear(t: float) -> float:
    """The same number of weights in every step.

    :: s(t) = s_f t

    Choose it for iterative pruning with few steps.

    Source: common practice; the order-one case of the polynomial schedule of arXiv 1710.01878.
    """
    return t


@register("schedule", paper="1710.01878")
def cubic(t: float) -> float:
    """Fast at first, when redundancy is plentiful, slow at the end.

    :: s(t) = s_f (1 - (1 - t)^3)

    Choose it for gradual pruning with recovery between the steps.

    Source: Zhu and Gupta, To prune, or not to prune, arXiv 1710.01878, equation 1 with s_i = 0.
    """
    return 1.0 - (1.0 - t) ** 3


@register("schedule", paper="2006.05467")
def geometric(t: float, sparsity: float) -> float:
    """The same fraction of what is left in every step.

    :: keep(t) = keep_f^t

    Choose it for high sparsity in many rounds (SynFlow, FORCE, lottery tickets).

    Source: Tanaka et al., SynFlow, arXiv 2006.05467, algorithm 1.
    """
    if sparsity <= 0:
        return 0.0
    return (1.0 - float((1.0 - sparsity) ** t)) / sparsity


def sparsity_at(name: str, t: float, sparsity: float) -> float:
    """Sparsity that the schedule ``name`` asks for at progress ``t``; at ``t = 1`` it is ``sparsity``.

    >>> [round(sparsity_at("cubic", t, 0.8), 3) for t in (0.0, 0.5, 1.0)]
    [0.0, 0.7, 0.8]
    """
    t = min(1.0, max(0.0, t))
    return sparsity * float(get("schedule", name)({"t": t, "sparsity": sparsity}))
