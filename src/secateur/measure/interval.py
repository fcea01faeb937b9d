"""Medians with intervals that assume nothing of how the values are spread."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import comb

from ..errors import DataError


@dataclass(frozen=True)
class Interval:
    """A median, and two of the values that enclose the true one.

    Attributes:
        median: of the values.
        low, high: order statistics: the true median lies between them with probability ``coverage``.
        coverage: what was asked for or more; less only where so few values cannot give it, and then ``low`` and
            ``high`` are the smallest and the largest.
    """

    median: float
    low: float
    high: float
    coverage: float

    def to_dict(self) -> dict[str, float]:
        """For a file."""
        return asdict(self)


def interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """The median of independent values and the narrowest symmetric pair of them that covers the true median.

    The k-th smallest and the k-th largest of n values both lie on the same side of the true median only if fewer than
    k of n fair coins show heads, or tails; so the coverage is a binomial sum, whatever the distribution is.

    >>> interval([3.0, 1.0, 2.0, 5.0, 4.0, 6.0])
    Interval(median=3.5, low=1.0, high=6.0, coverage=0.96875)

    Raises:
        DataError: no values, or a confidence that is not between 0 and 1.
    """
    if not values:
        raise DataError("a median needs at least one value")
    if not 0 < confidence < 1:
        raise DataError(f"confidence is a fraction between 0 and 1, not {confidence:g}")
    ranked, n = sorted(values), len(values)
    outside, below = 2, 0  # of 2^n outcomes: those that miss, with k = 1; how many values lie outside on a side
    while below + 1 <= (n - 1) // 2:
        more = outside + 2 * comb(n, below + 1)
        if more > (1 - confidence) * 2**n:
            break
        outside, below = more, below + 1
    coverage = max(0.0, 1 - outside / 2**n)
    return Interval(statistics.median(ranked), ranked[below], ranked[n - 1 - below], coverage)


def ratio(slower: Sequence[float], faster: Sequence[float], confidence: float = 0.95) -> Interval:
    """How many times as large the first values are, turn by turn: what disturbs one turn disturbs both sides of it.

    >>> ratio([2.0, 4.0, 30.0], [1.0, 2.0, 15.0]).median
    2.0
    """
    return interval([a / b for a, b in zip(slower, faster, strict=True)], confidence)
