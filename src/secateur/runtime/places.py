"""Where channels can be left out of a convolutional network: found by running it once, whatever its modules are."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter
from torch.utils.weak import WeakIdKeyDictionary

from ..errors import ModelError
from ..layers import evaluating
from .structure import Call

#: Convolutions, by the function that they call.
CONVOLUTIONS = frozenset((torch.conv1d, torch.conv2d, torch.conv3d))
_NAMES = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_PRODUCTS = frozenset((
    "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear", "bilinear",
    "matmul", "__matmul__", "mm", "bmm", "addmm", "baddbmm", "einsum", "scaled_dot_product_attention",
    "multi_head_attention_forward",
))  # fmt: skip
_RECTIFIERS = frozenset(("relu", "relu_", "relu6"))


@dataclass(frozen=True)
class Place:
    """One convolution whose channels can have a gate.

    Attributes:
        conv: path of the module that has its weight.
        inputs, outputs: channels.
        norm: whether a batch norm follows; the gate is behind it.
        rectified: whether a ReLU follows that.
    """

    conv: str
    inputs: int
    outputs: int
    norm: bool
    rectified: bool

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def convolution_arguments(args: tuple[Any, ...], kwargs: Any) -> dict[str, Any]:
    """The arguments of a convolution by name."""
    given = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    return {**given, **dict(zip(_NAMES, args, strict=False)), **kwargs}


def linear_arguments(args: tuple[Any, ...], kwargs: Any) -> dict[str, Any]:
    """The arguments of ``linear`` by name."""
    return {"bias": None, **dict(zip(_NAMES, args, strict=False)), **kwargs}


def first(args: tuple[Any, ...], kwargs: Any) -> Any:
    """What a function of torch is called on."""
    return args[0] if args else kwargs.get("input")


@dataclass(eq=False)
class _Seen:
    """What became of one convolution's result: what was called with it, and with what its norm made of it."""

    weight: Tensor
    groups: int
    plain: bool
    uses: list[str] = field(default_factory=list)
    behind: list[str] = field(default_factory=list)
    norm: bool = False
    calls: int = 1


class _Look(TorchFunctionMode):
    """Watches a model run: convolutions, what follows them, and what reaches the answer without another product."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names = {
            id(p): name.rpartition(".")[0]
            for name, p in model.named_parameters()
            if name.rpartition(".")[2] == "weight"
        }
        self.seen: dict[str, _Seen] = {}
        self.made: Any = WeakIdKeyDictionary()  # result -> name of the convolution, and whether its norm is behind
        self.open: Any = WeakIdKeyDictionary()  # result -> names of convolutions that no product has read since

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
        name = str(getattr(func, "__name__", ""))
        known = [(x, *self.made[x]) for x in given if x in self.made]
        reached = frozenset[str]().union(*(self.open[x] for x in given if x in self.open))
        out = func(*args, **kwargs)
        results = [x for x in tree_iter(out) if isinstance(x, Tensor)]
        for _, conv, normed in known if results else ():  # not its shape
            (self.seen[conv].behind if normed else self.seen[conv].uses).append(name)
        for x, _, _ in known:
            if any(x is y for y in results):  # changed in place: what comes now is called with another one
                self.made.pop(x, None)
        if func in CONVOLUTIONS and (conv := self._convolution(args, kwargs)) is not None:
            self.made[out], self.open[out] = (conv, False), frozenset((conv,))
            return out
        for x in results:
            self.open[x] = frozenset() if name in _PRODUCTS else reached
        if func is batch_norm and known and known[0][0] is first(args, kwargs) and not known[0][2]:
            conv = known[0][1]
            training = kwargs.get("training", args[5] if len(args) > 5 else False)
            self.seen[conv].norm = not training
            self.made[out] = (conv, True)
        return out

    def _convolution(self, args: Any, kwargs: Any) -> str | None:
        """The name of one whose weight is a parameter of the model; None for others."""
        given = convolution_arguments(args, kwargs)
        x, weight = given["input"], given["weight"]
        name = self.names.get(id(weight))
        if name in self.seen:
            self.seen[name].calls += 1
        elif name is not None:
            self.seen[name] = _Seen(weight, int(given["groups"]), x.dim() == weight.dim())
        return name


def find(model: nn.Module, call: Call) -> list[Place]:
    """The convolutions of which some channels can be left out for an input, in the order of their calls.

    One that is called once, is not grouped, whose channels meet no other channels before another product reads them
    (a batch norm is their own matter), and that the answer is not directly made of. Sums with a shortcut are right.

    Raises:
        ModelError: there is none.
    """
    look = _Look(model)
    with evaluating(model), torch.no_grad(), look:
        out = model(*call[0], **call[1])
    answers = frozenset[str]().union(*(look.open.get(x, frozenset()) for x in tree_iter(out) if isinstance(x, Tensor)))
    kind = type(model).__name__
    if not look.seen:
        raise ModelError(f"{kind} has no convolution: gates of channels are for convolutional networks")
    places, reasons = [], []
    for name, seen in look.seen.items():
        if reason := _refusal(seen, name in answers):
            reasons.append(f"{name or kind} {reason}")
            continue
        after = seen.behind if seen.norm else seen.uses
        outputs, inputs = seen.weight.shape[:2]
        places.append(Place(name, inputs, outputs, seen.norm, bool(after) and set(after) <= _RECTIFIERS))
    if not places:
        raise ModelError(f"{kind} has no convolution that can have a gate: {'; '.join(reasons[:3])}")
    return places


def _refusal(seen: _Seen, answers: bool) -> str:
    """Why a convolution has no place for a gate; empty where it has."""
    if seen.calls > 1:
        return f"is called {seen.calls} times"
    if seen.groups > 1:
        return "is grouped"
    if not seen.plain:
        return "is called without a batch"
    if answers:
        return "makes the answer"
    if seen.weight.shape[0] < 2:
        return "has one channel"
    norms = [use for use in seen.uses if "norm" in use]
    if norms and not (seen.norm and len(seen.uses) == 1):
        return f"is read by {', '.join(dict.fromkeys(seen.uses))}, which is not a batch norm with its own statistics"
    return ""
