"""What becomes of the tokens that leave: merged into the ones most like them, fused into one, or dropped."""

from __future__ import annotations

from collections.abc import Sequence
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
        size: how many tokens of the input each stands for, ``(batch, tokens)``, float32; padding has 0.
        protected: so many at the front stay.
        lengths: tokens of each input, where some have fewer than others; None where there is no padding.
    """

    key: Tensor
    attention: Tensor | None
    size: Tensor
    protected: int
    lengths: Sequence[int] | None = None

    @property
    def free(self) -> Tensor:
        """Which tokens may go, and may receive others: ``(tokens,)``, or ``(batch, tokens)`` where there is padding."""
        free = torch.arange(self.size.shape[1], device=self.size.device) >= self.protected
        return free if self.lengths is None else free & (self.size > 0)

    def staying(self, score: Tensor, leave: int | Sequence[int]) -> Tensor:
        """The tokens that stay when so many of each input leave, ``(batch, tokens)``; padding does not."""
        ranked = score.masked_fill(~self.free, torch.inf)
        if self.lengths is None:
            assert isinstance(leave, int)
            return select(ranked, score.shape[1] - leave)
        ranked = ranked.masked_fill(self.size == 0, -torch.inf)
        counts = torch.tensor(_left(self.lengths, leave))
        stays = torch.zeros_like(ranked, dtype=torch.bool)
        for count in counts.unique().tolist():
            rows = (counts == count).to(score.device)
            stays[rows] = select(ranked[rows], count)
        return stays


class Act(Protocol):
    """What a gate does with a batch of tokens.

    Attributes:
        attends: needs the attention weights.
        every: those of all tokens, also where there is a class token.
        weighs: tokens have sizes, by which attention and means over tokens are weighted.
    """

    @property
    def attends(self) -> bool: ...
    @property
    def every(self) -> bool: ...
    @property
    def weighs(self) -> bool: ...
    def most(self, tokens: int, protected: int) -> int:
        """How many can leave at once."""

    def __call__(self, x: Tensor, seen: Seen, leave: int | Sequence[int]) -> tuple[Tensor, Tensor]:
        """The tokens and their sizes, after ``leave`` of them left: of all inputs, or of each of them."""


def _none(leave: int | Sequence[int]) -> bool:
    return leave < 1 if isinstance(leave, int) else max(leave) < 1


def _left(lengths: Sequence[int], leave: int | Sequence[int]) -> list[int]:
    """How many tokens of each input are left."""
    assert not isinstance(leave, int)
    return [n - gone for n, gone in zip(lengths, leave, strict=True)]


def positions(mask: Tensor, counts: Sequence[int] | None) -> tuple[Tensor, Tensor | None]:
    """Where a mask is True, ``(batch, count)``, and which of these are real, where rows have not as many as others."""
    if counts is None:
        return mask.nonzero()[:, 1].view(len(mask), -1), None
    most = max(counts)
    at = (~mask).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]
    return at, torch.arange(most, device=mask.device) < torch.tensor(counts, device=mask.device)[:, None]


def _rows(at: Tensor, tokens: int) -> Tensor:
    """Positions ``(batch, count)`` as rows of all inputs one after the other: whole rows are copied faster."""
    return (at + tokens * torch.arange(len(at), device=at.device)[:, None]).flatten()


def take(x: Tensor, at: Tensor, real: Tensor | None = None) -> Tensor:
    """Tokens ``(batch, count, width)`` at positions ``(batch, count)``; zeros where these are not real."""
    found = x.flatten(0, 1).index_select(0, _rows(at, x.shape[1])).view(*at.shape, x.shape[2])
    return found if real is None else found * real[..., None]


def wide(x: Tensor) -> Tensor:
    """As it is summed: in float32, or in more where it has more."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _sizes(size: Tensor, at: Tensor, real: Tensor | None) -> Tensor:
    found = size.gather(1, at)
    return found if real is None else found * real


@dataclass(frozen=True)
class Merge:
    """Tokens of even position go into the most similar ones of odd position, as averages weighted by size.

    What is protected comes first, then the even ones that stay, then the odd ones, then padding.

    Attributes:
        weighs: see `Act`.
    """

    weighs: bool = True
    attends = False
    every = False

    def most(self, tokens: int, protected: int) -> int:
        return max(0, (tokens - protected) // 2)

    def __call__(self, x: Tensor, seen: Seen, leave: int | Sequence[int]) -> tuple[Tensor, Tensor]:
        if _none(leave):
            return x, seen.size
        free, n = seen.free, x.shape[1]
        score = get("criterion", "token-redundancy")({"token_key": seen.key, "token_free": free})
        stays, real = seen.staying(score, leave), seen.size > 0
        leaving = None if isinstance(leave, int) else list(leave)
        gone, moves = positions(~stays & real, leaving)
        into = 2 * nearest(take(seen.key, gone), seen.key, free)[1] + 1
        weighted = wide(x) * seen.size[..., None]
        moved = take(weighted, gone, moves)
        rows = _rows(into, n)  # sums of whole rows
        weighted = weighted.flatten(0, 1).index_add(0, rows, moved.flatten(0, 1)).view_as(weighted)
        size = seen.size.scatter_add(1, into, _sizes(seen.size, gone, moves))
        position, p = torch.arange(n, device=x.device), seen.protected
        order = torch.cat([position[:p], position[p + p % 2 :: 2], position[p + 1 - p % 2 :: 2]])
        left = None if seen.lengths is None else _left(seen.lengths, leave)
        ordered, kept = positions(stays[:, order], left)
        at = order[ordered]
        size = _sizes(size, at, kept)
        return (take(weighted, at) / size.clamp_min(1)[..., None]).to(x.dtype), size


@dataclass(frozen=True)
class Fuse:
    """Tokens that get the least attention leave; their sum, weighted by that attention, is one token at the end.

    Attributes:
        fuse: False drops them altogether.
        every: the attention of all tokens counts, save what a token gives itself; else that of the class token, where
            there is one.
    """

    fuse: bool = True
    every: bool = False
    attends = True
    weighs = False

    def most(self, tokens: int, protected: int) -> int:
        return max(0, tokens - protected - 1)

    def __call__(self, x: Tensor, seen: Seen, leave: int | Sequence[int]) -> tuple[Tensor, Tensor]:
        if self.fuse:  # one token for one saves nothing
            leave = (leave if leave > 1 else 0) if isinstance(leave, int) else [k if k > 1 else 0 for k in leave]
        if _none(leave):
            return x, seen.size
        score = get("criterion", "attention-received")({"token_attention": seen.attention}, own=not self.every)
        mask = seen.staying(score, leave)
        at, real = positions(mask, None if seen.lengths is None else _left(seen.lengths, leave))
        kept, size = take(x, at, real), _sizes(seen.size, at, real)
        if not self.fuse:
            return kept, size
        gone = ~mask & (seen.size > 0)
        exact = wide(x)
        fused = ((score * gone).to(exact)[:, None] @ exact).to(x.dtype)
        return torch.cat([kept, fused], 1), torch.cat([size, (seen.size * gone).sum(1, keepdim=True)], 1)
