"""Where a threshold comes from: what data say of every one that could be chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

#: How far, in percent of the dense FLOPs, halves of the validation data may be apart before that is told.
_SURE = 5.0


@dataclass(frozen=True)
class Point:
    """What a threshold does on the data.

    Attributes:
        threshold: an input leaves at the first exit where its doubt is below it.
        cost: mean over inputs of what is executed.
        right: how many answers are right; of inputs without labels, how many are as the last exit's.
        left: how many leave at each exit, and at the end.
    """

    threshold: float
    cost: float
    right: int
    left: tuple[int, ...]


def sweep(doubt: Tensor, right: Tensor, costs: Sequence[float]) -> list[Point]:
    """Every threshold that makes a difference, from the one at which nothing leaves upward; exact.

    Args:
        doubt: of each input at each exit, ``(inputs, exits)``.
        right: whether the answer there, and at the end, is right, bool, ``(inputs, exits + 1)``.
        costs: of an input that leaves there, and at the end.

    >>> found = sweep(torch.tensor([[0.1], [0.5]]), torch.ones(2, 2, dtype=torch.bool), [1.0, 3.0])
    >>> [(round(p.threshold, 2), p.cost, p.left) for p in found]
    [(0.0, 3.0, (0, 2)), (0.3, 2.0, (1, 1)), (1.0, 1.0, (2, 0))]
    """
    inputs, exits = doubt.shape
    values, order = doubt.double().flatten().sort(stable=True)
    at = [exits] * inputs
    left = [0] * exits + [inputs]
    hits = right.tolist()
    count, total = sum(row[-1] for row in hits), float(costs[-1]) * inputs
    found = [Point(0.0, total / inputs, count, tuple(left))]
    every = values.tolist()
    for n, place in enumerate(order.tolist()):
        row, k = divmod(place, exits)
        if k < at[row]:
            count += int(hits[row][k]) - int(hits[row][at[row]])
            total += costs[k] - costs[at[row]]
            left[at[row]] -= 1
            left[k] += 1
            at[row] = k
        if n + 1 == len(every) or every[n + 1] > every[n]:
            above = 2 * every[n] if n + 1 == len(every) else (every[n] + every[n + 1]) / 2
            if tuple(left) != found[-1].left:
                found.append(Point(max(above, every[n] + 1e-9), total / inputs, count, tuple(left)))
    return found


def cheapest(points: Sequence[Point], fewest: float) -> Point:
    """The point of the least cost of those with at least so many right answers; the first where there is none."""
    return min((p for p in points if p.right >= fewest), key=lambda p: p.cost, default=points[0])


def within(points: Sequence[Point], limit: float) -> Point:
    """The first point whose cost is within a limit, or the last."""
    return next((p for p in points if p.cost <= limit), points[-1])


def point_at(points: Sequence[Point], threshold: float) -> Point:
    """What a threshold does on the data that the points are of."""
    return [p for p in points if p.threshold <= threshold][-1]


def notes(point: Point, points: Sequence[Point], least: float, record: Mapping[str, Any]) -> list[str]:
    """What should be told of a threshold of exits that was chosen.

    Args:
        least: the least doubt in the data.
        record: of the exits.
    """
    return [n for n in (_note(point, points, least, record), _unsure(point, record)) if n]


def _note(point: Point, points: Sequence[Point], least: float, record: Mapping[str, Any]) -> str:
    """A sentence for a threshold at which nothing leaves, or everything at the first exit."""
    inputs = sum(point.left)
    if point.left[-1] == inputs:
        if record["threshold"] is not None:
            return (
                f"no input leaves: the threshold {record['threshold']:g} is below the least entropy of the validation "
                f"data, {least:.3g} nats"
            )
        return (
            f"no input leaves: every threshold at which one does costs more than the drop of {record['drop']:g}; "
            "train longer, or allow more"
        )
    if point.left[0] == inputs and len(points) > 1:
        return (
            "every input leaves at the first exit: the later blocks are not needed at this threshold, and a shorter "
            "network does the same for all"
        )
    return ""


def _unsure(point: Point, record: Mapping[str, Any]) -> str:
    """A sentence where data that the threshold was not chosen on would leave in another way."""
    share, other = (100 * x / record["flops"]["before"] for x in (point.cost, record["apart"]))
    if abs(share - other) <= _SURE:
        return ""
    return (
        f"what is executed on other inputs is not sure: a threshold for {share:.0f} % of the FLOPs on one half of the "
        f"validation data executes {other:.0f} % on the other; exits that are trained little doubt all inputs alike: "
        "train longer, or give more validation data"
    )
