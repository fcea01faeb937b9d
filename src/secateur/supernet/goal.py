"""Targets of a search over sub-networks: counted ones, and latency, which is predicted in the search and measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..errors import RecipeError
from ..measure.latency import latency
from ..processes import decided
from ..search.space import Counts
from ..structured.targets import Target
from .elastic import Elastic

#: Name -> measures models on the same inputs, in seconds.
Measure = Callable[[Mapping[str, nn.Module], Sequence[Any], Mapping[str, Any]], Mapping[str, float]]
#: What a target may be in.
QUANTITIES = ("flops", "params", "bytes", "latency")
#: By how much a measured latency may be above the target.
CLOSE = 0.05
#: Turns in which two latencies are compared.
_REPEATS = 15


@dataclass(frozen=True)
class Predictor:
    """A latency as a sum of what a sub-network has, each at a price that is never negative.

    :: latency / latency of the whole = a + b flops + c params + d products, each as a share of the whole model's

    Attributes:
        prices: a, b, c and d.
        error: mean absolute error on the sub-networks that it was fitted to.
    """

    prices: tuple[float, ...]
    error: float

    def __call__(self, facts: Sequence[float]) -> float:
        """The latency as a share of the whole model's."""
        return float(sum(p * f for p, f in zip(self.prices, facts, strict=True)))


def facts_of(elastic: Elastic, counts: Counts) -> tuple[float, ...]:
    """What a latency is predicted from: one, and the shares of operations, parameters and products."""
    most = elastic.most
    return (
        1.0,
        *(elastic.cost(q, counts) / max(1, elastic.cost(q, most)) for q in ("flops", "params")),
        elastic.products(counts) / max(1, elastic.products(most)),
    )


def fitted(facts: Sequence[Sequence[float]], shares: Sequence[float]) -> Predictor:
    """The least squares prices that are not negative.

    >>> p = fitted([(1, 0.0, 0, 0), (1, 0.5, 0, 0), (1, 1.0, 0, 0)], [0.2, 0.6, 1.0])
    >>> [round(x, 3) for x in p.prices]
    [0.2, 0.8, 0.0, 0.0]
    """
    x, y = np.asarray(facts, dtype=np.float64), np.asarray(shares, dtype=np.float64)
    prices = nonnegative(x, y)
    return Predictor(tuple(float(p) for p in prices), float(np.abs(x @ prices - y).mean()))


def nonnegative(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """``argmin over p >= 0 of |x p - y|``: the best of all choices of columns whose own least squares fit has no sign.

    For a handful of columns.
    """
    best, least = np.zeros(x.shape[1]), float(y @ y)
    for choice in range(1, 1 << x.shape[1]):
        columns = [c for c in range(x.shape[1]) if choice >> c & 1]
        found = np.linalg.lstsq(x[:, columns], y, rcond=None)[0]
        error = float(np.square(x[:, columns] @ found - y).sum())
        if (found >= 0).all() and error < least - 1e-15:
            best, least = np.zeros(x.shape[1]), error
            best[columns] = found
    return best


def _seconds(models: Mapping[str, nn.Module], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Mapping[str, float]:
    return latency(models, args, kwargs, repeats=_REPEATS)


class Goal:
    """A target for sub-networks: what one costs, and how much that may be.

    Args:
        made: a sub-network as a module, to be measured.
        model: the whole one.
        samples: how many sub-networks a latency is predicted from.
        known: `record` of an earlier run with the same sub-networks.

    Raises:
        RecipeError: the target is in memory, which sub-networks are not searched by.
    """

    def __init__(
        self, elastic: Elastic, target: Target, model: nn.Module, made: Callable[[Counts], nn.Module], *,
        samples: int = 24, seed: int = 0, measure: Measure = _seconds, known: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.elastic, self.target, self.model, self.made = elastic, target, model, made
        self._clock = measure
        self.measured = target.quantity == "latency"
        if target.quantity not in QUANTITIES:
            raise RecipeError(f"sub-networks are searched by flops, params, bytes or latency: not '{target}'")
        self.predictor: Predictor | None = None
        self.seconds: float | None = None
        self.shares: dict[Counts, float] = {}
        if not self.measured:
            self.total = float(elastic.cost(target.quantity, elastic.most))
            self.limit = target.remaining(self.total)
            return
        if known is not None:
            self.seconds = float(known["seconds"])
            self.predictor = Predictor(tuple(known["prices"]), float(known["error"]))
        else:
            self.seconds = float(self._measure({"whole": model})["whole"])
            self.predictor = self._fit(samples, seed)
        self.total = 1.0
        self.limit = target.remaining(self.seconds) / self.seconds

    def _measure(self, models: Mapping[str, nn.Module]) -> Mapping[str, float]:
        """Of several processes the first one measures, while the others wait."""
        found: Mapping[str, float] = decided(lambda: dict(self._clock(models, self.elastic.args, self.elastic.kwargs)))
        return found

    def _fit(self, samples: int, seed: int) -> Predictor:
        generator = torch.Generator().manual_seed(seed)
        some = [self.elastic.least, self.elastic.most, *(self.elastic.draw(generator) for _ in range(samples))]
        return fitted([facts_of(self.elastic, c) for c in some], [self.share(c) for c in some])

    def record(self) -> dict[str, Any]:
        """What a latency is predicted by, as JSON data."""
        if self.predictor is None:
            return {}
        return {"seconds": self.seconds, "prices": list(self.predictor.prices), "error": self.predictor.error}

    def cost(self, counts: Counts) -> float:
        """What a sub-network costs: a count, or a predicted share of the whole model's latency."""
        if self.predictor is not None:
            return self.predictor(facts_of(self.elastic, counts))
        return float(self.elastic.cost(self.target.quantity, counts))

    def share(self, counts: Counts) -> float:
        """The latency of a sub-network as a share of the whole model's, measured in turns with it."""
        if counts not in self.shares:
            times = self._measure({"whole": self.model, "small": self.made(counts)})
            self.shares[counts] = times["small"] / times["whole"]
        return self.shares[counts]

    def reached(self, counts: Counts) -> float:
        """What a sub-network has of the target's quantity: counted, or measured, as `limit` is given."""
        return self.share(counts) if self.measured else self.cost(counts)

    def met(self, counts: Counts) -> bool:
        """Whether a sub-network is within the target; a measured one may be above by 5 %."""
        return self.reached(counts) <= self.limit * (1 + CLOSE if self.measured else 1)

    def refusal(self, reached: float, which: str = "the smallest sub-network") -> str:
        """Why the target cannot be had."""
        if self.measured:
            has = f"takes {100 * reached:.0f}% of the whole model's time here, and {100 * self.limit:.0f}%"
        else:
            has = f"has {self.target.quantity} {reached:,.0f}, and {self.limit:,.0f}"
        return f"the target is not met: {which} {has} was asked for: lower low=, depth= or kernel=, or ask for less"
