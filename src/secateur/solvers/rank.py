"""Keep the best scores; the survivors do not move."""

from __future__ import annotations

from torch import Tensor

from ..granularity import Granularity
from ..registry import register
from ..select import select
from .base import Solved


@register("solver", integers="round", shares="share")
def rank(weight: Tensor, score: Tensor, keep: float, granularity: Granularity) -> Solved:
    """Zero the units with the lowest scores and leave the others as they are.

    Choose it for the fastest pruning, and when training follows.

    Source: the common form of score-based pruning (survey, section on pruning criteria).
    """
    mask = granularity.unpool(select(granularity.pool(score), keep), (weight.shape[0], weight.shape[1]))
    return Solved(weight * mask, mask)
