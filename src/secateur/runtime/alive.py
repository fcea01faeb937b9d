"""Which channels of the tensors of one run can be anything but zero, followed through what the model does with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d, max_pool2d, max_pool3d
from torch.utils._pytree import tree_iter
from torch.utils.weak import WeakIdKeyDictionary

#: Functions by name that make zero of a channel of zeros, and read no other channel.
_KEEP = frozenset((
    "relu", "relu_", "relu6", "leaky_relu", "leaky_relu_", "elu", "elu_", "selu", "celu", "gelu", "silu", "mish",
    "hardswish", "tanh", "dropout", "dropout1d", "dropout2d", "dropout3d", "feature_dropout", "avg_pool1d",
    "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "max_pool1d",
    "max_pool2d", "max_pool3d", "interpolate", "contiguous", "clone", "detach", "to", "float", "double", "half",
    "bfloat16", "squeeze",
))  # fmt: skip
#: Functions that are known by themselves, for their names say nothing.
_POOLS = frozenset((max_pool1d, max_pool2d, max_pool3d))
_ADD = frozenset(("add", "add_", "__add__", "__radd__", "__iadd__", "sub", "sub_", "__sub__", "__isub__"))
_MUL = frozenset(("mul", "mul_", "__mul__", "__rmul__", "__imul__", "div", "div_", "__truediv__"))
_DIV = frozenset(("div", "div_", "__truediv__"))
_FLAT = frozenset(("flatten", "view", "reshape"))


class Alive:
    """For each tensor that came from a gate: which of its channels stay, ``(batch, channels)``, bool.

    What is not known of a tensor is that all its channels may be anything. A tensor that is changed in place, or that
    another one shares memory with, is no longer known, unless the change is.

    Args:
        sums: whether a sum of two such tensors is known: where neither has anything. False for a bound that is the same
            for all inputs.
    """

    def __init__(self, sums: bool = True) -> None:
        self._masks: Any = WeakIdKeyDictionary()
        self._sums = sums

    def of(self, x: Any) -> Tensor | None:
        """The mask of a tensor; None where nothing is known."""
        found: Tensor | None = self._masks.get(x) if isinstance(x, Tensor) else None
        return found

    def set(self, x: Tensor, mask: Tensor) -> None:
        """Say of a tensor what stays in it."""
        self._masks[x] = mask

    def follow(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> None:
        """What a function means for what is known."""
        given = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor) and x in self._masks]
        changed = _changed(func, args, kwargs)
        if not given and changed is None:
            return
        mask = self._rule(func, args, kwargs, out)
        storages = {_storage(x) for x in tree_iter(out) if isinstance(x, Tensor)}
        for x in given:
            if _storage(x) in storages:
                del self._masks[x]
        if changed is not None:  # also under other names
            for x in [x for x in self._masks if _storage(x) == _storage(changed)]:
                del self._masks[x]
        if mask is not None:
            self._masks[out] = mask

    def _rule(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> Tensor | None:
        """The mask of the result, or None."""
        if not isinstance(out, Tensor) or not args or out.dim() < 2:
            return None
        name, x = _name(func), args[0]
        if name in ("cat", "concat", "concatenate"):
            return self._cat(x, kwargs.get("dim", args[1] if len(args) > 1 else 0), out)
        mask = self.of(x)
        if name in _ADD or name in _MUL:
            other = args[1] if len(args) > 1 and name not in _DIV else None  # what is divided by says nothing
            return self._two(name in _ADD, x, other, out)
        if mask is None:
            return None
        if name in _FLAT and out.dim() == 2 and out.shape[0] == x.shape[0] and out.shape[1] % x.shape[1] == 0:
            return mask.repeat_interleave(out.shape[1] // x.shape[1], 1)
        same = out.shape[:2] == x.shape[:2]
        if not same:
            return None
        if name in _KEEP or func in _POOLS:
            return mask
        if name == "hardtanh":
            low, high = (
                kwargs.get(k, args[i] if len(args) > i else d) for i, k, d in ((1, "min_val", -1), (2, "max_val", 1))
            )
            return mask if low <= 0 <= high else None
        if name == "pad":
            plain = len(args[1] if len(args) > 1 else kwargs["pad"]) <= 2 * (x.dim() - 2)
            return mask if plain and not kwargs.get("value", args[3] if len(args) > 3 else None) else None
        if name == "mean":
            dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
            axes = [dim] if isinstance(dim, int) else list(dim or ())
            return mask if axes and all(d % x.dim() >= 2 for d in axes) else None
        return None

    def _two(self, sums: bool, x: Any, y: Any, out: Tensor) -> Tensor | None:
        ours, theirs = self.of(x), self.of(y)
        if sums:
            same = isinstance(x, Tensor) and isinstance(y, Tensor) and x.shape == y.shape
            return ours | theirs if same and self._sums and ours is not None and theirs is not None else None
        known = [m for t, m in ((x, ours), (y, theirs)) if m is not None and t.shape == out.shape]
        return known[0] if known else None

    def _cat(self, parts: Any, dim: int, out: Tensor) -> Tensor | None:
        if dim % out.dim() != 1:
            return None
        masks = []
        for x in parts:
            mask = self.of(x)
            masks.append(torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask)
        return torch.cat(masks, 1)


def _storage(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _changed(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The tensor that a function changes in place; None for one that changes nothing."""
    name = _name(func)
    own = name.startswith(("__i", "__set")) or (name.endswith("_") and not name.endswith("__"))
    into = kwargs.get("out", (args[0] if args else kwargs.get("input")) if own or kwargs.get("inplace") else None)
    return into if isinstance(into, Tensor) else None


