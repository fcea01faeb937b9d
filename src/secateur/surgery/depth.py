"""Take whole blocks out of a model: those in whose place nothing is missing once their parameters are zero."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .pieces import EXACT, Pieces, Removed, compare, member
from .prove import Proof, outputs, twin


def block_lists(model: nn.Module, within: str | None = None) -> dict[str, list[nn.Module]]:
    """The outermost lists, by path, of at least two modules of one type that have children of their own.

    Args:
        within: look only inside the members of this list.
    """
    found: dict[str, list[nn.Module]] = {}
    for path, module in model.named_modules():
        if (within is not None and (path == within or not _inside(path, within))) or any(
            _inside(path, p) for p in found
        ):
            continue
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) > 1:
            members = list(module)
            own = all(next(m.children(), None) is not None for m in members)
            if own and len({type(m) for m in members}) == 1 and len({id(m) for m in members}) == len(members):
                found[path] = members
    return found


def _inside(path: str, place: str) -> bool:
    return not place or path.startswith(f"{place}.")


def members_of(model: nn.Module, path: str) -> list[nn.Module]:
    """The blocks of a list, by its path."""
    return [m for m in model.get_submodule(path)._modules.values() if m is not None]


def remove(model: nn.Module, removed: Removed) -> None:
    """Take blocks out in place, renumber what the others say of their place, and cut the config's lists to fit."""
    for path, gone in removed.items():
        members = members_of(model, path)
        numbers = list(_numbers(members))
        kept = [m for k, m in enumerate(members) if k not in set(gone)]
        model.get_submodule(path)._modules = {str(k): m for k, m in enumerate(kept)}
        for name, attribute in numbers:
            for k, one in enumerate(kept):
                setattr(one.get_submodule(name), attribute, k)
        for config in {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}.values():
            for key, value in list(getattr(config, "__dict__", {}).items()):
                if isinstance(value, list) and len(value) == len(members):
                    setattr(config, key, [v for k, v in enumerate(value) if k not in set(gone)])


def _numbers(members: Sequence[nn.Module]) -> Iterator[tuple[str, str]]:
    """Attributes, by path within a block, that hold the block's own number in every block."""
    within = [dict(m.named_modules()) for m in members]
    for name, module in within[0].items():
        for attribute, value in vars(module).items():
            if type(value) is int and value == 0 and not attribute.startswith("_"):
                values = [vars(w[name]).get(attribute) if name in w else None for w in within]
                if all(type(v) is int and v == k for k, v in enumerate(values)):
                    yield name, attribute


def zeroed(model: nn.Module, removed: Removed) -> nn.Module:
    """A copy in which every parameter of these blocks is zero; it shares the other tensors."""
    copy = twin(model)
    for path, gone in removed.items():
        for k in gone:
            for module in copy.get_submodule(member(path, k)).modules():
                for name, parameter in module._parameters.items():
                    if parameter is not None:
                        module._parameters[name] = nn.Parameter(torch.zeros_like(parameter))
    return copy


def prove_depth(model: nn.Module, removed: Removed, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Proof:
    """Whether the model with these blocks at zero and the one without them agree."""
    return compare(
        lambda: outputs(zeroed(model, removed), args, kwargs),
        lambda: outputs(BLOCKS.without(model, removed), args, kwargs),
        lambda: EXACT,
    )


def parameters_of(model: nn.Module, removed: Removed) -> dict[int, int]:
    """How many parameters lie in these blocks and nowhere else, by the bytes of one."""
    inside = {id(p): p for path, gone in removed.items() for k in gone for p in _of(model, path, k)}
    outside = {id(p) for p in BLOCKS.without(model, removed).parameters()}
    found: dict[int, int] = {}
    for i, p in inside.items():
        if i not in outside:
            found[p.element_size()] = found.get(p.element_size(), 0) + p.numel()
    return found


def _of(model: nn.Module, path: str, k: int) -> Iterable[Tensor]:
    return model.get_submodule(member(path, k)).parameters()


def _places(model: nn.Module) -> dict[str, int]:
    return {p: len(m) for p, m in model.named_modules() if isinstance(m, (nn.ModuleList, nn.Sequential))}


def _empty(model: nn.Module, removed: Removed) -> None:
    with torch.no_grad():
        for path, gone in removed.items():
            for k in gone:
                for parameter in _of(model, path, k):
                    parameter.zero_()


BLOCKS = Pieces("block", "removed", _places, remove, _empty)
