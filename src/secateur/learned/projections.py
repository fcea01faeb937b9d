"""Penalties that project: exact zeros or exact counts while the model trains."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import RecipeError
from ..registry import register
from ..select import keep_count, select
from .base import Now, Penalty, Values, rows


def half_space(x: Tensor, before: Tensor, epsilon: float) -> Tensor:
    """Units zero that left the half-space of what they were: where ``<x_u, before_u> < epsilon ||before_u||^2``.

    >>> before = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
    >>> half_space(torch.tensor([[[0.25, 5.0], [-0.1, 5.0]]]), before, 0.0).tolist()
    [[[0.25, 5.0], [0.0, 0.0]]]
    """
    left = (x * before).sum(-1) < epsilon * before.square().sum(-1)
    return x.masked_fill(left[..., None], 0.0)


@register("penalty", family="projection", paper="2107.07467", on="zero-invariant")
def oto(*, strength: float = 1e-3, begin: float = 0.25, epsilon: float = 0.0) -> Penalty:
    """Zero-invariant groups: shrink those that are to go, and project on zero those that turn away.

    :: strength sum over chosen units ||w_u||_2; after ``begin``: w_u <- 0 where <w_u, w_u before the step> <
       epsilon ||w_u before||^2, and zero from then on

    A group is all that makes a channel: its weights, bias, and the scale and shift behind it; zeros there make
    its output zero. By count, those of smallest norm are chosen when ``begin`` of the run is over.

    Choose it to train and prune a network in one run, without fine-tuning; granularity coupled, then ``plan``.

    Beware: what is chosen and has not turned away by the end is not zero (raise ``strength`` or ``epsilon``, or take
    penalty hesso); the chosen units' weights are kept a second time. Units are chosen by norm alone; the official
    code also looks at the angle to the gradient, and adapts the strength.

    Source: Chen et al., Only train once (OTO), arXiv 2107.07467; the split into chosen and
    free groups is of OTOv2's official code (DHSPG).
    """
    _fraction("oto", begin)

    def start(x: Tensor, now: Now) -> dict[str, Tensor]:
        nothing = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
        return update(x, {"chosen": nothing, "before": x[nothing]}, now)

    def update(x: Tensor, state: Values, now: Now) -> dict[str, Tensor]:
        if now.at != round(begin * now.steps):
            return dict(state)
        chosen = ~select(rows(x), now.final)
        return {"chosen": chosen, "before": x[chosen].clone()}

    def value(x: Tensor, state: Values) -> Tensor:
        return strength * (rows(x) * state["chosen"]).sum()

    def step(x: Tensor, state: Values, now: Now) -> Tensor:
        chosen, before = state["chosen"], state["before"]
        new = half_space(x[chosen], before, epsilon).masked_fill(~before.any(-1, keepdim=True), 0.0)
        before.copy_(new)
        x = x.clone()
        x[chosen] = new
        return x

    return Penalty(value=value, start=start, update=update, step=step)


@register("penalty", family="projection", paper="2409.09085", on="zero-invariant")
def hesso(*, begin: float = 0.1, end: float = 0.5, periods: int = 5) -> Penalty:
    """Zero-invariant groups that are scaled to zero step by step, some in each period: exact counts, no strength.

    :: w_u <- w_u (T - t - 1) / (T - t) at step t of a period of T, for the units that the period has chosen

    ``begin`` and ``end`` are fractions of the run. Each period chooses its share of what is to go, of smallest norm,
    and ends with it at zero, where it stays.

    Choose it in place of oto: it needs no strength and meets the count.

    Beware: units are chosen by norm; the official code averages five scores, of which norm is one.

    Source: Chen et al., HESSO: towards automatic efficient and user friendly any neural network training and pruning,
    arXiv 2409.09085, and its official code.
    """
    _fraction("hesso", begin)
    _fraction("hesso", end)
    if begin >= end or periods < 1:
        raise RecipeError("penalty 'hesso': begin lies before end, and there is at least 1 period")

    def start(x: Tensor, now: Now) -> dict[str, Tensor]:
        nothing = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
        return {"gone": nothing, "going": nothing.clone()}

    def place(now: Now) -> tuple[int, int, int]:
        """The period, the step in it, and its length; before the first the period is -1."""
        first, last = round(begin * now.steps), round(end * now.steps)
        length = max(1, (last - first) // periods)
        since = now.at - first - 1
        return (-1, 0, length) if since < 0 else (since // length, since % length, length)

    def update(x: Tensor, state: Values, now: Now) -> dict[str, Tensor]:
        period, t, _ = place(now)
        gone, going = state["gone"], state["going"]
        if period < 0 or period > periods or t:
            return {"gone": gone, "going": going}
        gone = gone | going
        if period == periods:
            return {"gone": gone, "going": torch.zeros_like(going)}
        units = x.shape[1]
        lost = units - keep_count(now.final, units)
        count = units - round(lost * (period + 1) / periods)
        kept = select(rows(x).masked_fill(gone, -torch.inf), count)
        return {"gone": gone, "going": ~kept & ~gone}

    def step(x: Tensor, state: Values, now: Now) -> Tensor:
        _, t, length = place(now)
        x = x.masked_fill(state["gone"][..., None], 0.0)
        return torch.where(state["going"][..., None], x * ((length - t - 1) / (length - t)), x)

    return Penalty(start=start, update=update, step=step)


@register("penalty", name="admm-training", family="projection", paper="1804.03294", on="unit")
def admm_training(*, rho: float = 1e-3, every: int = 100) -> Penalty:
    """Train toward the nearest sparse matrix: weights, their projection and the running difference take turns.

    :: loss + rho / 2 ||W - Z + U||^2; every so often Z <- projection of W + U, U <- U + W - Z

    The projection keeps the units of largest norm of each pool, by count: it is the nearest matrix with so many.

    Choose it for a smooth way to a hard constraint, under any granularity.

    Beware: Z and U are two more copies of the weights. The paper trains in several rounds with rising ``rho``, then
    cuts and retrains: leave the last part of the run for that (the driver's ``begin`` and ``end``).

    Source: Zhang et al., A systematic DNN weight pruning framework using ADMM, arXiv 1804.03294, and the authors' code.
    """
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise RecipeError(f"penalty 'admm-training': every is a whole number of steps of at least 1, not {every!r}")

    def project(x: Tensor, keep: float) -> Tensor:
        return x.masked_fill(~select(x.square().sum(-1), keep)[..., None], 0.0)

    def start(x: Tensor, now: Now) -> dict[str, Tensor]:
        return {"z": project(x, now.final), "u": torch.zeros_like(x)}

    def update(x: Tensor, state: Values, now: Now) -> dict[str, Tensor]:
        if now.at % every:
            return dict(state)
        z = project(x + state["u"], now.final)
        return {"z": z, "u": state["u"] + x - z}

    return Penalty(
        value=lambda x, state: 0.5 * rho * (x - state["z"] + state["u"]).square().sum(), start=start, update=update
    )


def _fraction(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise RecipeError(f"penalty '{name}': begin and end are fractions of the run, not {value:g}")
