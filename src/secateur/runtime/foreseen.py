"""Feed-forward parts of which only those neurons are computed that a small network foresees, token by token."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..select import select
from .sparse import Columns, Kept, columns_product, rows_product, scored


class Predictor(nn.Module):
    """Says of each neuron how likely it is to count for a token: two layers of low rank, and how often it does.

    >>> Predictor(8, 3, 16)(torch.zeros(2, 8)).shape
    torch.Size([2, 16])
    """

    def __init__(self, inputs: int, rank: int, neurons: int) -> None:
        super().__init__()
        self.narrow = nn.Parameter(torch.zeros(rank, inputs))
        self.widen = nn.Parameter(torch.zeros(neurons, rank))
        self.often = nn.Parameter(torch.zeros(neurons))

    def forward(self, x: Tensor) -> Tensor:
        return linear(linear(x.to(self.narrow.dtype), self.narrow), self.widen, self.often)

    @property
    def flops(self) -> int:
        """Operations of one token."""
        return 2 * (self.narrow.numel() + self.widen.numel())


@dataclass(eq=False)
class Part:
    """A feed-forward part: ``down(act(first(x)))``, or ``down(act(first(x)) * up(x))``.

    Attributes:
        path: of the module that is all of it; of the first layer, where there is none.
        reads, closes: paths of the first and the last layer.
    """

    path: str
    reads: str
    closes: str
    first: nn.Linear
    act: nn.Module
    up: nn.Linear | None
    down: nn.Linear

    def opened(self, x: Tensor) -> Tensor:
        """What the neurons give of tokens."""
        found: Tensor = self.act(self.first(x))
        return found if self.up is None else found * self.up(x)

    def score(self, x: Tensor) -> Tensor:
        """How much each neuron counts for tokens."""
        return scored(self.opened(x))

    @property
    def weights(self) -> int:
        """Weights that belong to one neuron."""
        return (2 if self.up is None else 3) * self.first.in_features


@dataclass(eq=False)
class Foresight:
    """Which neurons of a part a token computes: those that its predictor ranks first, an exact number.

    Attributes:
        predict: from what is read, ``(tokens, features)``, to a rank of each neuron.
        count: so many are computed.
        source: the path of the part whose input is read in place of the own one; a part that ran before.
        followed: whether another part reads what this one is given.
        recent: what parts were given last, by path; shared by all parts of a model.
    """

    path: str
    predict: nn.Module
    count: int
    source: str | None = None
    followed: bool = False
    recent: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def keep(self, x: Tensor) -> Tensor:
        """The neurons that are computed, bool, of what the part is given, ``(tokens, features)``."""
        if self.followed:
            self.recent[self.path] = x.detach()
        with torch.no_grad():
            given = x if self.source is None else self.recent.pop(self.source)
            return select(self.predict(given).float(), self.count)


@dataclass(eq=False)
class _Foreseeing:
    """Where a token's neurons are foreseen; counts those that are computed."""

    part: Part
    foresight: Foresight
    path: str
    threshold: float | None = None
    kept: int = 0
    seen: int = 0

    def chosen_of(self, keep: Tensor) -> Kept:
        """What stays of the neurons of tokens, counted."""
        kept = Kept.of(keep)
        self.kept, self.seen = self.kept + len(kept.at), self.seen + keep.numel()
        return kept


@dataclass(eq=False)
class Foreseen(_Foreseeing):
    """A feed-forward part with a gate that computes those neurons alone that are foreseen."""

    columns: Columns = field(default_factory=Columns, repr=False)

    def run(self, x: Tensor, sparse: bool) -> Tensor:
        part, flat = self.part, x.flatten(0, -2)
        keep = self.foresight.keep(flat)
        if not sparse:
            found: Tensor = part.down(part.opened(x) * keep.view(*x.shape[:-1], -1))
            return found
        columns = self.columns.of(part.down.weight)
        kept = self.chosen_of(keep)
        values = part.act(rows_product(flat, kept, part.first.weight, part.first.bias))
        if part.up is not None:
            values = values * rows_product(flat, kept, part.up.weight, part.up.bias)
        return columns_product(values, kept, columns, part.down.bias).view(*x.shape[:-1], -1)


@dataclass(eq=False)
class Opens(_Foreseeing):
    """The first layer of a feed-forward part without a gate; neurons that are not foreseen are zero."""

    chosen: Any = field(default=None, repr=False)  # for the last layer

    def run(self, x: Tensor, sparse: bool) -> Tensor:
        first, flat = self.part.first, x.flatten(0, -2)
        keep = self.foresight.keep(flat)
        if not sparse:
            whole: Tensor = linear(x, first.weight, first.bias)
            self.chosen = keep.view(whole.shape)
            return whole * keep.view(whole.shape)
        kept = self.chosen = self.chosen_of(keep)
        out = flat.new_zeros(keep.shape)
        out[kept.token, kept.at] = rows_product(flat, kept, first.weight, first.bias)
        return out.view(*x.shape[:-1], -1)


@dataclass(eq=False)
class Closes:
    """The last layer of the same part: it reads the neurons that were computed."""

    opens: Opens
    path: str
    threshold: float | None = None
    kept: int = 0
    seen: int = 0
    columns: Columns = field(default_factory=Columns, repr=False)

    def run(self, x: Tensor, sparse: bool) -> Tensor:
        down, chosen = self.opens.part.down, self.opens.chosen
        self.opens.chosen = None
        if not sparse:
            found: Tensor = linear(x * chosen, down.weight, down.bias)
            return found
        columns = self.columns.of(down.weight)
        return columns_product(chosen.of_rows(x.flatten(0, -2)), chosen, columns, down.bias).view(*x.shape[:-1], -1)
