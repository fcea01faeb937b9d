"""Take experts out of a mixture: their slices of the stacked parameters, and their rows of the router.

Where they are is found by structure: a module whose stacked matrices hold one for each expert, and the one
parameter near it that has a row for each. The masked model is the one whose router sends nobody to them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..layers import find_layers
from .pieces import EXACT, ROUNDED, Pieces, Removed, compare, member
from .prove import Proof, outputs, twin

_PRODUCTS = ("mm", "addmm", "matmul", "linear", "bmm", "baddbmm")


@dataclass(frozen=True)
class Mixture:
    """The experts of one place.

    Attributes:
        path: of the module that holds their stacked matrices.
        count: how many there are.
        router: name of the parameter that has a row for each.
        tensors: names of all parameters and buffers whose first axis runs over them.
        attributes: ``(module, attribute)`` that hold their number.
    """

    path: str
    count: int
    router: str
    tensors: tuple[str, ...]
    attributes: tuple[tuple[str, str], ...]


def mixtures(model: nn.Module) -> tuple[dict[str, Mixture], dict[str, str]]:
    """All mixtures by path, and why other stacked experts are none that can be cut."""
    found: dict[str, Mixture] = {}
    left: dict[str, str] = {}
    counts: dict[str, int] = {}
    for layer in find_layers(model)[0]:
        if layer.index is not None:
            counts.setdefault(layer.name.rsplit(".", 2)[0], getattr(layer.module, layer.parameter).shape[0])
    for path, count in counts.items():
        place, names = _routers(model, path, count)
        if len(names) != 1:
            several = f"several parameters have {count} rows: {', '.join(names[:3])}"
            left[path] = several if names else f"no parameter near it has {count} rows: its router was not found"
            continue
        holders = [path, *_way(place, names[0].rpartition(".")[0])]
        tensors, attributes = [], []
        for holder in dict.fromkeys(holders):
            module = model.get_submodule(holder)
            own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            tensors += [member(holder, n) for n, t in own if t.dim() and t.shape[0] == count]
            attributes += [
                (holder, k) for k, v in vars(module).items() if type(v) is int and v == count and k[0] != "_"
            ]
        found[path] = Mixture(path, count, names[0], tuple(tensors), tuple(attributes))
    return found, left


def _routers(model: nn.Module, path: str, count: int) -> tuple[str, list[str]]:
    """Matrices with a row for each expert in the nearest module around the experts that has any."""
    place = path
    while place:
        place = place.rpartition(".")[0]
        names = [member(place, n) for n, p in model.get_submodule(place).named_parameters() if _rows(p) == count]
        names = [n for n in names if not n.startswith(f"{path}.")]
        if names or any(isinstance(m, nn.ModuleList) for m in model.get_submodule(place).children()):
            return place, names
    return place, []


def _rows(parameter: Tensor) -> int | None:
    return parameter.shape[0] if parameter.dim() == 2 else None


def _way(top: str, bottom: str) -> Iterator[str]:
    """The paths from one module down to another within it."""
    yield top
    steps = bottom[len(top) :].strip(".")
    for step in steps.split(".") if steps else ():
        top = member(top, step)
        yield top


def _tensor(model: nn.Module, name: str) -> Tensor:
    owner, _, key = name.rpartition(".")
    tensor: Tensor = getattr(model.get_submodule(owner), key)
    return tensor


def _replace(model: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, key = name.rpartition(".")
    module, old = model.get_submodule(owner), _tensor(model, name)
    if isinstance(old, nn.Parameter):
        module._parameters[key] = nn.Parameter(tensor, requires_grad=old.requires_grad)
    else:
        module._buffers[key] = tensor


def remove_experts(model: nn.Module, removed: Removed) -> None:
    """Take experts out in place, and write their new number wherever the old one is kept."""
    known, _ = mixtures(model)
    after: dict[str, int] = {path: m.count for path, m in known.items()}
    named: set[str] = set()
    with torch.no_grad():
        for path, gone in removed.items():
            mixture = known[path]
            lost = set(gone)
            stays = [k for k in range(mixture.count) if k not in lost]
            after[path] = len(stays)
            for name in mixture.tensors:
                tensor = _tensor(model, name)
                _replace(model, name, tensor.detach().index_select(0, torch.tensor(stays, device=tensor.device)))
            for module, attribute in mixture.attributes:
                setattr(model.get_submodule(module), attribute, len(stays))
                named.add(attribute)
    before, now = {m.count for m in known.values()}, set(after.values())
    if len(before) == len(now) == 1:  # modules around them may keep the number for all
        around = {step for path in known for step in _way("", path)}
        for place in map(model.get_submodule, around):
            for attribute in named:
                if vars(place).get(attribute) in before:
                    setattr(place, attribute, min(now))


class _Closed(TorchDispatchMode):
    """Nobody is sent to these experts: the router's products give them minus infinity."""

    def __init__(self, routers: Mapping[int, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._routers = dict(routers)
        self.rounded = False
        self._held: list[Tensor] = []  # so that no other tensor comes to lie where a copy of a router lay
        self.met: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = str(func).removeprefix("aten.").split(".")[0]
        self.rounded |= isinstance(out, Tensor) and out.is_floating_point() and out.dtype != torch.float64
        for x in args:
            pointer = x.untyped_storage().data_ptr() if isinstance(x, Tensor) else 0
            gone = self._routers.get(pointer)
            if gone is None:
                continue
            if name == "_to_copy":
                self._routers[out.untyped_storage().data_ptr()] = gone
                self._held.append(out)
            elif name in _PRODUCTS:
                self.met.add(id(gone))
                return out.index_fill(-1, gone.to(out.device), -torch.inf)
        return out


def closed(model: nn.Module, removed: Removed) -> tuple[nn.Module, _Closed]:
    """A copy of the model, and the mode under which its routers send nobody to these experts."""
    copy = twin(model)
    known, _ = mixtures(copy)
    routers: dict[int, Tensor] = {}
    for path, numbers in removed.items():
        gone = torch.tensor(list(numbers))
        mixture = known[path]
        for name in mixture.tensors:
            if name.startswith(f"{path}."):
                continue
            tensor = _tensor(copy, name)
            if name == mixture.router:
                routers[tensor.untyped_storage().data_ptr()] = gone
            elif tensor.dim() == 1 and tensor.is_floating_point():  # what is added after, to choose by
                _replace(copy, name, tensor.detach().index_fill(0, gone.to(tensor.device), -torch.inf))
    return copy, _Closed(routers)


def prove_experts(model: nn.Module, removed: Removed, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Proof:
    """Whether the model with these experts closed and the one without them agree."""
    copy, mode = closed(model, removed)

    def masked() -> list[Tensor]:
        with mode:
            found = outputs(copy, args, kwargs)
        if len(mode.met) < len(removed):
            raise RuntimeError("a router was not seen at work on the example")
        return found

    return compare(
        masked,
        lambda: outputs(EXPERTS.without(model, removed), args, kwargs),
        lambda: ROUNDED if mode.rounded else EXACT,
    )


def _places(model: nn.Module) -> dict[str, int]:
    return {path: mixture.count for path, mixture in mixtures(model)[0].items()}


EXPERTS = Pieces("expert", "experts", _places, remove_experts, None)
