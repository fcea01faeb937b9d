"""What becomes of the tokens that leave: merged into the ones most like them, or fused into one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..criteria.tokens import nearest
from ..registry import get
from ..select import select


@dataclass(frozen=True, eq=False)
class Seen:
    """What a gate knows of the tokens of one batch.

    Attributes:
        key: mean over heads, ``(batch, tokens, width of a head)``.
        attention: of the queries that count, ``(batch, heads, queries, tokens)``; None where it is not asked for.
        size: how many tokens of the input each stands for, ``(batch, tokens)``, float32.
        protected: so many at the front stay.
    """

    key: Tensor
    attention: Tensor | None
    size: Tensor
    protected: int

    @property
    def free(self) -> Tensor:
        """Which tokens may go, and may receive others."""
        free = torch.ones(self.size.shape[1], dtype=torch.bool, device=self.size.device)
        free[: self.protected] = False
        return free


class Act(Protocol):
    """What a gate does with a batch of tokens.

    Attributes:
        attends: needs the attention weights.
        weighs: tokens have sizes, by which attention and means over tokens are weighted.
    """

    @property
    def attends(self) -> bool: ...
    @property
    def weighs(self) -> bool: ...
    def most(self, tokens: int, protected: int) -> int:
        """How many can leave at once."""

    def __call__(self, x: Tensor, seen: Seen, leave: int) -> tuple[Tensor, Tensor]:
        """The tokens and their sizes, after ``leave`` of them left."""


def _positions(mask: Tensor) -> Tensor:
    """Where a mask is True, ``(batch, count)``; each row has as many."""
    return mask.nonzero()[:, 1].view(len(mask), -1)


def _rows(at: Tensor, tokens: int) -> Tensor:
    """Positions ``(batch, count)`` as rows of all inputs one after the other: whole rows are copied faster."""
    return (at + tokens * torch.arange(len(at), device=at.device)[:, None]).flatten()


def _take(x: Tensor, at: Tensor) -> Tensor:
    """Tokens ``(batch, count, width)`` at positions ``(batch, count)``."""
    return x.flatten(0, 1).index_select(0, _rows(at, x.shape[1])).view(*at.shape, x.shape[2])


@dataclass(frozen=True)
class Merge:
    """Tokens of even position go into the most similar ones of odd position, as averages weighted by size.

    What is protected comes first, then the even ones that stay, then the odd ones.

    Attributes:
        weighs: see `Act`.
    """

    weighs: bool = True
    attends = False

    def most(self, tokens: int, protected: int) -> int:
        return max(0, (tokens - protected) // 2)

    def __call__(self, x: Tensor, seen: Seen, leave: int) -> tuple[Tensor, Tensor]:
        free, n = seen.free, x.shape[1]
        score = get("criterion", "token-redundancy")({"token_key": seen.key, "token_free": free})
        score.masked_fill_(~free, torch.inf)
        gone = _positions(~select(score, n - leave))
        into = 2 * nearest(_take(seen.key, gone), seen.key, free)[1] + 1
        position, p = torch.arange(n, device=x.device), seen.protected
        order = torch.cat([position[:p], position[p + p % 2 :: 2], position[p + 1 - p % 2 :: 2]])
        stays = torch.ones_like(score, dtype=torch.bool).scatter_(1, gone, False)[:, order]
        at = order.expand(len(x), -1)[stays].view(len(x), -1)
        size = seen.size.scatter_add(1, into, seen.size.gather(1, gone))
        weighted = x.float() * seen.size[..., None]
        index = into[..., None].expand(-1, -1, x.shape[2])
        weighted = weighted.scatter_add(1, index, _take(weighted, gone))
        size = size.gather(1, at)
        return (_take(weighted, at) / size[..., None]).to(x.dtype), size


@dataclass(frozen=True)
class Fuse:
    """Tokens that get the least attention leave; their sum, weighted by that attention, is one token at the end.

    Attributes:
        fuse: False drops them altogether.
    """

    fuse: bool = True
    attends = True
    weighs = False

    def most(self, tokens: int, protected: int) -> int:
        return max(0, tokens - protected - 1)

    def __call__(self, x: Tensor, seen: Seen, leave: int) -> tuple[Tensor, Tensor]:
        if self.fuse and leave < 2:  # one token for one saves nothing
            return x, seen.size
        score = get("criterion", "attention-received")({"token_attention": seen.attention})
        ranked = score.masked_fill(~seen.free, torch.inf)
        mask = select(ranked, x.shape[1] - leave)
        at = _positions(mask)
        kept, size = _take(x, at), seen.size.gather(1, at)
        if not self.fuse:
            return kept, size
        weight = score.masked_fill(mask, 0.0)
        fused = (weight[:, None] @ x.float()).to(x.dtype)
        left = (seen.size * ~mask).sum(1, keepdim=True)
        return torch.cat([kept, fused], 1), torch.cat([size, left], 1)
