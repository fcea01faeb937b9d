"""Wall time of a forward pass."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..layers import evaluating


def latency(
    models: Mapping[str, nn.Module], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None, repeats: int = 9
) -> dict[str, float]:
    """Median seconds of one forward pass of each model, as `samples` finds them."""
    return {name: statistics.median(found) for name, found in samples(models, args, kwargs, repeats).items()}


def samples(
    models: Mapping[str, nn.Module], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None, repeats: int = 9
) -> dict[str, list[float]]:
    """Seconds of forward passes of each model, in evaluation mode on the same inputs.

    The models take turns, so that whatever else the machine does falls on all of them alike. On a GPU the clock
    waits for the work to end.
    """
    given = dict(kwargs or {})
    times: dict[str, list[float]] = {name: [] for name in models}
    with evaluating(*models.values()), torch.inference_mode():
        for turn in range(repeats + 2):
            for name, model in models.items():
                begun = time.perf_counter()
                model(*args, **given)
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                if turn >= 2:  # the first passes allocate and choose kernels
                    times[name].append(time.perf_counter() - begun)
    return times
