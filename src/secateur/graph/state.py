"""What modules keep from one run to the next: attributes that they set, dictionaries they fill, buffers they make."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

#: What every module has: its own state is the rest.
_OWN = frozenset(vars(nn.Module()))

#: Path of a module, and the name of something that it holds.
Place = tuple[str, str]


@contextlib.contextmanager
def as_before(model: nn.Module, buffers: bool = False) -> Iterator[None]:
    """Put back afterwards what runs set on modules and what they put into dictionaries there.

    Buffers stay as a run left them, unless ``buffers`` says that those that were there come back.
    """
    attributes = [(m, {k: v for k, v in vars(m).items() if k not in _OWN}) for m in model.modules()]
    kinds = {id(m): type(m) for m in model.modules()}
    contents = [(v, dict(v)) for _, held in attributes for v in held.values() if type(v) is dict]
    contents += [(m._buffers, dict(m._buffers)) for m in model.modules()] if buffers else []
    try:
        yield
    finally:
        for module, held in attributes:
            state = vars(module)
            if held and type(module) is not kinds[id(module)]:
                continue  # a lazy module has become what it is for good
            for name in [k for k in state if k not in held and k not in _OWN]:
                del state[name]
            state.update(held)
        for value, before in contents:
            value.clear()
            value.update(before)


def _tables(model: nn.Module) -> dict[Place, dict[Any, Any]]:
    """Dictionaries of tensors that modules hold: constants, or what they fill in as they run."""
    return {
        (path, name): value
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if type(value) is dict and value and name not in _OWN
        if all(isinstance(x, Tensor) for x in value.values())
    }


def duplicate(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A deep copy, in which results of earlier runs that modules hold are detached from these."""
    memo = dict(memo or {})
    held = [value for module in model.modules() for name, value in vars(module).items() if name not in _OWN]
    for table in _tables(model).values():
        held += table.values()
    for value in held:
        if isinstance(value, Tensor) and not value.is_leaf and id(value) not in memo:
            memo[id(value)] = value.detach().clone()
    return copy.deepcopy(model, memo)


def _groups(model: nn.Module, places: list[Place]) -> list[list[Place]]:
    """Places of one name in modules of one class."""
    found: dict[tuple[type, str], list[Place]] = {}
    for path, name in places:
        found.setdefault((type(model.get_submodule(path)), name), []).append((path, name))
    return list(found.values())


def forget(model: nn.Module, run: Callable[[], Any]) -> list[Place]:
    """Empty, in place, the dictionaries that modules fill anew as they run, such as a bias for each device.

    What those hold follows from parameters, does not show in a trace, and is wrong once these have other sizes. A
    dictionary whose keys do not come back by running holds constants, and stays.

    Args:
        run: runs the model once.

    Returns:
        Those that were emptied.
    """
    tables = _tables(model)
    gone: list[Place] = []
    for group in _groups(model, list(tables)):
        before = {place: dict(tables[place]) for place in group}
        again = False
        with as_before(model):  # puts the contents back
            for place in group:
                tables[place].clear()
            with contextlib.suppress(Exception):  # the model's own code misses its constants
                run()
                again = all(before[p].keys() <= _held(model, p).keys() for p in group)
        if again:
            gone += group
    for place in gone:
        tables[place].clear()
    return gone


def _held(model: nn.Module, place: Place) -> dict[Any, Any]:
    value = getattr(model.get_submodule(place[0]), place[1], None)
    return value if isinstance(value, dict) else {}


def remade(model: nn.Module, run: Callable[[], Any]) -> set[str]:
    """Names of the buffers, outside of the state dict, that modules make anew as they run where they are missing."""
    places = [(path, key) for path, m in model.named_modules() for key in m._non_persistent_buffers_set]
    places = [(p, k) for p, k in places if isinstance(model.get_submodule(p)._buffers.get(k), Tensor)]
    found: set[str] = set()
    for group in _groups(model, places):
        owners = [model.get_submodule(path)._buffers for path, _ in group]
        before = [owner[name] for owner, (_, name) in zip(owners, group, strict=True)]
        try:
            with as_before(model), contextlib.suppress(Exception):  # the model's own code needs it
                for owner, (_, name), buffer in zip(owners, group, before, strict=True):
                    owner[name] = None if buffer is None else buffer.new_zeros([1] * buffer.dim())
                run()
                for owner, (path, name), buffer in zip(owners, group, before, strict=True):
                    now = owner[name]
                    if buffer is not None and buffer.numel() > 1 and now is not None and now.shape == buffer.shape:
                        found.add(f"{path}.{name}" if path else name)
        finally:
            for owner, (_, name), buffer in zip(owners, group, before, strict=True):
                owner[name] = buffer
    return found
