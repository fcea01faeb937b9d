"""Which size each layer gets out of one budget, where each says how its error falls with its size."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import RecipeError

Numbers = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Curve:
    """The sizes that a layer may have, increasing, and the error at each; errors do not grow."""

    sizes: Numbers
    errors: Numbers

    def corners(self) -> list[int]:
        """The options on the lower convex hull: each next one takes away less error for each unit of size.

        >>> Curve(np.array([1.0, 2, 3, 4]), np.array([9.0, 8, 1, 1])).corners()
        [0, 2]
        """
        found: list[int] = []
        for k in range(len(self.sizes)):
            if found and self.errors[k] >= self.errors[found[-1]]:
                continue
            while len(found) > 1 and self._slope(found[-2], found[-1]) <= self._slope(found[-2], k):
                found.pop()
            found.append(k)
        return found

    def _slope(self, a: int, b: int) -> float:
        """Error that goes for each unit of size, from one option to a larger one."""
        return float((self.errors[a] - self.errors[b]) / (self.sizes[b] - self.sizes[a]))


def greedy(curves: Mapping[str, Curve], budget: float) -> dict[str, int]:
    """The option of each layer, such that all together are no larger than the budget and no improvement fits any more.

    The error that goes for each unit of size decides, along the hull of each curve; what is left of the budget in the
    end is spent on the improvements, on the hull or not, that take away most. Where the budget is used up at the end of
    a step along the hulls, no other choice has a smaller sum of errors.

    >>> curve = Curve(np.array([1.0, 2, 3]), np.array([5.0, 1, 0]))
    >>> greedy({"a": curve, "b": Curve(curve.sizes, 10 * curve.errors)}, 4)
    {'a': 0, 'b': 2}

    Raises:
        RecipeError: the smallest options together exceed the budget.
    """
    chosen = dict.fromkeys(curves, 0)
    left = budget - sum(float(c.sizes[0]) for c in curves.values())
    if left < 0:
        raise RecipeError(
            f"the smallest ranks take {budget - left:,.0f} of a budget of {budget:,.0f}: ask for less to go"
        )
    corners = {name: c.corners() for name, c in curves.items()}
    heap = [_step(k, name, c, corners[name], 0) for k, (name, c) in enumerate(curves.items()) if len(corners[name]) > 1]
    heapq.heapify(heap)
    while heap:
        _, order, name, at = heapq.heappop(heap)
        curve, path = curves[name], corners[name]
        cost = float(curve.sizes[path[at + 1]] - curve.sizes[path[at]])
        if cost > left:
            continue  # smaller steps of others may fit
        left -= cost
        chosen[name] = path[at + 1]
        if at + 2 < len(path):
            heapq.heappush(heap, _step(order, name, curve, path, at + 1))
    while best := _fitting(curves, chosen, left):
        name, option = best
        left -= float(curves[name].sizes[option] - curves[name].sizes[chosen[name]])
        chosen[name] = option
    return chosen


def _step(order: int, name: str, curve: Curve, path: Sequence[int], at: int) -> tuple[float, int, str, int]:
    return (-curve._slope(path[at], path[at + 1]), order, name, at)


def _fitting(curves: Mapping[str, Curve], chosen: Mapping[str, int], left: float) -> tuple[str, int] | None:
    """The improvement that takes away most error of those that still fit."""
    best, found = 0.0, None
    for name, curve in curves.items():
        now = chosen[name]
        last = int(np.searchsorted(curve.sizes, curve.sizes[now] + left, side="right")) - 1
        option = int(np.searchsorted(-curve.errors, -curve.errors[last], side="left"))  # the smallest as good
        gain = float(curve.errors[now] - curve.errors[option])
        if option > now and gain > best:
            best, found = gain, (name, option)
    return found
