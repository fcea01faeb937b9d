"""One pass of a model in which inputs leave behind some of its blocks, with what an exit there answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from .between import hidden, mask_of
from .rows import Rows, inputs_in

#: ``(number of the exit, its logits) -> which inputs go on``.
Decide = Callable[[int, Tensor], Tensor]


@dataclass(frozen=True)
class Answer:
    """What a model answers that does not answer with a tensor: its logits alone."""

    logits: Tensor

    def __getitem__(self, name: str) -> Tensor:
        if name != "logits":
            raise KeyError(name)
        return self.logits


def logits_of(out: Any) -> Tensor | None:
    """The logits of an answer: itself, or what it calls so; None where it has no single one for each input."""
    found = out if isinstance(out, Tensor) else getattr(out, "logits", None)
    return found if isinstance(found, Tensor) and found.dim() == 2 and found.shape[1] > 1 else None


class Exit(nn.Module):
    """A classifier behind a block: the mean over positions, normalized, and a linear layer that starts at zero."""

    def __init__(self, width: int, classes: int, axis: int) -> None:
        super().__init__()
        self.axis = axis
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, classes)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        others = [d for d in range(1, x.dim()) if d != self.axis]
        if mask is not None and x.dim() == 3 and self.axis == 2 and mask.shape == x.shape[:2]:
            weight = mask.to(x.dtype)[..., None]
            pooled = (x * weight).sum(1) / weight.sum(1).clamp_min(1)
        else:
            pooled = x.mean(others) if others else x
        found: Tensor = self.linear(self.norm(pooled))
        return found


class _Over(Exception):
    """All inputs have left."""


class Leaving:
    """Hooks on the blocks of a model for one pass.

    Attributes:
        where: of each input, the number of the exit that it left at, or of exits where it did not leave.
        answers: the logits of each.
    """

    def __init__(
        self, model: nn.Module, blocks: Sequence[str], exits: Mapping[str, Exit], decide: Decide,
        rows: Rows | None = None,
    ) -> None:  # fmt: skip
        self.model, self.blocks, self.exits, self.decide = model, blocks, list(exits.items()), decide
        self.rows = Rows(model, blocks) if rows is None else rows
        self.numbers = {name: k for k, name in enumerate(exits)}

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The model's answer for those that stay, else None."""
        self.call = (args, kwargs)
        self.count = inputs_in(self.call)
        mask = mask_of(self.model, args, kwargs)
        self.mask = mask if mask is not None and len(mask) == self.count else None
        self.alive: Tensor | None = None  # None while all are
        self.where = torch.full((self.count,), len(self.exits))
        self.left: list[tuple[Tensor, Tensor]] = []
        with self._hooked():
            try:
                out = self.model(*args, **kwargs)
            except _Over:
                out = None
        self.answers = self._gathered(out)
        return out

    @contextmanager
    def _hooked(self) -> Iterator[None]:
        handles = []
        for name in self.blocks:
            module = self.model.get_submodule(name)
            handles.append(module.register_forward_pre_hook(self._enter(name), with_kwargs=True))
            if name in self.numbers:
                handles.append(module.register_forward_hook(self._leave(name)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, name: str) -> Callable[..., Any]:
        """What is still there for all inputs, such as a mask, is cut down to those that stay."""

        def enter(module: nn.Module, args: Any, kwargs: Any) -> Any:
            if self.alive is None or self.rows.asking:
                return None
            return self.rows.taken((args, kwargs), f"{name} takes", self.count, self.alive, self.call)

        return enter

    def _leave(self, name: str) -> Callable[..., Any]:
        number = self.numbers[name]

        def leave(module: nn.Module, args: Any, out: Any) -> Any:
            if self.rows.asking:
                return None
            x = hidden(out)
            assert x is not None
            now = self.count if self.alive is None else len(self.alive)
            if len(x) != now:
                raise ModelError(
                    f"{self.exits[number][0]} gives {len(x)} rows for {now} inputs: the model runs otherwise than it "
                    "did on the example"
                )
            mask = self.mask if self.mask is None or self.alive is None else self.mask[self.alive]
            logits = self.exits[number][1](x, mask)
            stays = self.decide(number, logits)
            if bool(stays.all()):
                return None
            alive = torch.arange(self.count, device=x.device) if self.alive is None else self.alive
            self.left.append((alive[~stays], logits[~stays]))
            self.where[alive[~stays].cpu()] = number
            self.alive = alive[stays]
            if not len(self.alive):
                raise _Over
            return self.rows.taken(out, f"{name} gives", now, stays.nonzero()[:, 0], self.call)

        return leave

    def _gathered(self, out: Any) -> Tensor:
        last = None if out is None else logits_of(out)
        if out is not None and last is None:
            raise ModelError(
                f"{type(self.model).__name__} gives no logits (inputs, classes): exits are for classifiers"
            )
        if self.alive is None:
            assert last is not None
            return last
        like = self.left[0][1] if last is None else last
        answers = like.new_empty(self.count, like.shape[1])
        for rows, logits in self.left:
            answers[rows] = logits.to(like.dtype)
        if last is not None:
            answers[self.alive] = last
        return answers
