"""Find the repeated blocks of a model by structure, and learn how the model calls them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..evidence import Stop


@dataclass(frozen=True, eq=False)
class Blocks:
    """The repeated blocks of a model.

    Attributes:
        path: of the module list.
        modules: the list; block ``k`` is ``path.k``.
    """

    path: str
    modules: nn.ModuleList

    def __len__(self) -> int:
        return len(self.modules)

    def paths(self) -> list[str]:
        return [f"{self.path}.{k}" for k in range(len(self))]


def find_blocks(model: nn.Module) -> Blocks | None:
    """The longest list of modules of one type, or None when there is no list of at least two.

    Of two equally long lists the one with more parameters is taken.
    """
    best: tuple[int, int] | None = None
    found: Blocks | None = None
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) < 2 or len({type(m) for m in module}) > 1:
            continue
        size = (len(module), sum(p.numel() for p in module.parameters()))
        if size[1] and (best is None or size > best):
            best, found = size, Blocks(path, module)
    return found


@dataclass(frozen=True, eq=False)
class Entry:
    """How the model entered its blocks for one batch.

    Attributes:
        hidden: the input of the first block, ``(batch, length, width)``.
        calls: for each block its other positional and its keyword arguments.
        wrapped: blocks return a tuple whose first item is the hidden state.
    """

    hidden: Tensor
    calls: list[tuple[tuple[Any, ...], Mapping[str, Any]]]


class _Stub:
    """Stands in for a block: records its call, hands the hidden state on, and stops after the last."""

    def __init__(self, count: int, wrap: bool) -> None:
        self.count, self.wrap = count, wrap
        self.hidden: Tensor | None = None
        self.last: Tensor | None = None
        self.calls: list[tuple[tuple[Any, ...], Mapping[str, Any]]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        kwargs = dict(kwargs)
        x = args[0] if args else kwargs.pop("hidden_states", None)
        if not isinstance(x, Tensor):
            raise ModelError("the blocks do not take a hidden state first: use propagate='off'")
        if self.last is None:
            self.hidden = x.detach()
        elif x is not self.last:
            raise ModelError(
                "the model changes the hidden state between its blocks, so they cannot be run one after another: "
                "use propagate='off'"
            )
        self.calls.append((args[1:], kwargs))
        if len(self.calls) == self.count:
            raise Stop
        self.last = x.detach().clone()
        return (self.last,) if self.wrap else self.last


@contextmanager
def _stubbed(blocks: Blocks, stub: _Stub) -> Iterator[None]:
    """Replace the forward of every block for a while."""
    kept = [m.__dict__.get("forward") for m in blocks.modules]
    try:
        for module in blocks.modules:
            module.__dict__["forward"] = stub
        yield
    finally:
        for module, own in zip(blocks.modules, kept, strict=True):
            if own is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = own


@torch.no_grad()
def enter(model: nn.Module, blocks: Blocks, run: Callable[[nn.Module], Any]) -> Entry:
    """Run the part of the model that comes before its blocks, and record how each block is called.

    The blocks themselves are not run, so their parameters may be on the meta device.

    Raises:
        ModelError: the blocks do not simply feed each other.
    """
    problem: Exception | None = None
    for wrap in (False, True):
        stub = _Stub(len(blocks), wrap)
        try:
            with _stubbed(blocks, stub):
                run(model)
        except Stop:
            if stub.hidden is None:
                break
            return Entry(stub.hidden, stub.calls)
        except (IndexError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            problem = error  # a block that returns a tuple: try again with one
    raise ModelError(
        f"the {len(blocks)} blocks at {blocks.path} do not simply feed each other"
        + (f" ({problem})" if problem else "")
        + ": use propagate='off'"
    )


def call_block(block: nn.Module, hidden: Tensor, call: tuple[tuple[Any, ...], Mapping[str, Any]]) -> Tensor:
    """Run one block; returns the hidden state."""
    output = block(hidden, *call[0], **call[1])
    return output if isinstance(output, Tensor) else output[0]


def in_type(value: Any, dtype: torch.dtype) -> Any:
    """Floating point tensors among a block's arguments in the engine's dtype."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() and value.dtype != dtype else value
    if isinstance(value, tuple):
        return tuple(in_type(v, dtype) for v in value)
    if isinstance(value, dict):
        return {k: in_type(v, dtype) for k, v in value.items()}
    return value
