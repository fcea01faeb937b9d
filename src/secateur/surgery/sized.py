"""One operation of an exported program, with the sizes it was written with as plain numbers that can be mended."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from ..graph.labels import Array
from ..graph.trace import Axes

#: Which positions of an axis stay.
Stays = Callable[[Array], NDArray[np.bool_]]

#: Operation -> what its sizes say, and the numbers of the arguments that hold them; a list of sizes is one argument.
#: ``output``: lengths of axes of the result; ``input``: of the last axes of the first input; ``pieces``: of an axis
#: of each result; ``bounds``: positions on an axis of the input; ``groups``: equal parts of an axis of an input.
_MEANS: Mapping[str, tuple[str, tuple[int, ...]]] = {
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "expand"), ("output", (1,))),
    **dict.fromkeys(("new_zeros", "new_ones", "new_full", "new_empty"), ("output", (1,))),
    **dict.fromkeys(("zeros", "ones", "full", "empty"), ("output", (0,))),
    "unflatten": ("output", (2,)),
    "split_with_sizes": ("pieces", (1,)),
    "slice": ("bounds", (2, 3)),
    **dict.fromkeys(("layer_norm", "rms_norm"), ("input", (1,))),
    "group_norm": ("groups", (1,)),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), ("groups", (6,))),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), ("groups", (6,))),
    "convolution": ("groups", (8,)),
}
#: Operations whose results have new positions that are alike, so that any of them can go.
_CREATES = ("zeros", "ones", "full", "new_zeros", "new_ones", "new_full", "expand")


class Sized(nn.Module):
    """Calls one operation with sizes, a dtype and a device that it keeps itself.

    Attributes:
        size: the sizes; None for one that is computed in each run (the batch), a factor where it is a multiple of that.
        dtype: of the result, where the program names one of floating point, which is ``named``.
        device: of the result, where the program names one.
        keeps_sizes: so that a trace notes what each axis of inputs and results is.
        creates: the result has positions that no input has and that are all alike, such as those of zeros.
    """

    keeps_sizes = True

    def __init__(self, op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        super().__init__()
        name = _name(op)
        means, places = _MEANS.get(name, ("", ()))
        self._op, self._means, self._places = op, means, places
        self._listed = bool(places) and isinstance(args[places[0]], (list, tuple))
        sizes = list(args[places[0]]) if self._listed else [args[p] for p in places]
        self.size = [_split(x)[1] for x in sizes]
        self._dim = args[2] if name == "split_with_sizes" else args[1] if name in ("slice", "unflatten") else 0
        self._holder = 0 if name == "group_norm" else 1
        given: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
        self._held: dict[int | str, str] = {}  # argument -> attribute that is given for it
        self.dtype: torch.dtype | None = None
        self.device: torch.device | None = None
        for place, x in given:
            if isinstance(x, torch.dtype) and x.is_floating_point:
                self._held[place], self.dtype = "dtype", x
            elif isinstance(x, torch.device):
                self._held[place], self.device = "device", x
        self.named = self.dtype
        self.creates = name in _CREATES

    def passed(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What a call is given: the arguments with None for what is kept here."""
        given, named = list(args), dict(kwargs)
        if self._listed:
            given[self._places[0]] = [_split(x)[0] for x in args[self._places[0]]]
        else:
            for p in self._places:
                given[p] = _split(args[p])[0]
        for place in self._held:
            if isinstance(place, str):
                del named[place]
            else:
                given[place] = None
        return tuple(given), named

    @property
    def holds(self) -> bool:
        """Whether it keeps a dtype or a device."""
        return bool(self._held)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The operation's result."""
        given = list(args)
        if self._listed:
            place = self._places[0]
            given[place] = [_join(g, s) for g, s in zip(given[place], self.size, strict=True)]
        else:
            for p, s in zip(self._places, self.size, strict=True):
                given[p] = _join(given[p], s)
        for where, attribute in self._held.items():
            if isinstance(where, str):
                kwargs[where] = getattr(self, attribute)
            else:
                given[where] = getattr(self, attribute)
        return self._op(*given, **kwargs)

    def lengths(self, inputs: Sequence[Axes], outputs: Sequence[Axes], stays: Stays) -> dict[int, int]:
        """Item of ``size`` -> what it becomes, for those that say the length of a labelled axis.

        Args:
            inputs, outputs: the axes of each tensor that the call was given and has made.
        """
        if self._means in ("bounds", "groups"):
            axes = inputs[0] if self._means == "bounds" else inputs[self._holder]
            axis = axes[self._dim if self._means == "bounds" else 1 - self._holder]
            if not isinstance(axis, np.ndarray):
                return {}
            kept = stays(axis)
            if self._means == "bounds":
                return {i: int(kept[:n].sum()) for i, n in enumerate(self.size) if n is not None and n <= len(kept)}
            per = len(kept) // (self.size[0] or 1)
            return {0: len(np.unique(np.flatnonzero(kept) // per))}
        if self._means == "pieces":
            along = [piece[self._dim] for piece in outputs]
        elif self._means == "input":
            along = list(inputs[0][len(inputs[0]) - len(self.size) :])
        else:
            start = self._dim % len(inputs[0]) if self._dim else 0
            along = list(outputs[0][start : start + len(self.size)])
        found = {}
        for i, axis in enumerate(along):
            size = self.size[i]
            if isinstance(axis, np.ndarray) and size is not None and size > 0:
                left = int(stays(axis).sum()) * size  # a size is its axis' length, or a factor of it
                if left % len(axis) == 0:
                    found[i] = left // len(axis)
        return found

    def extra_repr(self) -> str:
        said = [_name(self._op), f"size={self.size}" if self.size else "", f"dtype={self.dtype}" if self.dtype else ""]
        return ", ".join(s for s in said if s)


def _split(size: Any) -> tuple[Any, int | None]:
    """A size as what is computed in each run, and what is kept."""
    if type(size) is int:
        return None, size
    if isinstance(size, fx.Node) and size.target is operator.mul:
        numbers = [x for x in size.args if type(x) is int]
        symbols = [x for x in size.args if isinstance(x, fx.Node)]
        if len(numbers) == len(symbols) == 1:
            return symbols[0], numbers[0]
    return size, None


def _join(computed: Any, kept: int | None) -> Any:
    return kept if computed is None else computed if kept is None else computed * kept


def _name(op: Any) -> str:
    return str(op).removeprefix("aten.").split(".")[0]


def keep_sizes(graph: fx.Graph, holder: str) -> dict[str, Sized]:
    """Replace, in place, every operation that names sizes, a floating point dtype or a device by a call of a `Sized`.

    Args:
        holder: name of the module that is to hold them.

    Returns:
        Them by the names of their calls.
    """
    made: dict[str, Sized] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        if _name(node.target) == "_assert_tensor_metadata":  # also of the dtype, which a copy in float64 has not
            graph.erase_node(node)
            continue
        op, args, kwargs = _plainly(node)
        sized = Sized(op, args, kwargs)
        if not sized.holds and not any(s is not None for s in sized.size):
            node.target, node.args, node.kwargs = op, tuple(args), kwargs
            continue
        given, named = sized.passed(args, kwargs)
        name = f"at_{node.name}"  # an operation may be called as a method of modules is
        with graph.inserting_after(node):
            new = graph.create_node("call_module", f"{holder}.{name}", given, named)
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
        made[name] = sized
    return made


def _plainly(node: fx.Node) -> tuple[Any, list[Any], dict[str, Any]]:
    """An operation with all arguments that can be positional so, and every size it rests on written out."""
    op: Any = node.target
    args: list[Any] = list(node.args)
    kwargs: dict[str, Any] = dict(node.kwargs)
    for argument in op._schema.arguments[len(args) :]:
        if not argument.kwarg_only:
            args.append(kwargs.pop(argument.name, argument.default_value))
    name = _name(op)
    if name == "scaled_dot_product_attention" and kwargs.get("scale") is None:
        width = _shape(args[0])[-1]
        if isinstance(width, int):  # it would follow the size of what is left
            kwargs["scale"] = width**-0.5
    if name in ("split", "chunk"):
        sizes = [v.shape[args[2]] for v in node.meta["val"]]
        if all(type(n) is int for n in sizes):
            return torch.ops.aten.split_with_sizes.default, [args[0], sizes, args[2]], {}
    if name == "narrow" and all(type(n) is int for n in args[2:4]) and args[2] >= 0:
        op, name = torch.ops.aten.slice.Tensor, "slice"
        args = [args[0], args[1], args[2], args[2] + args[3], 1]
    if name == "slice":
        length = _shape(args[0])[args[1]]
        if type(length) is int:
            args[2:4] = [n + length if type(n) is int and n < 0 else n for n in args[2:4]]
    if name in ("view", "reshape"):
        symbols = [i for i, n in enumerate(args[1]) if isinstance(n, fx.Node)] if isinstance(args[1], list) else []
        if len(symbols) == 1 and -1 not in args[1]:  # a multiple of the batch by a size, such as the number of heads
            args[1] = [-1 if i == symbols[0] else n for i, n in enumerate(args[1])]
    return op, args, kwargs


def _shape(value: Any) -> Sequence[Any]:
    found = value.meta.get("val") if isinstance(value, fx.Node) else value
    if isinstance(found, Tensor):
        return found.shape
    return ()
