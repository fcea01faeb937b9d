"""Which tensors have a row for each input: found by running a model once more, with one input twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..layers import evaluating
from .structure import Call

#: What a model that is given tensors of sizes that do not fit each other raises.
_MISFITS = (RuntimeError, IndexError, ValueError, TypeError)
#: How near the answers to the same inputs must be, where there is one more beside them.
_NEAR = 1e-3
#: Tensors of a call beside its first that may have rows; more are not tried one without the other.
_TRIED = 4


def leaves(values: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Tensors in tuples, lists and mappings, with the way to each; a cache is left alone."""
    if isinstance(values, Tensor):
        yield path, values
    elif isinstance(values, (tuple, list, Mapping)):
        for name, x in values.items() if isinstance(values, Mapping) else enumerate(values):
            yield from leaves(x, f"{path}.{name}")


def changed(values: Any, change: Callable[[str, Tensor], Tensor], path: str = "") -> Any:
    """The same values with other tensors: ``change(way, tensor)``."""
    if isinstance(values, Tensor):
        return change(path, values)
    if isinstance(values, Mapping):
        kind: Any = type(values)
        taken = {name: changed(x, change, f"{path}.{name}") for name, x in values.items()}
        return taken if kind is dict else kind(**taken)
    if isinstance(values, (tuple, list)):
        each = [changed(x, change, f"{path}.{k}") for k, x in enumerate(values)]
        return type(values)(*each) if hasattr(values, "_fields") else type(values)(each)
    return values


def inputs_in(call: Any) -> int:
    """How many inputs a call has: the first size of its first tensor."""
    return len(next(x for _, x in leaves(call)))


def some_of(call: Call, rows: Tensor, have: frozenset[str]) -> Call:
    """A call on these inputs alone.

    Args:
        have: the ways to its tensors with a row for each input, as `having` finds them.
    """
    found: Call = changed(call, lambda way, x: x[rows.to(x.device)] if way in have else x)
    return found


def having(model: nn.Module, call: Call) -> frozenset[str]:
    """The ways to the tensors of a call that have a row for each input.

    The first tensor has; others of as many rows are tried, and a mask that has as many positions as there are inputs
    is told from one that has a row for each.

    Raises:
        ModelError: the model does not run on one input more.
    """
    return _once_more(model, call, ())[0]


class Rows:
    """Which tensors that modules are given, and give, have a row for each input.

    Nothing is run where sizes tell: a tensor with another number of rows has none for each input, and the first one of
    floats of a module has. For any other the model runs twice, on a call and on the same with its first input once
    more, and what has a row more then is known from there on.
    """

    def __init__(self, model: nn.Module, modules: Sequence[str]) -> None:
        self.model, self.modules = model, tuple(modules)
        self.asking = False  # while the model runs to find out: whoever changes its modules leaves them alone
        self._known: dict[tuple[str, int], bool] = {}

    def taken(self, values: Any, way: str, count: int, rows: Tensor, call: Call) -> Any:
        """What a module is given, or gives, with these rows of every tensor that has one for each of ``count`` inputs.

        Args:
            way: ``"<module> gives"`` or ``"<module> takes"``.
            call: of the model, with which it can be found out.
        """
        first = next((x for _, x in leaves(values) if x.is_floating_point()), None)

        def cut(path: str, x: Tensor) -> Tensor:
            if not x.dim() or len(x) != count:
                return x
            return x[rows.to(x.device)] if x is first or self._have(path, x, call) else x

        return changed(values, cut, way)

    def _have(self, path: str, x: Tensor, call: Call) -> bool:
        key = (path, x.dim())
        if key not in self._known:
            self.asking = True
            try:
                found = _once_more(self.model, call, self.modules)[1]
            finally:
                self.asking = False
            for known, have in found.items():
                self._known[known] = have or self._known.get(known, False)
            self._known.setdefault(key, False)
        return self._known[key]


def _once_more(
    model: nn.Module, call: Call, modules: Sequence[str]
) -> tuple[frozenset[str], dict[tuple[str, int], bool]]:
    """Run a call, and the same with its first input once more; what has a row more of the call, and in modules."""
    count = inputs_in(call)
    first, *others = [way for way, x in leaves(call) if x.dim() and len(x) == count]
    if not others and not modules:
        return frozenset({first}), {}
    rows = torch.tensor([*range(count), 0])
    with evaluating(model), torch.no_grad():
        wanted, before = _watched(model, call, modules)
        for have in _sets(first, others):
            try:
                got, after = _watched(model, some_of(call, rows, have), modules)
            except _MISFITS:
                continue
            if _same(wanted, got, count):
                grown = {k: before[k] == count and after[k] == count + 1 for k in before.keys() & after.keys()}
                return have, grown
    raise ModelError(
        f"{type(model).__name__} does not run on {count + 1} inputs where it runs on {count}, so which of its "
        "arguments have a row for each input cannot be told: give inputs alone, or a batch of another size"
    )


def _sets(first: str, others: Sequence[str]) -> Iterator[frozenset[str]]:
    """Which tensors may have rows: all, then fewer and fewer."""
    sizes = range(len(others), -1, -1) if len(others) <= _TRIED else (len(others), 0)
    for size in sizes:
        yield from (frozenset({first, *some}) for some in combinations(others, size))


def _watched(model: nn.Module, call: Call, modules: Sequence[str]) -> tuple[Any, dict[tuple[str, int], int]]:
    """The answer, and the first sizes of what modules take and give, by way and number of axes."""
    sizes: dict[tuple[str, int], int] = {}

    def note(name: str) -> Callable[..., None]:
        def look(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            for what, values in (("takes", (args, kwargs)), ("gives", out)):
                sizes.update({(way, x.dim()): len(x) for way, x in leaves(values, f"{name} {what}") if x.dim()})

        return look

    handles = [model.get_submodule(n).register_forward_hook(note(n), with_kwargs=True) for n in modules]
    try:
        return model(*call[0], **call[1]), sizes
    finally:
        for handle in handles:
            handle.remove()


def _same(wanted: Any, got: Any, count: int) -> bool:
    """Whether an answer has a row more, that of the first input, and the same ones before it; yes where it has none."""
    whole = next((x for _, x in leaves(_plain(wanted)) if x.is_floating_point() and x.dim()), None)
    more = next((x for _, x in leaves(_plain(got)) if x.is_floating_point() and x.dim()), None)
    if whole is None or more is None or len(whole) != count:
        return True
    if len(more) != count + 1:
        return False
    scale = whole.abs().max().clamp_min(1e-6)
    return bool((more - torch.cat([whole, whole[:1]])).abs().max() <= _NEAR * scale)


def _plain(out: Any) -> Any:
    logits = getattr(out, "logits", None)
    return logits if isinstance(logits, Tensor) else dict(out) if isinstance(out, Mapping) else out
