"""What a search chooses from: how much of each layer or family may stay, and what that costs, by exact counts."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from ..errors import RecipeError

#: How many units of each node stay.
Counts = tuple[int, ...]

#: Halvings of the scale in `project`: more than a float has digits.
_HALVINGS = 64
#: Wanted shares below it are taken for it: a share of nothing could not be scaled up.
_LEAST = 1e-6


@dataclass(frozen=True)
class Node:
    """One layer, or one family of units that compete.

    Attributes:
        name: as the allocation ``explicit`` takes it.
        units: how many there are.
        sizes: how many may stay, ascending.
        facts: what strategies may look at, all numbers; see `describe`.
    """

    name: str
    units: int
    sizes: Sequence[int]
    facts: Mapping[str, float] = field(default_factory=dict)

    def floor(self, units: float) -> int:
        """The largest allowed size that is not above ``units``, or the smallest there is."""
        return self.sizes[max(0, bisect_right(self.sizes, math.floor(units + 1e-6)) - 1)]


def _no_edges() -> list[tuple[int, int]]:
    return []


@dataclass(frozen=True, eq=False)
class Space:
    """Nodes, what any counts of them cost, and how much that may be.

    Attributes:
        cost: of counts; more units never cost less.
        limit: what may be spent.
        prices: of one unit of each node, where the cost is their sum plus that of what cannot go; else None.
        edges: makes the pairs of nodes between which data flows, for strategies that ask.
    """

    nodes: tuple[Node, ...]
    cost: Callable[[Counts], float]
    limit: float
    prices: tuple[float, ...] | None = None
    edges: Callable[[], list[tuple[int, int]]] = _no_edges

    def __len__(self) -> int:
        return len(self.nodes)

    @property
    def least(self) -> Counts:
        """The smallest counts that the bounds allow."""
        return tuple(node.sizes[0] for node in self.nodes)

    @property
    def most(self) -> Counts:
        """The largest counts that the bounds allow."""
        return tuple(node.sizes[-1] for node in self.nodes)

    def keeps(self, counts: Counts) -> tuple[float, ...]:
        """Counts as fractions of the units that there are."""
        return tuple(count / node.units for count, node in zip(counts, self.nodes, strict=True))

    def check(self) -> None:
        """Refuse bounds that leave more than the limit.

        Raises:
            RecipeError: with what can be had.
        """
        if not self.nodes:
            raise RecipeError("there is nothing to search: no layer or family may be cut")
        if (least := self.cost(self.least)) > self.limit:
            raise RecipeError(
                f"the bounds leave {least:,.0f}, and the target is {self.limit:,.0f}: lower them with bounds=, or ask "
                "for less"
            )


def highest(space: Space, counts: Counts, index: int) -> int:
    """The largest allowed size of one node within the limit, all others as in ``counts``; its smallest if none is."""
    sizes = space.nodes[index].sizes
    if space.prices is not None:
        others = space.cost(counts) - space.prices[index] * counts[index]
        return space.nodes[index].floor((space.limit - others) / space.prices[index])

    def fits(place: int) -> bool:
        return space.cost((*counts[:index], sizes[place], *counts[index + 1 :])) <= space.limit

    low, high = 0, len(sizes)  # low fits or is the first, high does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return sizes[low]


def project(space: Space, wanted: Sequence[float]) -> Counts:
    """The counts nearest to a proposal, up to a common factor, that meet the target.

    The proposal is scaled until the limit is reached, each node within its bounds, and what the rounding left over is
    given to the nodes that lost most by it. No single node of the result could be one step larger within the limit.

    >>> nodes = (Node("a", 10, range(1, 11)), Node("b", 10, range(1, 11)))
    >>> space = Space(nodes, lambda c: c[0] + 2.0 * c[1], 15.0, (1.0, 2.0))
    >>> project(space, [1.0, 1.0]), project(space, [1.0, 0.1])
    ((5, 5), (10, 2))
    """
    space.check()
    if len(wanted) != len(space) or not all(math.isfinite(w) for w in wanted):
        raise RecipeError(f"a proposal is one finite number for each of {len(space)} nodes, not {list(wanted)}")
    shares = [max(_LEAST, float(w)) for w in wanted]
    if space.cost(space.most) <= space.limit:
        return space.most

    def at(scale: float) -> Counts:
        return tuple(n.floor(min(1.0, s * scale) * n.units) for n, s in zip(space.nodes, shares, strict=True))

    low, high = 0.0, 1.0 / min(shares)  # low is within the limit, high above it
    counts, above = at(low), at(high)
    for _ in range(_HALVINGS):
        scale = (low + high) / 2 if high < 4 * low else math.sqrt(max(low, 1e-9) * high)
        tried = at(scale)
        if space.cost(tried) <= space.limit:
            low, counts = scale, tried
        else:
            high, above = scale, tried
        if _steps_apart(space, counts, above) <= 1:
            break
    lost = {i: shares[i] * high * n.units - counts[i] for i, n in enumerate(space.nodes)}
    order = sorted(lost, key=lambda i: -lost[i])
    for single in (True, False):  # one step each, then as much as there is
        for i in order:
            best = highest(space, counts, i)
            if best > counts[i]:
                sizes = space.nodes[i].sizes
                following = sizes[bisect_right(sizes, counts[i])]
                counts = (*counts[:i], following if single else best, *counts[i + 1 :])
    return counts


def _steps_apart(space: Space, low: Counts, high: Counts) -> int:
    """By how many steps two counts differ, up to 2."""
    apart = 0
    for node, a, b in zip(space.nodes, low, high, strict=True):
        if a != b:
            apart += 1 if node.sizes[bisect_right(node.sizes, a)] == b else 2
        if apart > 1:
            break
    return apart


def bounded(least: int, units: int, step: int = 1, low: float = 0.0, high: float = 1.0) -> Sequence[int]:
    """The allowed sizes: multiples of ``step`` and the whole, of at least ``least`` and within the bounds.

    >>> list(bounded(8, 20, 8)), list(bounded(1, 10, low=0.25, high=0.5))
    ([8, 16, 20], [3, 4, 5])
    """
    first = max(least, math.ceil(low * units - 1e-9))
    first = min(units, -(-first // step) * step)
    last = math.floor(high * units + 1e-9)
    if step == 1:
        return range(first, max(first, last) + 1)
    sizes = [s for s in [*range(first, units, step), units] if s <= last]
    return sizes or [first]
