"""Positions that every method's masks are looked at, for a sketch: the same for all methods of a subject."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .sketch import pack

#: Positions in all, and in one layer at most.
POSITIONS, OF_LAYER = 32768, 1024


def positions(numel: int, count: int, layer: int) -> Tensor:
    """Distinct positions in a layer, in order; they depend on its size and its number alone."""
    if numel <= count:
        return torch.arange(numel)
    generator = torch.Generator().manual_seed(layer)
    return torch.randperm(numel, generator=generator)[:count].sort().values


def sketch_of(masks: Iterable[Tensor], layers: int) -> dict[str, Any]:
    """The bits of masks at fixed positions, as plain data.

    Args:
        masks: boolean, of each of the pruned layers, in the model's order.
        layers: how many there are.
    """
    count = max(1, min(OF_LAYER, POSITIONS // max(1, layers)))
    flat = [mask.reshape(-1) for mask in masks]
    bits = [m[positions(m.numel(), count, k).to(m.device)].cpu().numpy() for k, m in enumerate(flat)]
    return pack(bits)
