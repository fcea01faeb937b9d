"""When masks change: functions from the step of a training run to what happens at it.

A driver is asked at step 0, when masks are attached, and after each step of the optimizer. It says what share of the
way to the target sparsity the schedule has come, and how many of the weights that stay are exchanged for others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .errors import RecipeError
from .registry import register


@dataclass(frozen=True)
class Update:
    """What happens to the masks at one step.

    Attributes:
        progress: in [0, 1], what the schedule is asked for; at 1 the target sparsity holds.
        swap: the fraction of the weights that stay in each pool that are dropped, and as many grown.
        fresh: all weights compete anew; what is gone may come back.
    """

    progress: float = 1.0
    swap: float = 0.0
    fresh: bool = False


@register("driver", change="cut")
def once(step: int, steps: int) -> Update | None:
    """The mask is made when training begins, or after it, and does not change.

    Choose it for pruning at initialization, and for everything that happens after training.

    >>> once(0, 10), once(1, 10)
    (Update(progress=1.0, swap=0.0, fresh=False), None)

    Source: the survey's static pruning; before training first in Lee et al., SNIP, arXiv 1810.02340.
    """
    return Update() if step == 0 else None


@register("driver", change="cut", paper="1710.01878")
def gradual(step: int, steps: int, *, begin: float = 0.0, end: float = 0.75, every: int = 100) -> Update | None:
    """From dense to sparse while the model trains: every so many steps a few more weights go, by the schedule.

    :: progress = (step - begin) / (end - begin), with begin and end as fractions of the run

    Choose it when the time of a dense training run is there: it is the strongest simple method.

    Beware: the last part of the run, after ``end``, is for recovery; do not set ``end`` to 1.

    >>> [gradual(s, 400).progress for s in (0, 100, 200, 300)], gradual(150, 400), gradual(400, 400)
    ([0.0, 0.3333333333333333, 0.6666666666666666, 1.0], None, None)

    Source: Zhu and Gupta, To prune, or not to prune, arXiv 1710.01878, section 3.
    """
    first, last = _span(steps, begin, end)
    _positive(every)
    if not first <= step <= last or ((step - first) % every and step != last):
        return None
    return Update(progress=(step - first) / (last - first) if last > first else 1.0)


@register("driver", change="renew", survey="B2.3")
def renew(
    step: int, steps: int, *, begin: float = 0.0, end: float = 0.0, every: int = 1, until: float = 1.0
) -> Update | None:
    """The mask is made anew every so many steps, among all weights: what was gone may come back.

    :: progress = (step - begin) / (end - begin), at most 1; with begin and end as fractions of the run

    Choose it with a hold under which weights that are gone go on changing, or with a criterion that remembers.

    Beware: after ``until`` the mask stays, and so does what it took, under any hold. With ``every`` at 1 a run ranks
    all weights in each step.

    >>> [renew(s, 400, end=0.5, every=100).progress for s in (0, 100, 300)], renew(50, 400, every=100)
    ([0.0, 0.5, 1.0], None)

    Source: He et al., Soft filter pruning, arXiv 1808.06866; Lin et al., DPF, arXiv 2006.07253, algorithm 1.
    """
    first, last = _span(steps, begin, end)
    _positive(every)
    if not 0 < until <= 1:
        raise RecipeError(f"driver 'renew': until is a fraction of the run above 0, not {until:g}")
    stop = int(until * steps)
    if step < first or step > stop or ((step - first) % every and step != stop):
        return None
    return Update(progress=min(1.0, (step - first) / (last - first)) if last > first else 1.0, fresh=True)


@register("driver", change="exchange", paper="1911.11134", survey="B2.2")
def regrow(
    step: int, steps: int, *, every: int = 100, fraction: float = 0.3, until: float = 0.75, decay: str = "cosine",
    grow: str = "gradient", start: str = "random", drop: str = "layer", spread: str = "none", soft: bool = False,
) -> Update | None:  # fmt: skip
    """Sparse from the first step on: every so many steps some weights are dropped, and as many others grown.

    :: swap = fraction / 2 (1 + cos(pi step / (until steps))), or fraction where ``decay`` is none

    ``grow`` is the criterion that chooses among the weights that are not there, ``start`` the one of the first mask.
    ``drop`` ranks what is there by ``layer``, or in all layers together (``all``), or takes what scores below zero
    (``negative``), whatever the fraction. ``spread`` says where as many grow: ``none``, in the layer that lost them;
    ``count``, in proportion to what is left of each layer; or a criterion, in proportion to its mean over what is left.
    ``soft``: what grows comes on top, and goes with the next exchange; the last one grows nothing.

    Choose it when training must not cost more than the sparse model.

    Beware: ``every`` times the learning rate must leave new weights time to grow before they are judged.

    >>> regrow(0, 400).progress, regrow(100, 400, fraction=0.4, until=0.5).swap, regrow(300, 400)
    (1.0, 0.2, None)

    Source: Evci et al., RigL, arXiv 1911.11134, section 3; Mocanu et al., SET, arXiv 1707.04780; ``spread`` of SNFS,
    arXiv 1907.04840, and DSR, arXiv 1902.05967; ``soft`` of MEST, arXiv 2110.14032.
    """
    _positive(every)
    if not 0 <= fraction <= 1 or not 0 < until <= 1 or decay not in ("cosine", "none"):
        raise RecipeError("driver 'regrow': fraction is in [0, 1], until in (0, 1], decay cosine or none")
    if drop not in ("layer", "all", "negative"):
        raise RecipeError(f"driver 'regrow': drop is layer, all or negative, not '{drop}'")
    if step == 0:
        return Update()
    if soft and step == math.ceil(until * steps):
        return Update()
    if step % every or step >= until * steps:
        return None
    return Update(swap=_share(step, steps, fraction, until, decay))


@register("driver", name="fan-in", change="fan-in", paper="2305.02299", survey="B2.2")
def fan_in(
    step: int, steps: int, *, every: int = 100, fraction: float = 0.3, until: float = 0.75, grow: str = "gradient",
    start: str = "random", ablate: float = 0.3,
) -> Update | None:  # fmt: skip
    """As regrow, but every neuron keeps the same number of inputs, and neurons that matter little go whole.

    :: a neuron goes when fewer than ablate times its fan-in of its weights would be kept or grown without it all

    What goes with a neuron is shared out: the fan-in of the others grows. The last layer keeps all its neurons.

    Choose it for sparse layers that run fast: all rows are alike, and the rows that are gone can be cut out.

    Beware: granularity row alone. What a larger fan-in cannot share out evenly is lost.

    >>> fan_in(0, 400).progress, fan_in(100, 400, fraction=0.4, until=0.5).swap
    (1.0, 0.2)

    Source: Lasby et al., Dynamic sparse training with structured sparsity (SRigL), arXiv 2305.02299, section 3.
    """
    _positive(every)
    if not 0 <= fraction <= 1 or not 0 < until <= 1 or not 0 <= ablate <= 1:
        raise RecipeError("driver 'fan-in': fraction and ablate are in [0, 1], until in (0, 1]")
    if step == 0:
        return Update()
    if step % every or step >= until * steps:
        return None
    return Update(swap=_share(step, steps, fraction, until, "cosine"))


@register("driver", name="gradual-regrow", change="exchange", paper="2106.10404")
def gradual_regrow(
    step: int, steps: int, *, begin: float = 0.0, end: float = 0.75, every: int = 100, fraction: float = 0.5,
    grow: str = "gradient",
) -> Update | None:  # fmt: skip
    """From dense to sparse, and at every cut some of what stays is exchanged for what went.

    Choose it in place of gradual: weights that were cut too early may come back.

    >>> gradual_regrow(200, 400).swap, gradual_regrow(0, 400).progress
    (0.12500000000000006, 0.0)

    Source: Liu et al., GraNet, arXiv 2106.10404, section 4: the share falls with a cosine as in RigL.
    """
    found = gradual(step, steps, begin=begin, end=end, every=every)
    if found is None:
        return None
    return Update(found.progress, fraction * 0.5 * (1 + math.cos(math.pi * found.progress)))


@register("driver", name="early-bird", paper="1909.11957")
def early_bird(
    step: int, steps: int, distances: tuple[float, ...], *, window: int = 5, below: float = 0.1
) -> Update | None:
    """Once, early: when the mask that would be drawn has ceased to change from epoch to epoch.

    :: max over the last ``window`` - 1 epochs of d(mask now, mask then) <= below, d = share of units that differ

    ``distances`` are those of the mask after this epoch to the masks after the earlier ones, the oldest first.

    Choose it to find a ticket in the first part of a dense run, and to train only that.

    Beware: at the end of the run the mask is drawn whatever the distances are.

    >>> early_bird(100, 400, (0.3, 0.08, 0.06), window=3), early_bird(100, 400, (0.08, 0.2), window=3)
    (Update(progress=1.0, swap=0.0, fresh=False), None)

    Source: You et al., Drawing early-bird tickets, arXiv 1909.11957, section 3.2 and algorithm 1, and the authors'
    code, in which five masks are kept and the newest is compared with the other four.
    """
    if isinstance(window, bool) or not isinstance(window, int) or window < 2:
        raise RecipeError(f"driver 'early-bird': window is a whole number of masks of at least 2, not {window!r}")
    last = distances[-(window - 1) :]
    still = len(last) == window - 1 and max(last) <= below
    return Update() if still or (step == steps and step > 0) else None


def _share(step: int, steps: int, fraction: float, until: float, decay: str) -> float:
    """The fraction that is exchanged at a step."""
    return fraction * (0.5 * (1 + math.cos(math.pi * step / (until * steps))) if decay == "cosine" else 1.0)


def _span(steps: int, begin: float, end: float) -> tuple[int, int]:
    if not 0 <= begin <= end <= 1:
        raise RecipeError(f"a driver's begin and end are fractions of the run, begin first: not {begin:g} and {end:g}")
    return round(begin * steps), round(end * steps)


def _positive(every: int) -> None:
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise RecipeError(f"a driver's 'every' is a whole number of steps of at least 1, not {every!r}")
