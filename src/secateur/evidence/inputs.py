"""Statistics of layer inputs, streamed in float32 or better."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import NumericalError
from ..facts import of_source
from ..layers import Layer
from ..processes import total
from ..select import is_finite
from ..symmetric import add_gram, mirror
from .watch import as_ni, watch

#: What a criterion or solver may name, and what it is.
INPUT_FACTS = of_source("inputs")

_ROWS = 256  # squares of so many rows fit the cache: ten times the speed of one reduction over all


class InputEvidence:
    """Running statistics of one layer's input.

    ``update`` takes ``(n, i)`` rows; any split into batches gives the same result, and ``merge`` of two
    is the evidence of both inputs together. A Gram matrix, when wanted, holds the norms too.
    """

    def __init__(self, size: int, needs: Iterable[str], device: torch.device | None = None) -> None:
        self.size = size
        self.needs = frozenset(needs)
        self.tokens = 0

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, device=device)

        self._gram = zeros(size, size) if "gram" in self.needs else None
        # The variance is a small difference of large numbers where features have a mean: sum it in float64.
        self._square = None
        if "input_var" in self.needs:
            self._square = zeros(size).double()
        elif "input_norm" in self.needs and self._gram is None:
            self._square = zeros(size)
        self._sum = zeros(size).double() if {"input_mean", "input_var"} & self.needs else None
        self._abs = zeros(size).double() if "input_abs" in self.needs else None
        self._nonzero = zeros(size).double() if "input_nonzero" in self.needs else None

    def update(self, x_ni: Tensor) -> None:
        """Add rows."""
        x = x_ni if x_ni.dtype in (torch.float32, torch.float64) else x_ni.float()
        self.tokens += x.shape[0]
        if self._gram is not None:
            add_gram(self._gram, x.float())
        if self._square is not None:
            for rows in x.split(_ROWS):
                wide = rows.double() if self._square.dtype == torch.float64 else rows
                self._square += wide.square().sum(0)
        if self._sum is not None:
            self._sum += x.sum(0, dtype=torch.float64)
        if self._abs is not None:
            self._abs += x.abs().sum(0, dtype=torch.float64)
        if self._nonzero is not None:
            self._nonzero += torch.count_nonzero(x, 0)

    def merge(self, other: InputEvidence) -> None:
        """Take in what another worker saw."""
        self.tokens += other.tokens
        for name in ("_gram", "_square", "_sum", "_abs", "_nonzero"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine is not None:
                mine += theirs.to(mine.device)

    def merge_all(self) -> None:
        """Take in what the other processes of the run saw; all of them have the same evidence then."""
        self.tokens = int(total(torch.tensor(self.tokens)))
        for name in ("_gram", "_square", "_sum", "_abs", "_nonzero"):
            if (mine := getattr(self, name)) is not None:
                mine.copy_(total(mine))

    def __getitem__(self, fact: str) -> Any:
        """One of `INPUT_FACTS`."""
        if fact == "tokens":
            return self.tokens
        if fact == "gram":
            return self._symmetric()
        if fact == "input_norm":
            return self._squares().sqrt().float()
        if fact == "input_mean" and self._sum is not None:
            return (self._sum / max(self.tokens, 1)).float()
        if fact == "input_var" and self._sum is not None and self._square is not None:
            mean = self._sum / max(self.tokens, 1)
            return (self._square / max(self.tokens, 1) - mean**2).clamp_min(0).float()
        if fact == "input_abs" and self._abs is not None:
            return (self._abs / max(self.tokens, 1)).float()
        if fact == "input_nonzero" and self._nonzero is not None:
            return (self._nonzero / max(self.tokens, 1)).float()
        raise KeyError(fact)

    def check_finite(self, name: str) -> None:
        """Raise `NumericalError` naming the layer when an activation was NaN or infinite."""
        for tensor in (self._gram, self._square, self._sum, self._abs):
            if tensor is not None and not is_finite(tensor):
                raise NumericalError(
                    f"the input of {name} is NaN or infinite on the calibration data; "
                    "check the model in its dtype and the data"
                )

    def _squares(self) -> Tensor:
        squares = self._square if self._gram is None else self._gram.diagonal()
        if squares is None:
            raise KeyError("input_norm")
        return squares

    def _symmetric(self) -> Tensor:
        if self._gram is None:
            raise KeyError("gram")
        mirror(self._gram)
        return self._gram


@torch.no_grad()
def gather_inputs(
    model: nn.Module, layers: Sequence[Layer], needs: Iterable[str], batches: Iterable[Any], run: Any
) -> dict[str, InputEvidence]:
    """Run the whole model over ``batches`` and gather evidence of all ``layers`` at once.

    ``run(model, batch)`` makes one forward pass. Layers that were not used have zero ``tokens``.
    """
    needs = frozenset(needs) & INPUT_FACTS.keys()
    found = {x.name: InputEvidence(x.shape[1], needs, x.stored.device) for x in layers}

    def on_input(layer: Layer, x: Tensor) -> None:
        found[layer.name].update(as_ni(layer, x))

    with watch(layers, on_input):
        for batch in batches:
            run(model, batch)
    for name, evidence in found.items():
        evidence.check_finite(name)
    return found
