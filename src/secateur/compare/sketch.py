"""A sketch of a mask: its bits at a few fixed positions of every layer, small enough to keep with a run."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError

Bits = NDArray[np.bool_]


def pack(layers: Sequence[Bits]) -> dict[str, Any]:
    """The bits of all layers one after the other, the first bit of a byte the highest, as base64; and their counts.

    >>> pack([np.array([True, False]), np.array([True])])
    {'bits': 'oA==', 'counts': [2, 1]}
    """
    bits = np.concatenate([np.asarray(layer, bool).ravel() for layer in layers]) if layers else np.zeros(0, bool)
    return {
        "bits": base64.b64encode(np.packbits(bits).tobytes()).decode("ascii"),
        "counts": [int(np.asarray(layer).size) for layer in layers],
    }


def unpack(sketch: Mapping[str, Any]) -> list[Bits]:
    """The layers that `pack` was given.

    Raises:
        DataError: it is no sketch.

    >>> [layer.tolist() for layer in unpack({"bits": "oA==", "counts": [2, 1]})]
    [[True, False], [True]]
    """
    try:
        counts = [int(count) for count in sketch["counts"]]
        raw = np.frombuffer(base64.b64decode(sketch["bits"], validate=True), np.uint8)
    except (KeyError, TypeError, ValueError, binascii.Error):
        raise DataError("a sketch of a mask holds bits (base64) and counts") from None
    if min(counts, default=0) < 0 or (sum(counts) + 7) // 8 != len(raw):
        raise DataError(f"a sketch of a mask has {len(raw)} bytes for {sum(counts)} bits")
    bits = np.unpackbits(raw, count=sum(counts)).astype(bool)
    return np.split(bits, np.cumsum(counts)[:-1]) if counts else []
