"""What every run is measured by, whatever was pruned: sizes, operations, speed beside the dense model."""

from __future__ import annotations

import copy
import datetime
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..compound.run import Compounded
from ..compression import compress
from ..kernels import library
from ..measure import count_parameters, machine, versions
from ..measure.flops import effective_flops, flops
from ..measure.interval import ratio
from ..measure.latency import samples
from ..measure.size import bytes_in_memory
from .positions import sketch_of

REPEATS = 15


def call(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs of a forward pass as arguments."""
    if isinstance(example, Mapping):
        return (), dict(example)
    return (example if isinstance(example, tuple) else (example,)), {}


def sizes(model: nn.Module, masks: Mapping[str, Tensor], layers: list[dict[str, Any]], example: Any) -> dict[str, Any]:
    """Parameters, bytes and operations of a model.

    ``sparse_bytes`` is of the tensors as a bit and a value for each weight that stays in a masked layer.
    """
    parameters, nonzero = count_parameters(model)
    total = bytes_in_memory(model)
    width = next(model.parameters()).element_size()
    saved = sum((m.numel() - int(m.count_nonzero())) * width - math.ceil(m.numel() / 8) for m in masks.values())
    args, kwargs = call(example)
    return {
        "parameters": parameters, "nonzero": nonzero, "bytes": total, "sparse_bytes": min(total, total - saved),
        "flops": flops(model, *args, **kwargs).total, "effective_flops": effective_flops(model, *args, **kwargs).total,
        "layers": layers, "sketch": sketch_of(masks.values(), len(masks)) if masks else None,
    }  # fmt: skip


def stored(made: Compounded) -> dict[str, Any]:
    """Bytes of what a compound made, integers as they are packed; zeros save none of those."""
    total = int(made.run["after"]["bytes"])
    return {"bytes": total, "sparse_bytes": total} if made.grids else {"bytes": total}


def speed(dense: nn.Module, made: nn.Module, masked: bool, example: Any) -> dict[str, Any] | None:
    """Latency beside the dense model, in turns: as it is where units are gone, packed where weights are.

    None where nothing about it can be faster here.
    """
    how = "as it is"
    if masked:
        if library() is None or next(made.parameters()).is_cuda:
            return None
        made, how = compress(copy.deepcopy(made), example, cache=False), "cpu-sparse"
    args, kwargs = call(example)
    taken = samples({"dense": dense, "made": made}, args, kwargs, REPEATS)
    found = ratio(taken["dense"], taken["made"])
    return {
        "seconds": sorted(taken["made"])[REPEATS // 2], "dense_seconds": sorted(taken["dense"])[REPEATS // 2],
        "ratio": found.median, "low": found.low, "high": found.high, "how": how,
    }  # fmt: skip


def surroundings() -> dict[str, Any]:
    """Where and when."""
    return {
        "environment": {"machine": machine(), "versions": versions(), "threads": torch.get_num_threads()},
        "created": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
