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
    """

    progress: float = 1.0
    swap: float = 0.0


@register("driver")
def once(step: int, steps: int) -> Update | None:
    """The mask is made when training begins, or after it, and does not change.

    Choose it for pruning at initialization, and for everything that happens after training.

    >>> once(0, 10), once(1, 10)
    (Update(progress=1.0, swap=0.0), None)

    Source: the survey's static pruning; before training first in Lee et al., SNIP, arXiv 1810.02340.
    """
    return Update() if step == 0 else None


@register("driver", paper="1710.01878")
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


@register("driver", paper="1911.11134")
def regrow(
    step: int, steps: int, *, every: int = 100, fraction: float = 0.3, until: float = 0.75, decay: str = "cosine",
    grow: str = "gradient", start: str = "random",
) -> Update | None:  # fmt: skip
    """Sparse from the first step on: every so many steps some weights are dropped, and as many others grown.

    :: swap = fraction / 2 (1 + cos(pi step / (until steps))), or fraction where ``decay`` is none

    ``grow`` is the criterion that chooses among the weights that are not there, ``start`` the one of the first mask.

    Choose it when training must not cost more than the sparse model.

    Beware: ``every`` times the learning rate must leave new weights time to grow before they are judged.

    >>> regrow(0, 400), regrow(100, 400, fraction=0.4, until=0.5).swap, regrow(300, 400)
    (Update(progress=1.0, swap=0.0), 0.2, None)

    Source: Evci et al., RigL, arXiv 1911.11134, section 3; Mocanu et al., SET, arXiv 1707.04780.
    """
    _positive(every)
    if not 0 <= fraction <= 1 or not 0 < until <= 1 or decay not in ("cosine", "none"):
        raise RecipeError("driver 'regrow': fraction is in [0, 1], until in (0, 1], decay cosine or none")
    if step == 0:
        return Update()
    if step % every or step >= until * steps:
        return None
    share = 0.5 * (1 + math.cos(math.pi * step / (until * steps))) if decay == "cosine" else 1.0
    return Update(swap=fraction * share)


@register("driver", name="gradual-regrow", paper="2106.10404")
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
    (Update(progress=1.0, swap=0.0), None)

    Source: You et al., Drawing early-bird tickets, arXiv 1909.11957, section 3.2 and algorithm 1, and the authors'
    code, in which five masks are kept and the newest is compared with the other four.
    """
    if isinstance(window, bool) or not isinstance(window, int) or window < 2:
        raise RecipeError(f"driver 'early-bird': window is a whole number of masks of at least 2, not {window!r}")
    last = distances[-(window - 1) :]
    still = len(last) == window - 1 and max(last) <= below
    return Update() if still or (step == steps and step > 0) else None


def _span(steps: int, begin: float, end: float) -> tuple[int, int]:
    if not 0 <= begin <= end <= 1:
        raise RecipeError(f"a driver's begin and end are fractions of the run, begin first: not {begin:g} and {end:g}")
    return round(begin * steps), round(end * steps)


def _positive(every: int) -> None:
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise RecipeError(f"a driver's 'every' is a whole number of steps of at least 1, not {every!r}")
