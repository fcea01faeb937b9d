"""A sample of the positions of masks, the same for every method: what overlaps are estimated on."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

#: Positions in all, and in one layer at most.
POSITIONS, OF_LAYER = 32768, 1024


def positions(numel: int, count: int, layer: int) -> Tensor:
    """Distinct positions in a layer, in order; they depend on its size and its number alone."""
    if numel <= count:
        return torch.arange(numel)
    generator = torch.Generator().manual_seed(layer)
    return torch.randperm(numel, generator=generator)[:count].sort().values


def sketch(masks: Iterable[tuple[str, Tensor]], layers: int) -> dict[str, Any]:
    """The bits of masks at fixed positions, as plain data.

    Args:
        masks: name and boolean mask of each of the pruned layers, in the model's order.
        layers: how many there are.

    >>> sketch([("a", torch.ones(2, 4, dtype=torch.bool))], 1)
    {'bits': '/w==', 'counts': [8]}
    """
    count = max(1, min(OF_LAYER, POSITIONS // max(1, layers)))
    bits, counts = [], []
    for k, (_, mask) in enumerate(masks):
        flat = mask.reshape(-1)
        at = positions(flat.numel(), count, k)
        bits.append(flat[at.to(flat.device)].cpu().numpy().astype(bool))
        counts.append(len(at))
    packed = np.packbits(np.concatenate(bits)) if bits else np.zeros(0, dtype=np.uint8)
    return {"bits": base64.b64encode(packed.tobytes()).decode(), "counts": counts}


def bits_of(found: Mapping[str, Any]) -> np.ndarray:
    """The bits of a sketch, layer after layer."""
    packed = np.frombuffer(base64.b64decode(found["bits"]), dtype=np.uint8)
    return np.unpackbits(packed, count=sum(found["counts"])).astype(bool)
