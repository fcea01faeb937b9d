"""Wall time of a forward pass, of models that take turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from ..layers import evaluating

#: Turns that are not counted: the first passes allocate memory and choose kernels.
WARMUP = 2

_Found = TypeVar("_Found")


def latency(
    models: Mapping[str, nn.Module], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None, repeats: int = 9
) -> dict[str, float]:
    """Median seconds of one forward pass of each model, as `samples` finds them."""
    return {name: statistics.median(found) for name, found in samples(models, args, kwargs, repeats).items()}


def samples(
    models: Mapping[str, nn.Module], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None, repeats: int = 9
) -> dict[str, list[float]]:
    """Seconds of forward passes of each model, in evaluation mode on the same inputs, in `turns`."""
    given = dict(kwargs or {})
    return turns(models, lambda model: seconds(lambda: model(*args, **given))[0], repeats)


def turns(
    models: Mapping[str, nn.Module], action: Callable[[nn.Module], _Found], repeats: int, warmup: int = WARMUP
) -> dict[str, list[_Found]]:
    """What ``action`` finds of each model, ``repeats`` times, in evaluation mode without gradients.

    The models take turns, every other round in reverse, so that whatever else the machine does, and whatever one model
    leaves in the caches, falls on all of them alike. ``warmup`` rounds go before, which are not kept.
    """
    found: dict[str, list[_Found]] = {name: [] for name in models}
    order = list(models.items())
    with evaluating(*models.values()), torch.inference_mode():
        for turn in range(-warmup, repeats):
            for name, model in order if turn % 2 == 0 else reversed(order):
                one = action(model)
                if turn >= 0:
                    found[name].append(one)
    return found


def seconds(call: Callable[[], _Found]) -> tuple[float, _Found]:
    """How long a call takes, and what it returns; on a GPU the clock waits for the work to end."""
    begun = time.perf_counter()
    out = call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begun, out
