"""Rules for operations that move, merge, split and join axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .labels import RIGID, Array
from .trace import Axis, Constant, Rule, Tracer


def split(t: Tracer, axis: Axis, sizes: Sequence[int]) -> list[Axis]:
    """The labels of an axis seen as several: ``(n*m,)`` as ``(n, m)``.

    Where each position is already known to be made of a row and a column, these come back. Otherwise rows and
    columns are new labels, and a position goes when its row or its column goes.
    """
    if len(sizes) == 1:
        return [axis]
    if not isinstance(axis, np.ndarray):
        return [None] * len(sizes)
    n, m = sizes[0], int(np.prod(sizes[1:]))
    if n == 1:
        return [None, *split(t, axis, sizes[1:])]
    grid = t.labels.roots(axis).reshape(n, m)
    if m == 1:
        return [axis, *(None for _ in sizes[1:])]
    if (grid == grid[:1]).all():
        return [None, *split(t, grid[0], sizes[1:])]
    if (grid == grid[:, :1]).all():
        return [grid[:, 0].copy(), *(None for _ in sizes[1:])]
    found = _factors(t, grid)
    if found is None:
        found = _new_factors(t, grid)
    return [found[0], *split(t, found[1], sizes[1:])]


def _factors(t: Tracer, grid: Array) -> tuple[Array, Array] | None:
    """Rows and columns out of which the grid is joined already."""
    parents = {x: t.labels.parents(x) for x in np.unique(grid).tolist()}
    if not all(parents.values()):
        return None
    made = [[parents[x] for x in row] for row in grid.tolist()]
    for way in range(min(len(cell) for row in made for cell in row)):
        cells = [[cell[way] for cell in row] for row in made]
        rows = [frozenset.intersection(*row) for row in cells]
        columns = [frozenset.intersection(*column) for column in zip(*cells, strict=True)]
        if not all(rows) or not all(columns):
            continue
        if all(cells[i][j] == rows[i] | columns[j] for i in range(len(rows)) for j in range(len(columns))):
            return _nodes(t, rows), _nodes(t, columns)
    return None


def _nodes(t: Tracer, parents: list[frozenset[int]]) -> Array:
    widest = max(len(p) for p in parents)
    padded = np.array([sorted(p) + [min(p)] * (widest - len(p)) for p in parents], dtype=np.int64)
    return t.labels.join(*padded.T)


def _new_factors(t: Tracer, grid: Array) -> tuple[Array, Array]:
    _, row_of = np.unique(grid, axis=0, return_inverse=True)
    _, column_of = np.unique(grid, axis=1, return_inverse=True)
    row_of, column_of = row_of.reshape(-1), column_of.reshape(-1)
    rows = t.labels.fresh(int(row_of.max()) + 1)[row_of]
    columns = t.labels.fresh(int(column_of.max()) + 1)[column_of]
    done = set()
    for i, row in enumerate(grid.tolist()):
        for j, label in enumerate(row):
            key = (label, int(rows[i]), int(columns[j]))
            if key not in done:
                done.add(key)
                t.labels.define(label, key[1:])
    return rows, columns


def merge(t: Tracer, axes: Sequence[Axis], sizes: Sequence[int]) -> Axis:
    """The labels of several axes seen as one."""
    labelled = [(i, a) for i, a in enumerate(axes) if isinstance(a, np.ndarray)]
    if not labelled:
        return None
    wide = [
        np.broadcast_to(a.reshape([-1 if k == i else 1 for k in range(len(sizes))]), tuple(sizes)).reshape(-1)
        for i, a in labelled
    ]
    return wide[0].copy() if len(wide) == 1 else t.labels.join(*wide)


def reshape(t: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    """Regroup axes; sizes of one fall out of the way first."""
    x = args[0]
    before, after = list(x.shape), list(out.shape)
    axes = t.axes(x)
    result: list[Axis] = [None] * len(after)
    if x.numel():
        i = j = 0
        while i < len(before) or j < len(after):
            a, b = [i] if i < len(before) else [], [j] if j < len(after) else []
            i, j = i + len(a), j + len(b)
            size_a = before[a[0]] if a else 1
            size_b = after[b[0]] if b else 1
            while size_a != size_b:
                if size_a < size_b:
                    size_a *= before[i]
                    a.append(i)
                    i += 1
                else:
                    size_b *= after[j]
                    b.append(j)
                    j += 1
            merged = merge(t, [axes[k] for k in a], [before[k] for k in a]) if a else None
            for k, axis in zip(b, split(t, merged, [after[k] for k in b]) if b else [], strict=True):
                result[k] = axis
    t.put(out, result)


def transpose(t: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    axes = list(t.axes(args[0]))
    if len(axes) >= 2:
        a, b = (args[1], args[2]) if len(args) > 2 else (0, 1)
        axes[a], axes[b] = axes[b], axes[a]
    t.put(out, axes)


def permute(t: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    axes = t.axes(args[0])
    t.put(out, [axes[i] for i in args[1]])


def squeeze(t: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    """Drops or adds axes of size one, which carry no labels: a reshape that never merges."""
    x = args[0]
    kept = [a for a, n in zip(t.axes(x), x.shape, strict=True) if n != 1]
    t.put(out, [kept.pop(0) if n != 1 else None for n in out.shape])


def expand(t: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    axes = t.axes(args[0])
    t.put(out, [*(None,) * (out.dim() - len(axes)), *axes])


def repeat(t: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    axes = [*(None,) * (out.dim() - args[0].dim()), *t.axes(args[0])]
    t.put(out, [np.tile(a, k) if isinstance(a, np.ndarray) else None for a, k in zip(axes, args[1], strict=True)])


def repeat_interleave(t: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    times, dim = args[1], kwargs.get("dim", args[2] if len(args) > 2 else None)
    axes = list(t.axes(args[0]))
    if not isinstance(times, int) or dim is None:
        t.unknown(func, [x for x in args if isinstance(x, Tensor)], out)
        return
    a = axes[dim]
    axes[dim] = np.repeat(a, times) if isinstance(a, np.ndarray) else None
    t.put(out, axes)


def cat(t: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor) -> None:
    tensors = [x for x in args[0] if x.numel() or x.dim() > 1]
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0) % out.dim()
    axes: list[Axis] = [None] * out.dim()
    for i in range(out.dim()):
        parts = [t.axes(x)[i] for x in tensors]
        if i != dim:
            labelled = [a for a in parts if isinstance(a, np.ndarray)]
            if labelled:
                for a in parts:
                    t.tie(labelled[0], a, "cat") if a is not labelled[0] else None
                axes[i] = labelled[0]
        elif any(isinstance(a, np.ndarray) for a in parts):
            axes[i] = np.concatenate([t.entries(a, x.shape[i]) for a, x in zip(parts, tensors, strict=True)])
    t.put(out, axes)


def stack(t: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor) -> None:
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0) % out.dim()
    first = list(t.axes(args[0][0]))
    for x in args[0][1:]:
        for i, a in enumerate(t.axes(x)):
            if x.shape[i] > 1:
                first[i] = t.tie(first[i], a, "stack")
    first.insert(dim, None)
    t.put(out, first)


def slice_(t: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor) -> None:
    x, dim = args[0], args[1] if len(args) > 1 else kwargs.get("dim", 0)
    start = args[2] if len(args) > 2 else kwargs.get("start")
    end = args[3] if len(args) > 3 else kwargs.get("end")
    step = args[4] if len(args) > 4 else kwargs.get("step", 1)
    axes = list(t.axes(x))
    a = axes[dim]
    axes[dim] = a[slice(start, end, step)] if isinstance(a, np.ndarray) else None
    t.put(out, axes)


def narrow(t: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor) -> None:
    axes = list(t.axes(args[0]))
    a = axes[args[1]]
    axes[args[1]] = a[args[2] : args[2] + args[3]] if isinstance(a, np.ndarray) else None
    t.put(out, axes)


def select(t: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor) -> None:
    axes = list(t.axes(args[0]))
    t.freeze(axes.pop(args[1]), "its positions are read one by one")
    t.put(out, axes)


def unbind(t: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Sequence[Tensor]) -> None:
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
    axes = list(t.axes(args[0]))
    t.freeze(axes.pop(dim), "its positions are read one by one")
    for y in out:
        t.put(y, axes)


def parts(t: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Sequence[Tensor]) -> None:
    """``split`` and ``chunk``: equal parts stay equal, so their positions are tied; unequal ones just move."""
    dim = kwargs.get("dim", args[2] if len(args) > 2 else 0) % args[0].dim()
    axes = list(t.axes(args[0]))
    sizes = [y.shape[dim] for y in out]
    a = axes[dim]
    if isinstance(a, np.ndarray) and len(sizes) > 1:
        if len(set(sizes)) == 1:
            rows, columns = split(t, a, (len(sizes), sizes[0]))
            t.freeze(rows, "it is one of the equal parts of a split")
            if sizes[0] == 1:
                t.freeze(a, "its positions are read one by one")
            del columns
        edges = np.cumsum([0, *sizes])
    for k, y in enumerate(out):
        piece = list(axes)
        if isinstance(a, np.ndarray) and len(sizes) > 1:
            piece[dim] = a[edges[k] : edges[k + 1]]
        t.put(y, piece)


def pad(t: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor) -> None:
    x, widths = args[0], list(args[1])
    axes = list(t.axes(x))
    for k in range(len(widths) // 2):
        i, before, after = x.dim() - 1 - k, widths[2 * k], widths[2 * k + 1]
        a = axes[i]
        if isinstance(a, np.ndarray) and (before or after):
            inner = a[max(0, -before) : len(a) + min(0, after)]
            ends = [np.full(max(0, n), RIGID, dtype=np.int64) for n in (before, after)]
            axes[i] = np.concatenate([ends[0], inner, ends[1]])
    t.put(out, axes)


def roll(t: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor) -> None:
    axes = list(t.axes(args[0]))
    for dim in args[2] if len(args) > 2 else range(len(axes)):
        t.freeze(axes[dim], "roll moves its positions")
    t.put(out, axes)


def embedding(t: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor) -> None:
    table = t.axes(args[0])
    t.freeze(table[0], "its positions are looked up by number (a vocabulary)")
    t.put(out, [*(None,) * (out.dim() - 1), table[1]])


def index(t: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor) -> None:
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
    axes = t.axes(args[0])
    c = split(t, axes[1], (out.shape[1], args[0].shape[1] // out.shape[1]))
    t.freeze(c[1], "positions of a kernel")
    t.put(out, [axes[0], c[0], None, None])


def pixel_shuffle(t: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor) -> None:
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
    for a in t.axes(args[0]):
        if not isinstance(a, Constant):
            t.freeze(a, "its diagonal is read")
    t.rigid(out)


RULES: dict[str, Rule] = {
    **dict.fromkeys("view _unsafe_view reshape _reshape_alias flatten unflatten".split(), reshape),
    **dict.fromkeys("transpose t swapaxes transpose_".split(), transpose),
    **dict.fromkeys("squeeze unsqueeze squeeze_ unsqueeze_".split(), squeeze),
    **dict.fromkeys("split split_with_sizes chunk unsafe_split unsafe_chunk unsafe_split_with_sizes".split(), parts),
    **dict.fromkeys("index _unsafe_index".split(), index),
    **dict.fromkeys("index_put index_put_ _unsafe_index_put index_add index_add_ index_copy_ index_copy".split(), index_put),
    "permute": permute,
    "expand": expand,
    "expand_as": expand,
    "repeat": repeat,
    "tile": repeat,
    "repeat_interleave": repeat_interleave,
    "cat": cat,
    "concat": cat,
    "stack": stack,
    "slice": slice_,
    "narrow": narrow,
    "select": select,
    "unbind": unbind,
    "constant_pad_nd": pad,
    "roll": roll,
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
