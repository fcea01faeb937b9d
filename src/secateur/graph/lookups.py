"""Rules for operations that read or write positions by number, and for windows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .moves import split
from .trace import Axis, Constant, Rule, Tracer, every


def embedding(t: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor) -> None:
    """A table: rows are looked up, columns keep their labels."""
    table = t.axes(args[0])
    t.freeze(table[0], "its positions are looked up by number (a vocabulary)")
    t.put(out, [*(None,) * (out.dim() - 1), table[1]])


def index(t: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor) -> None:
    """Advanced indexing: the axes that are indexed cannot lose positions, the others keep their labels."""
    x, indices = args[0], list(args[1])
    axes = list(t.axes(x))
    used = [i for i, k in enumerate(indices) if k is not None]
    if not used or used[-1] - used[0] + 1 != len(used) or any(indices[i].dtype == torch.bool for i in used):
        for i in used:
            t.freeze(axes[i], "its positions are looked up by number")
        if len(used) == 1 and indices[used[0]].dtype == torch.bool:
            width = indices[used[0]].dim()
            for a in axes[used[0] : used[0] + width]:
                t.freeze(a, "a mask chooses its positions")
            t.put(out, [*axes[: used[0]], None, *axes[used[0] + width :]])
        else:
            rest = [a for i, a in enumerate(axes) if i not in used]
            t.put(out, [*(None,) * (out.dim() - len(rest)), *rest])
        return
    for i in used:
        t.freeze(axes[i], "its positions are looked up by number")
    new = out.dim() - (len(axes) - len(used))
    t.put(out, [*axes[: used[0]], *(None,) * new, *axes[used[-1] + 1 :]])


def gather(t: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor) -> None:
    """Reads along one axis; the others keep their positions where the index does not vary over them by itself."""
    x, dim, where = args[0], args[1] % max(args[0].dim(), 1), args[2]
    axes = list(t.axes(x))
    t.freeze(axes[dim], "its positions are looked up by number")
    axes[dim] = None
    for i, a in enumerate(axes):
        if isinstance(a, np.ndarray) and where.shape[i] != x.shape[i]:
            t.freeze(a, "gather reads a part of it")
            axes[i] = None
    t.put(out, axes)


def index_select(t: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor) -> None:
    """One axis is looked up, the others keep their labels."""
    axes = list(t.axes(args[0]))
    t.freeze(axes[args[1]], "its positions are looked up by number")
    axes[args[1]] = None
    t.put(out, axes)


def index_put(t: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor) -> None:
    """Writes by number along leading axes, as expert layers do with tokens; trailing axes are tied."""
    into, where = args[0], args[1] if isinstance(args[1], (list, tuple)) else [None] * args[1] + [args[2]]
    values = args[2] if isinstance(args[1], (list, tuple)) else args[3]
    axes = list(t.axes(into))
    named = {i for i, k in enumerate(where) if k is not None}
    for i in named:
        t.freeze(axes[i], "its positions are written by number")
    other = t.axes(values)
    for back in range(1, min(len(axes), len(other)) + 1):
        i = len(axes) - back
        if i in named or into.shape[i] == 1 or values.shape[-back] != into.shape[i]:
            break
        axes[i] = t.tie(axes[i], other[-back], "index_put")
    t.put(out, axes)


def copy(t: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor) -> None:
    """Writing into a tensor: what was a constant takes the labels, unless it is a part of another tensor."""
    into, x = args[0], args[1]
    offset = into.dim() - x.dim()
    axes = [*(None,) * offset, *t.axes(x)]
    if t.is_constant(into):
        if into._base is not None:
            for a in axes:
                t.freeze(a, "it is written into a part of another tensor")
        t.put(into, [a if isinstance(a, np.ndarray) and n > 1 else None for a, n in zip(axes, into.shape, strict=True)])
        return
    mine = list(t.axes(into))
    for i, a in enumerate(axes):
        if into.shape[i] > 1 and i >= offset and x.shape[i - offset] > 1:
            mine[i] = t.tie(mine[i], a, "copy")
    t.put(into, mine)


def unfold(t: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor) -> None:
    """Sliding windows over an axis."""
    axes = list(t.axes(args[0]))
    t.freeze(axes[args[1]], "windows slide along it")
    axes[args[1]] = None
    t.put(out, [*axes, None])


def im2col(t: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor) -> None:
    """``(b, c, h, w)`` to ``(b, c * kernel, positions)``."""
    axes = t.axes(args[0])
    c = axes[1]
    t.put(out, [axes[0], np.repeat(c, out.shape[1] // len(c)) if isinstance(c, np.ndarray) else None, None])


def col2im(t: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor) -> None:
    """The inverse of `im2col`."""
    axes = t.axes(args[0])
    c = split(t, axes[1], (out.shape[1], args[0].shape[1] // out.shape[1]))
    t.freeze(c[1], "positions of a kernel")
    t.put(out, [axes[0], c[0], None, None])


def pixel_shuffle(t: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor) -> None:
    """Channels spread over pixels: those of one pixel block stay together."""
    x, factor = args[0], args[1]
    axes = t.axes(x)
    if "unshuffle" in str(func):
        c = axes[-3]
        moved: Axis = np.repeat(c, factor * factor) if isinstance(c, np.ndarray) else None
    else:
        inner = split(t, axes[-3], (out.shape[-3], factor * factor))
        t.freeze(inner[1], "pixel shuffle spreads it over pixels")
        moved = inner[0]
    t.put(out, [*axes[:-3], moved, None, None])


def diagonal(t: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor) -> None:
    """Ties positions of two axes: they cannot go."""
    for a in t.axes(args[0]):
        if not isinstance(a, Constant):
            t.freeze(a, "its diagonal is read")
    t.rigid(out)


RULES: dict[str, Rule] = {
    **every("index _unsafe_index", index),
    **every("index_put index_put_ _unsafe_index_put index_add index_add_ index_copy_ index_copy", index_put),
    "embedding": embedding,
    "gather": gather,
    "index_select": index_select,
    "copy_": copy,
    "copy": copy,
    "unfold": unfold,
    "im2col": im2col,
    "col2im": col2im,
    "pixel_shuffle": pixel_shuffle,
    "pixel_unshuffle": pixel_shuffle,
    "diagonal": diagonal,
}
