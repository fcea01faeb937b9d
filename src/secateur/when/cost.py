"""What a training run costs: the floating-point operations that its masks leave, step by step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..layers import Layer
from ..measure.flops import flops


@dataclass(frozen=True)
class TrainingFlops:
    """Floating-point operations of a training run, as in the appendix of RigL (arXiv 1911.11134).

    A step is a forward pass, and twice as much backward: for the inputs of a layer, and for its weights. The first two
    go with the weights that are there; the last with those whose gradients the method reads.

    Attributes:
        total: of the run so far.
        dense: of the same steps without a mask.
        steps: how many there were.
    """

    total: float
    dense: float
    steps: int

    @property
    def ratio(self) -> float:
        """The cost over that of dense training."""
        return self.total / self.dense if self.dense else 1.0


class Ledger:
    """Sums over steps of the density of each layer, of its weights and of the weights that get gradients.

    Nothing is done in steps without a change.
    """

    def __init__(self, layers: list[Layer]) -> None:
        self._sums = {x.name: [0.0, 0.0] for x in layers}
        self._now = {x.name: (1.0, 1.0) for x in layers}
        self._since = 0

    def enter(self, step: int, densities: Mapping[str, tuple[float, float]]) -> None:
        """After this step the densities are these."""
        self._count(step)
        self._now.update(densities)

    def peek(self) -> None:
        """The last step made the gradients of all weights."""
        for name, (_, gradient) in self._now.items():
            self._sums[name][1] += 1.0 - gradient

    def _count(self, step: int) -> None:
        for name, (weight, gradient) in self._now.items():
            self._sums[name][0] += weight * (step - self._since)
            self._sums[name][1] += gradient * (step - self._since)
        self._since = step

    def flops(self, step: int, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> TrainingFlops:
        """The operations up to this step, each of which read as much as this example."""
        self._count(step)
        measured = flops(model, *args, **kwargs)
        each = {n: measured.by_module.get(n, 0) for n in self._sums}
        rest = measured.total - sum(each.values())
        total = 3.0 * rest * step + sum(f * (2 * self._sums[n][0] + self._sums[n][1]) for n, f in each.items())
        return TrainingFlops(total, 3.0 * measured.total * step, step)

    def state_dict(self) -> dict[str, Any]:
        return {"sums": {n: list(s) for n, s in self._sums.items()}, "now": dict(self._now), "since": self._since}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._sums = {n: list(s) for n, s in state["sums"].items()}
        self._now = {n: (float(a), float(b)) for n, (a, b) in state["now"].items()}
        self._since = int(state["since"])
