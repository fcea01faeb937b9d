"""What an allocation sees of a layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_LOW_BITS = 12  # a histogram bin spans 2^12 float32 steps: a relative width of 2^-11
_OCTAVES = 48  # scores more than 48 octaves below the largest share the lowest bin


def order_key(score: Tensor) -> Tensor:
    """int64 keys of float32 scores, in the same order (negative scores too)."""
    bits = (score.float() + 0.0).contiguous().view(torch.int32)  # -0.0 becomes 0.0
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()


def key_of(value: float) -> int:
    """`order_key` of one number."""
    return int(order_key(torch.tensor([value], dtype=torch.float32))[0])


class Sketch:
    """The scores of one layer as far as an allocation needs them: how many lie above a value.

    ``exact`` keeps the scores. Otherwise a histogram over the bits of the floats is kept, under 1 MB for
    a layer of any size, with bins of a relative width of 2^-11.
    """

    def __init__(self, score: Tensor, exact: bool = True) -> None:
        flat = score.detach().reshape(-1)
        self.numel = flat.numel()
        self.total = float(flat.sum(dtype=torch.float64))
        self._keys: Tensor | None = None
        if exact:
            self._keys = order_key(flat).to(torch.int32)
            self.low, self.high = int(self._keys.min()), int(self._keys.max())
            return
        bins = order_key(flat) >> _LOW_BITS
        top = int(bins.max())
        base = max(int(bins.min()), top - (_OCTAVES << (23 - _LOW_BITS)))
        counts = torch.bincount((bins - base).clamp_min_(0), minlength=1)
        self._base = base
        # above[b] = how many scores lie in bins >= b
        self._above = counts.flip(0).cumsum(0).flip(0).to(torch.int64)
        self.low, self.high = base << _LOW_BITS, ((top + 1) << _LOW_BITS) - 1

    def at_least(self, key: int) -> int:
        """How many scores have an `order_key` of at least ``key`` (a whole bin of a histogram counts)."""
        if self._keys is not None:
            return int((self._keys >= key).sum())
        index = (key >> _LOW_BITS) - self._base
        if index <= 0:
            return self.numel
        return int(self._above[index]) if index < len(self._above) else 0

    def above(self, value: float) -> int:
        """How many scores are greater than ``value``."""
        return self.at_least(key_of(value) + 1)


@dataclass(frozen=True)
class LayerFacts:
    """A layer as an allocation sees it.

    Attributes:
        shape: ``(o, i)``.
        numel: number of weights.
        kind: see `secateur.layers.Layer`.
        block: path of the repeated block that holds it, or None.
        sketch: `Sketch` of what the allocation's ``measure`` returned, or None.
        dims: sizes of the stored parameter, kernel axes apart.
    """

    shape: tuple[int, int]
    numel: int
    kind: str = "linear"
    block: str | None = None
    sketch: Sketch | None = None
    dims: tuple[int, ...] = ()
