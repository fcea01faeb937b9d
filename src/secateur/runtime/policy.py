"""Which entries of a key-value cache stay: a budget, what always stays, and a criterion for the others."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d

from ..errors import RecipeError
from ..registry import get
from ..select import keep_count, select


@dataclass(frozen=True)
class Policy:
    """Which entries of a layer's cache stay.

    Attributes:
        criterion: scores entries: ``attention-received``, by what queries saw so far, or ``token-recency``.
        budget: so many entries stay, of each head; None for ``keep``.
        keep: the fraction of all tokens seen that stays, in place of a budget.
        sinks: so many at the front always stay.
        recent: the share of the entries that are the last ones, which always stay.
        window: so many of the last ones always stay, in place of ``recent``; and only their attention counts.
        smooth: the score is averaged over so many neighbors.
        once: entries leave behind the prompt, and never again.
        shift: positions are those in the cache, not those in the text.

    >>> Policy("token-recency", keep=0.2).count(96), Policy("token-recency", budget=32).count(96)
    (19, 32)
    """

    criterion: str
    budget: int | None = None
    keep: float | None = None
    sinks: int = 0
    recent: float = 0.0
    window: int | None = None
    smooth: int = 1
    once: bool = False
    shift: bool = False

    def __post_init__(self) -> None:
        if (self.budget is None) == (self.keep is None):
            raise RecipeError("say how much of the cache stays by one of budget (entries) and keep (a fraction)")
        if self.keep is not None and not 0 < self.keep <= 1:
            raise RecipeError(f"keep is {self.keep}: it is the fraction of the cache that stays, above 0 and at most 1")
        if self.sinks < 0 or not 0 <= self.recent <= 1:
            raise RecipeError(
                f"sinks is {self.sinks} and recent {self.recent}: a number of entries, and a share of them from 0 to 1"
            )
        if self.window is not None and self.window < 1:
            raise RecipeError(f"window is {self.window}: it is how many of the last tokens always stay, 1 or more")
        if self.smooth < 1 or self.smooth % 2 == 0:
            raise RecipeError(f"smooth is {self.smooth}: it is an odd number of neighbors, 1 for none")
        if self.budget is not None and self.budget < self.least:
            raise RecipeError(
                f"a budget of {self.budget} is too small: {self.least - 1} entries always stay, and one more is needed"
            )

    @property
    def least(self) -> int:
        """So many entries there are at least, of a text that is as long."""
        return self.sinks + (self.window or 0) + 1

    @cached_property
    def attends(self) -> bool:
        """Whether the criterion needs attention weights."""
        return "token_attention" in get("criterion", self.criterion).needs

    def count(self, seen: int) -> int:
        """How many entries stay of ``seen`` tokens."""
        wanted = self.budget if self.keep is None else max(self.least, keep_count(self.keep, seen))
        assert wanted is not None
        return min(seen, wanted)

    def received(self, attention: Tensor) -> Tensor:
        """What entries get from these queries, summed over them: ``(batch, heads, group, queries, entries)``."""
        found: Tensor = get("criterion", self.criterion)({"token_attention": attention})
        return found * attention.shape[-2]

    def chosen(self, position: Tensor, first: Tensor, seen: int, score: Tensor | None, dead: Tensor | None) -> Tensor:
        """Which entries stay, exactly ``count(seen)`` of each head.

        Args:
            position: of each entry in its text, ``(batch, heads, entries)``.
            first: where each text begins behind its padding, ``(batch,)``.
            score: what entries received; None where the criterion reads positions.
            dead: padding, bool, which leaves first.
        """
        count = self.count(seen)
        ranked: Tensor = get("criterion", self.criterion)({"token_position": position}) if score is None else score
        late = position >= seen - self._last(count)
        if self.smooth > 1:
            apart = ranked.masked_fill(late if dead is None else late | dead, 0.0)
            ranked = avg_pool1d(apart, self.smooth, stride=1, padding=self.smooth // 2)
        stays = late
        if self.sinks:
            stays = stays | (position - first[:, None, None] < self.sinks)
        ranked = ranked.masked_fill(stays, torch.inf)
        if dead is not None:
            ranked = ranked.masked_fill(dead, -torch.inf)
        return select(ranked.flatten(0, 1), count).view_as(ranked)

    def _last(self, count: int) -> int:
        """So many of the last ones stay, of ``count``."""
        return keep_count(self.recent, count) if self.window is None else self.window

    def least_of(self, position: Tensor, first: Tensor, seen: int, score: Tensor) -> Tensor:
        """The one entry of each head that `chosen` would let go, where one is too many, ``(batch, heads, 1)``.

        Of several with the least score it is the last, as `select` keeps the earlier ones.
        """
        stays = position >= seen - self._last(position.shape[2] - 1)
        if self.sinks:
            stays |= position - first[:, None, None] < self.sinks
        ranked = score.masked_fill(stays, torch.inf)
        return position.shape[2] - 1 - ranked.flip(2).argmin(2, keepdim=True)

    def asdict(self) -> dict[str, Any]:
        """As plain data, from which ``Policy(**data)`` makes it again."""
        return asdict(self)
