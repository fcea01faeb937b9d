"""What gates of channels execute for inputs, and thresholds that are raised until it is what was asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..layers import evaluating
from ..measure.flops import flops
from ..structured import Target
from .channels import ChannelGates, Pass, inputs_of
from .structure import Call

#: Inputs that thresholds are settled on, at most, and how often the way to the highest ones is halved.
INPUTS, _HALVINGS = 1024, 16


def executed(gates: ChannelGates, call: Call) -> tuple[Tensor, int]:
    """Operations that each input of a batch takes, ``(inputs,)``, and those of the dense network for one.

    One pass for all: nothing is left out in it, and what would be is counted.
    """
    args, kwargs = call
    one = tree_map(lambda x: x[:1] if isinstance(x, Tensor) else x, call)
    was, gates.executes = gates.executes, False
    try:
        whole, dense = (flops(net, *one[0], **one[1]).total for net in (gates, gates.model))
        run = Pass(gates, counts=True)
        with evaluating(gates), torch.no_grad(), run:
            gates.model(*args, **kwargs)
    finally:
        gates.executes = was
    return whole - run.saved, dense


def settled(gates: ChannelGates, batches: Iterable[Any], target: str | None, move: Callable[[float], None]) -> float:
    """Move thresholds from where training left them (0) as far to their ends (1) as a target needs; how far it was.

    What is executed then, the mean over up to `INPUTS` inputs, goes into the record, and a note where it is too much.

    Args:
        move: sets the thresholds so far on their way.
    """
    calls, count = [], 0
    for batch in batches:
        calls.append(inputs_of(batch))
        count += len(next(x for x in (*calls[-1][0], *calls[-1][1].values()) if isinstance(x, Tensor)))
        if count >= INPUTS:
            break
    notes: list[str] = []
    gates.record["notes"] = notes
    if not calls:
        notes.append("there is no validation data: thresholds are as training left them, whatever the target is")
        return 0.0

    def share(way: float) -> float:
        """What is executed, in operations of the dense network."""
        move(way)
        found = [executed(gates, call) for call in calls]
        return float(torch.cat([x.double() / dense for x, dense in found]).mean())

    before = gates.record["flops"]["before"]
    limit = 1.0 if target is None else Target.parse(target).remaining(before) / before
    now, low, high = share(0.0), 0.0, 0.0
    if target is not None and now > limit:
        now, high = share(1.0), 1.0
        if now > limit:
            notes.append(
                f"target '{target}' is not met: with the highest thresholds {100 * now:.1f} % of the operations remain"
            )
        else:
            for _ in range(_HALVINGS):
                middle = (low + high) / 2
                tried = share(middle)
                low, high, now = (low, middle, tried) if tried <= limit else (middle, high, now)
            move(high)
    gates.record["flops"]["after"] = round(now * before)
    return high
