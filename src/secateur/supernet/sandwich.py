"""The sandwich rule: the largest, the smallest and some random sub-networks learn in each step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RecipeError
from ..recover.distill import logits_of, outputs, soft
from ..search.space import Counts
from .subnet import Supernet

Loss = Callable[[nn.Module, Any], Tensor]


def sandwich(
    net: Supernet, loss: Loss, *, random: int = 2, distilled: bool = True,
    seen: Callable[[list[Counts]], None] = lambda counts: None,
) -> Loss:  # fmt: skip
    """The loss of one step on a batch: the sum over the largest, the smallest and ``random`` drawn sub-networks.

    The largest learns from the labels; the others learn its outputs where ``distilled``, else the labels too.
    Sub-networks are drawn from torch's global generator, whose state a checkpoint keeps.

    Args:
        loss: the task's.
        seen: is told which sub-networks a step has, the largest first.
    """
    if isinstance(random, bool) or not isinstance(random, int) or random < 0:
        raise RecipeError(f"random is how many sub-networks are drawn in each step, not {random!r}")

    def whole(model: nn.Module, batch: Any) -> Tensor:
        # drawn first: all processes of a run draw the same, before dropout draws for the rows that each has
        drawn = [net.elastic.draw(torch.default_generator) for _ in range(random)]
        with outputs(model, []) as own:
            total = loss(model, batch)
        some = [net.elastic.least, *drawn]
        seen([net.elastic.most, *some])
        taught = logits_of(own[""]).detach() if distilled else None
        for counts in some:
            sub = net.sub(counts)
            with outputs(sub, []) as its:
                plain = loss(sub, batch)
            total = total + (plain if taught is None else soft(logits_of(its[""]), taught, 1.0))
        return total

    return whole
