"""A solver whose survivors share a few values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..formats.sharing import check_bits, codebook
from ..granularity import Granularity
from ..registry import register
from ..select import select
from .base import Solved


def check(shape: tuple[int, int], name: str, pattern: Granularity, knobs: Mapping[str, Any]) -> None:
    """Refuse a number of bits that there is not, before any work."""
    check_bits(knobs["bits"])


@register("solver", paper="1510.00149", check=check, quantizes=True, integers="round", shares="share", survey="D1")
def share(weight: Tensor, score: Tensor, keep: float, granularity: Granularity, *, bits: int = 5) -> Solved:
    """Choose the mask by score, then let the survivors of a layer share ``2^bits`` values, found by k-means.

    :: min over c of sum over survivors of min_k (w - c_k)^2

    Choose it for the smallest file of a convolutional network: values and the gaps between survivors are written as
    Huffman codes (``--quantize shared:5``).

    Beware: for storage; weights are decoded before they are used. A layer has one set of values, so with 4 bits and
    less a language model loses more than by groups of integers.

    Source: Han, Mao and Dally, Deep compression, arXiv 1510.00149, section 3: linear initialization; recovery
    codebooks trains the shared values further.
    """
    mask = granularity.unpool(select(granularity.pool(score), keep), (weight.shape[0], weight.shape[1]))
    found = codebook(weight * mask, bits)
    return Solved(found.round(weight * mask), mask, grid=found)
