"""Elastic depth: runs of blocks whose last ones can be left out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..recipe import Recipe
from ..structured.choose import globbed
from ..surgery.depth import members_of, prove_depth
from ..surgery.pieces import member


@dataclass(frozen=True)
class Stage:
    """Blocks of one type that follow each other in a list; one that must stay begins a stage.

    Attributes:
        path: of the list.
        blocks: numbers of those that leave nothing missing when they are left out, in order.
        length: how many blocks the stage has, the one that must stay included.
    """

    path: str
    blocks: tuple[int, ...]
    length: int

    def gone(self, stay: int) -> list[int]:
        """The numbers of the blocks that are left out: the last ones."""
        return list(self.blocks[stay:])

    @property
    def name(self) -> str:
        """As a search calls it."""
        return f"{self.path or 'blocks'} {self.blocks[-1] + 1 - self.length}-{self.blocks[-1]}"


def stages(model: nn.Module, recipe: Recipe, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Stage]:
    """Runs of blocks, each of which computes nothing when its parameters are zero; proven block by block.

    Lists within blocks are looked at where none of these may go.

    Args:
        model: awake, in evaluation mode, with inputs of one forward pass.
    """
    found: list[Stage] = []
    taken: list[str] = []
    for path, numbers in _runs(model):
        if any(_inside(path, block) for block in taken):
            continue
        free = [
            k for k in numbers
            if not globbed(recipe, [member(path, k)]) and prove_depth(model, {path: [k]}, args, kwargs).proven
        ]  # fmt: skip
        starts = [k for k in numbers if k not in free or k == numbers[0]]
        for start, end in zip(starts, [*starts[1:], numbers[-1] + 1], strict=True):
            blocks = tuple(k for k in range(start, end) if k in free)
            if blocks:
                found.append(Stage(path, blocks, end - start))
                taken += [member(path, k) for k in range(start, end)]
    return found


def _inside(path: str, block: str) -> bool:
    return path == block or path.startswith(f"{block}.")


def _runs(model: nn.Module) -> Iterator[tuple[str, list[int]]]:
    """Lists by path, the outer ones first, and numbers of at least two blocks of one type in a row."""
    for path, module in model.named_modules():
        if not isinstance(module, (nn.ModuleList, nn.Sequential)):
            continue
        members = members_of(model, path)
        if list(module._modules) != [str(k) for k in range(len(members))]:
            continue  # of names, not of numbers: what is left could not be numbered anew
        run: list[int] = []
        for k, one in enumerate(members):
            block = next(one.children(), None) is not None and sum(m is one for m in members) == 1
            if run and not (block and type(one) is type(members[run[-1]])):
                if len(run) > 1:
                    yield path, run
                run = []
            if block:
                run = [*run, k]
        if len(run) > 1:
            yield path, run


def removed_of(found: Sequence[Stage], stay: Sequence[int]) -> dict[str, list[int]]:
    """Path of a list -> numbers of the blocks that are left out; inner lists come before those around them."""
    lost: dict[str, list[int]] = {}
    for stage, count in zip(found, stay, strict=True):
        if gone := stage.gone(count):
            lost[stage.path] = sorted([*lost.get(stage.path, []), *gone])
    return dict(sorted(lost.items(), key=lambda x: -(x[0].count(".") + bool(x[0]))))


def renamed(name: str, removed: Mapping[str, Sequence[int]]) -> str | None:
    """The name of a module or a tensor when these blocks are out; None where it lies in one.

    >>> renamed("layers.4.weight", {"layers": [2, 3]}), renamed("layers.2.weight", {"layers": [2, 3]})
    ('layers.2.weight', None)
    """
    for path, gone in removed.items():
        prefix = f"{path}." if path else ""
        if not name.startswith(prefix):
            continue
        head, dot, rest = name[len(prefix) :].partition(".")
        if not head.isdigit():
            continue
        if int(head) in gone:
            return None
        name = f"{prefix}{int(head) - sum(g < int(head) for g in gone)}{dot}{rest}"
    return name