def _name(func: Any) -> str:
    return str(getattr(func, "__name__", ""))


def smaller(
    x: Tensor, weight: Tensor, bias: Tensor | None, reads: Tensor | None, makes: Tensor | None, product: Any
) -> Tensor:
    """A convolution or a linear layer that multiplies what stays alone, and zeros for what does not.

    Inputs that agree are computed together, others by themselves.

    Args:
        reads: which input channels are not zero, ``(batch, inputs)``; None for all.
        makes: which outputs are wanted, ``(batch, outputs)``; None for all.
        product: ``product(x, weight, bias)``.
    """
    rows = torch.cat([m for m in (reads, makes) if m is not None], 1)
    if len(x) == 0:
        whole: Tensor = product(x, weight, bias)
        return whole
    if len(x) == 1 or bool((rows == rows[:1]).all()):
        return _one(x, weight, bias, _first(reads, 0), _first(makes, 0), product)
    _, group = torch.unique(rows, dim=0, return_inverse=True)
    out: Tensor | None = None
    for k in range(int(group.max()) + 1):
        at = (group == k).nonzero().flatten()
        first = int(at[0])
        one = _one(x.index_select(0, at), weight, bias, _first(reads, first), _first(makes, first), product)
        out = one.new_zeros(len(x), *one.shape[1:]) if out is None else out
        out = out.index_copy(0, at, one)
    assert out is not None
    return out


def _first(mask: Tensor | None, row: int) -> Tensor | None:
    return None if mask is None or bool(mask[row].all()) else mask[row].nonzero().flatten()


def _one(x: Tensor, weight: Tensor, bias: Tensor | None, i: Tensor | None, o: Tensor | None, product: Any) -> Tensor:
    """`smaller` for inputs that agree: positions of the inputs and outputs that stay; None for all."""
    outputs = weight.shape[0]
    if i is not None:
        i = i if len(i) else i.new_zeros(1)  # nothing to read: one channel of zeros
        x, weight = x.index_select(1, i), weight.index_select(1, i)
    if o is None:
        found: Tensor = product(x, weight, bias)
        return found
    wanted = o if len(o) else o.new_zeros(1)  # nothing to make: one channel tells the shape
    part: Tensor = product(x, weight.index_select(0, wanted), None if bias is None else bias.index_select(0, wanted))
    out = part.new_zeros(len(x), outputs, *part.shape[2:])
    whole: Tensor = out.index_copy(1, o, part) if len(o) else out
    return whole
