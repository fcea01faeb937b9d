"""What all methods of run time have in common: a dense model, and what decides for each input what it leaves out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from ..errors import RecipeError
from ..registry import Part, get, parts


@runtime_checkable
class Dynamic(Protocol):
    """A model that decides while it runs; a module itself.

    A part of the registry makes it (kind ``transform``, ``when="runtime"``), and makes it again of what was saved: the
    part's fact ``restore`` is ``restore(model, saved, tensors)``. The fact ``alone`` says that inputs differ in how
    much they leave out, so that they are measured one at a time; ``decodes``, that it saves work where a decoder
    generates, so that it is measured token by token (`Decoding`).

    Attributes:
        model: the dense model, with weights of its own.
        record: how it was made, as plain data: ``method`` is the name of the part, ``flops`` has ``before`` and
            ``after``, the operations that are expected.
    """

    model: nn.Module
    record: dict[str, Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...
    def eval(self) -> Any: ...
    def saved(self) -> dict[str, Any]:
        """What ``restore`` needs beside the record, as plain data."""

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers of the gates; empty where nothing was learned."""

    def told(self) -> str:
        """What was made, in one line."""


class Decoding(Dynamic, Protocol):
    """A decoder of transformers; called as it is, and with its ``generate``."""

    def cache(self) -> Any:
        """A fresh cache of transformers, for calls that go on where another one ended."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's own."""


@runtime_checkable
class Learning(Dynamic, Protocol):
    """One whose gates are trained, with the model: the part's fact ``trained`` says so.

    Where gates have a loss of their own that takes labels, the fact ``joint`` is ``joint(loss, gates, batch)``, the
    loss that is trained with, given the task's; it may ask for the losses of single inputs (`losses_of_inputs`). It is
    asked of one batch before the dense run, so that a task that it cannot be had of is refused in time.

    In training mode a forward pass is differentiable, and may mask where evaluation leaves work out; both give the same
    answers for the same decisions. What masks in evaluation also while its attribute ``executes`` is False has that
    attribute; see `answering`.
    """

    def penalty(self) -> Tensor:
        """What the last forward pass adds to the loss, a scalar."""

    def advance(self, done: float) -> None:
        """After each step of training; ``done`` is the share of the run that is behind."""

    def settle(self, batches: Iterable[Any]) -> None:
        """After training: thresholds and the like, by validation batches as the task gives them."""


def is_runtime(method: Any, *, trained: bool | None = None) -> bool:
    """Whether a name is that of a method that works while the model runs.

    Args:
        trained: only those that need training, or only those that do not; None for both.

    >>> is_runtime("tome"), is_runtime("wanda"), is_runtime("tome", trained=True)
    (True, False, False)
    """
    part = parts("transform").get(method) if isinstance(method, str) else None
    if part is None or part.facts.get("when") != "runtime":
        return False
    return trained is None or bool(part.facts.get("trained")) == trained


def part_of(record: Mapping[str, Any]) -> Part:
    """The part that made what this is the record of."""
    return get("transform", str(record.get("method")))


@contextmanager
def answering(made: Any) -> Iterator[None]:
    """Inside, answers alone count: a method that can mask in place of leaving work out does so, for whole batches."""
    was = getattr(made, "executes", None)
    if was is not None:
        made.executes = False
    try:
        yield
    finally:
        if was is not None:
            made.executes = was


def numbers(at: Any) -> tuple[int, ...]:
    """The numbers of blocks that a knob names: one, or several.

    Raises:
        RecipeError: something else is given.

    >>> numbers(2), numbers([0, 1])
    ((2,), (0, 1))
    """
    found = tuple(at) if isinstance(at, (tuple, list)) else (at,)
    if any(isinstance(k, bool) or not isinstance(k, int) for k in found):
        raise RecipeError(f"at is {at!r}: it is numbers of blocks, such as at=(0, 1), or --set METHOD.at=[0,1]")
    return found
