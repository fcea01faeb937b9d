"""What gates of channels execute for inputs, and thresholds that are moved until it is what was asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils._pytree import tree_map

from ..layers import evaluating
from ..measure.flops import flops
from ..structured import Target
from .base import answering
from .channels import ChannelGates, Pass, inputs_of
from .measured import inputs_in, is_of_inputs
from .structure import Call

#: Inputs that thresholds are settled on, at most, and how often their way is halved.
INPUTS, _HALVINGS = 1024, 16


def whole(gates: ChannelGates, call: Call) -> tuple[int, int]:
    """Operations for one input where nothing is left out, and those of the dense network alone."""
    inputs = inputs_in(call)
    one = tree_map(lambda x: x[:1] if is_of_inputs(x, inputs) else x, call)
    with answering(gates):
        found, dense = (flops(net, *one[0], **one[1]).total for net in (gates, gates.model))
    return found, dense


def saved(gates: ChannelGates, call: Call) -> float:
    """Operations that an input of a batch does without, on average, counted in one pass that leaves out nothing."""
    run = Pass(gates, counts=True)
    run.executes = False
    with evaluating(gates), torch.no_grad(), run:
        gates.model(*call[0], **call[1])
    return float(run.saved) / inputs_in(call)


def settled(gates: ChannelGates, batches: Iterable[Any], target: str | None, move: Callable[[float], None]) -> float:
    """Move thresholds from the lowest (0) as far to the highest (1) as a target needs, and say how far.

    What is executed then, the mean over up to `INPUTS` inputs, goes into the record, and a note where it is too much.

    Args:
        move: sets the thresholds so far on their way.
    """
    calls, count = [], 0
    for batch in batches:
        calls.append(inputs_of(batch))
        count += inputs_in(calls[-1])
        if count >= INPUTS:
            break
    notes: list[str] = []
    gates.record["notes"] = notes
    if not calls:
        notes.append("there is no validation data: thresholds are as training left them, whatever the target is")
        return 0.0

    sizes = [whole(gates, call) for call in calls]

    def share(way: float) -> float:
        """What is executed, in operations of the dense network."""
        move(way)
        done = 0.0
        for call, (full, dense) in zip(calls, sizes, strict=True):
            done += inputs_in(call) * (full - saved(gates, call)) / dense
        return done / count

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
