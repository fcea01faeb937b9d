"""Between which modules work can be left out: found by running a model once, whatever its modules are called."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..layers import evaluating
from ..measure.flops import flops
from .rows import changed, leaves
from .rows import inputs_in as inputs_in
from .structure import Call

_LISTS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class Places:
    """The blocks of a model, in the order in which they run.

    Attributes:
        paths: of modules of one type, each of which runs once.
        flops: operations up to the end of each, from the end of the one before, for the example.
        axis: of the output of each, the one that holds its features.
        width: size of that axis.
    """

    paths: tuple[str, ...]
    flops: tuple[int, ...]
    axis: tuple[int, ...]
    width: tuple[int, ...]


def hidden(values: Any) -> Tensor | None:
    """The first tensor of floats among what a module is given, or gives."""
    return next((x for _, x in leaves(values) if x.is_floating_point()), None)


def mask_of(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The attention mask that a model is called with, ``(inputs, tokens)``, by name or by position."""
    mask = kwargs.get("attention_mask")
    if mask is None and len(args) > 1:
        mask = dict(zip(inspect.signature(model.forward).parameters, args, strict=False)).get("attention_mask")
    return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None


def rows_of(values: Any, count: int, rows: Tensor) -> Any:
    """What a block of a decoder is given, or gives, with these rows of every tensor that has ``count`` of them.

    Vectors are none: positions are numbers for all rows. Where a mask may have as many rows, see `rows.Rows`.
    """
    return changed(values, lambda _, x: x[rows] if x.dim() > 1 and len(x) == count else x)


def varied(call: Call, count: int, have: frozenset[str]) -> Call:
    """So many inputs that differ, made of the first one: floats are moved about, numbers turned round.

    Args:
        have: the ways to tensors with a row for each input.
    """
    generator = torch.Generator().manual_seed(0)

    def made(way: str, x: Tensor) -> Tensor:
        if way not in have:
            return x
        x = x[:1].expand(count, *x.shape[1:]).clone()
        if x.is_floating_point():
            return x + torch.randn(x.shape, generator=generator).to(x)
        if x.dim() > 1 and x.shape[1] > 1:
            return torch.stack([row.roll(k, 0) for k, row in enumerate(x)])
        return x

    found: Call = changed(call, made)
    return found


class _Seen:
    """Which modules ran, in which order and inside of which, and the shapes of what they gave."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.order: list[str] = []
        self.ran: list[str] = []
        self.shapes: dict[str, torch.Size] = {}

    def watch(self, model: nn.Module, call: Call) -> None:
        handles = [m.register_forward_hook(self._hook(n)) for n, m in model.named_modules() if n]
        try:
            with evaluating(model), torch.no_grad():
                model(*call[0], **call[1])
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            self.calls[name] += 1
            self.ran.append(name)
            if (x := hidden(out)) is not None and x.dim() > 1:
                self.order.append(name)
                self.shapes[name] = x.shape

        return hook


def find_places(model: nn.Module, call: Call) -> Places:
    """The blocks of a model: modules of one type with modules in them, that are in no other such block.

    Of several types, the one that does the most work. Where no module repeats, as in a plain stack of convolutions,
    the activations between its layers take their place.

    Raises:
        ModelError: there are no two modules of one type that run once each.
    """
    seen = _Seen()
    seen.watch(model, call)
    count = inputs_in(call)
    modules = dict(model.named_modules())
    once = [n for n in seen.order if seen.calls[n] == 1 and len(seen.shapes[n]) > 1 and seen.shapes[n][0] == count]
    blocks = [n for n in once if next(modules[n].children(), None) is not None and not isinstance(modules[n], _LISTS)]
    groups = _outermost(_by_type(modules, blocks))
    work = flops(model, *call[0], **call[1])
    if not groups:
        plain = [n for n in once if next(modules[n].children(), None) is None and not _has_parameters(modules[n])]
        groups = sorted(_by_type(modules, plain), key=len, reverse=True)[:1]
    if not groups:
        raise ModelError(
            f"{type(model).__name__} has no blocks: no two modules of one type run in it, one after the other, behind "
            "which an input could leave or which it could skip"
        )
    chosen = max(groups, key=lambda g: sum(work.by_module.get(n, 0) for n in g))
    axes = [_axis(modules[n], seen.shapes[n]) for n in chosen]
    return Places(
        tuple(chosen),
        tuple(_between(chosen, seen.ran, modules, work.by_module)),
        tuple(axes),
        tuple(seen.shapes[n][a] for n, a in zip(chosen, axes, strict=True)),
    )


def _between(
    chosen: list[str], ran: list[str], modules: Mapping[str, nn.Module], work: Mapping[str, int]
) -> list[int]:  # fmt: skip
    """Operations of the modules that ran after one block and up to the end of the next."""
    found, begun = [], 0
    for name in chosen:
        end = ran.index(name) + 1
        own = [n for n in ran[begun:end] if next(modules[n].children(), None) is None and not n.startswith(f"{name}.")]
        found.append(work.get(name, 0) + sum(work.get(n, 0) for n in own if n != name))
        begun = end
    return found


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(recurse=False), None) is not None


def _by_type(modules: Mapping[str, nn.Module], names: list[str]) -> list[list[str]]:
    found: dict[type, list[str]] = {}
    for name in names:
        found.setdefault(type(modules[name]), []).append(name)
    return [g for g in found.values() if len(g) > 1]


def _outermost(groups: list[list[str]]) -> list[list[str]]:
    """The groups of which no member lies in a member of another group, or in one of its own."""

    def inside(group: list[str]) -> bool:
        return any(n.startswith(f"{o}.") for n in group for other in groups for o in other)

    return [g for g in groups if not inside(g)]


def _axis(module: nn.Module, shape: torch.Size) -> int:
    """Which axis of an output holds features: the second where convolutions made it, else the last."""
    convolves = any(isinstance(m, _CONV) and m.out_channels == shape[1] for m in module.modules())
    bare = next(module.children(), None) is None and len(shape) > 3
    return 1 if convolves or bare else len(shape) - 1


@contextmanager
def in_place_of(model: nn.Module, forwards: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Modules, by path, that do something else inside: ``forward(own, *args, **kwargs)``, ``own`` being theirs.

    Hooks on them run as ever.
    """
    changed: list[nn.Module] = []
    try:
        for path, forward in forwards.items():
            module: Any = model.get_submodule(path)
            module.forward = partial(forward, module.forward)
            changed.append(module)
        yield
    finally:
        for module in changed:
            del module.__dict__["forward"]
