"""Batch norms and activations that a packed layer can do itself: found by running the model, folded into weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..layers import evaluating

_KINDS = (nn.BatchNorm2d, nn.ReLU)


@dataclasses.dataclass(frozen=True)
class Tail:
    """What comes behind a layer and nowhere else: names of a batch norm and of a ReLU, empty where there is none."""

    norm: str = ""
    relu: str = ""


class _Readers(TorchDispatchMode):
    """Which operations read the tensors that are listed, in order."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.of: dict[int, list[str]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor) and id(tensor) in self.of:
                self.of[id(tensor)].append(str(func))
        return func(*args, **(kwargs or {}))


def tails(
    model: nn.Module, layers: Sequence[str], workloads: Sequence[tuple[tuple[Any, ...], dict[str, Any]]]
) -> dict[str, Tail]:
    """For each of these layers what can be folded into it, in all workloads alike.

    A batch norm is folded where nothing else reads what the layer gives, and a ReLU where nothing reads what comes
    before it (one that works in place is the first to read it); what the model returns is read. Modules that run more
    than once, or that have hooks, keep out.
    """
    if not any(type(m) in _KINDS for m in model.modules()):
        return {}
    found: list[dict[str, Tail]] = []
    for args, kwargs in workloads:
        found.append(_tails(model, layers, args, kwargs))
    return {name: tail for name, tail in found[0].items() if all(other.get(name) == tail for other in found)}


def _tails(
    model: nn.Module, layers: Sequence[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Tail]:
    hooked = {n for n, m in model.named_modules() if m._forward_hooks or m._forward_pre_hooks}
    watched = {n: m for n, m in model.named_modules() if n in set(layers) or (type(m) in _KINDS and n not in hooked)}
    readers = _Readers()
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {}
    handles = []
    for name, module in watched.items():

        def note(_: nn.Module, given: tuple[Any, ...], out: Any, name: str = name) -> None:
            if given and isinstance(given[0], Tensor) and isinstance(out, Tensor):
                calls.setdefault(name, []).append((given[0], out))  # they live on, so that their ids stay theirs
                readers.of.setdefault(id(out), [])

        handles.append(module.register_forward_hook(note))
    try:
        with evaluating(model), torch.no_grad(), readers:
            returned = {id(t) for t in tree_leaves(model(*args, **kwargs))}
    finally:
        for handle in handles:
            handle.remove()
    once = {name: made[0] for name, made in calls.items() if len(made) == 1}
    by_input: dict[int, list[str]] = {}
    for name, (given, _) in once.items():
        by_input.setdefault(id(given), []).append(name)

    def only(tensor: Tensor, kind: type[nn.Module]) -> str:
        """The module of this kind that alone reads a tensor, if one does."""
        names = [n for n in by_input.get(id(tensor), []) if type(watched[n]) is kind]
        read = readers.of.get(id(tensor), [])
        in_place = kind is nn.ReLU and bool(read) and read[0].startswith("aten.relu_")
        alone = len(read) == 1 and id(tensor) not in returned
        return names[0] if len(names) == 1 and (alone or in_place) else ""

    tails = {}
    for name in layers:
        if name not in once:
            continue
        out = once[name][1]
        norm = only(out, nn.BatchNorm2d)
        behind: Any = watched.get(norm)
        if norm and behind.running_var is None:
            norm = ""
        relu = only(once[norm][1] if norm else out, nn.ReLU)
        if norm or relu:
            tails[name] = Tail(norm, relu)
    return tails


def folded(weight: Tensor, bias: Tensor | None, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """The matrix ``(outputs, inputs)`` and bias of a layer with the batch norm behind it, as in evaluation."""
    assert norm.running_var is not None and norm.running_mean is not None
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = (0.0 if bias is None else bias.detach().double()) - norm.running_mean.double()
    moved = shift * scale + (0.0 if norm.bias is None else norm.bias.detach().double())
    return (weight.double() * scale[:, None]).float(), moved.float()
