"""Rules for operations that move, merge, split and join axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from .labels import RIGID, Array
from .trace import Axis, Rule, Tracer, every


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
    """Exchange two axes."""
    axes = list(t.axes(args[0]))
    if len(axes) >= 2:
        a, b = (args[1], args[2]) if len(args) > 2 else (0, 1)
        axes[a], axes[b] = axes[b], axes[a]
    t.put(out, axes)


def permute(t: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    """Reorder axes."""
    axes = t.axes(args[0])
    t.put(out, [axes[i] for i in args[1]])


def squeeze(t: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    """Drops or adds axes of size one, which carry no labels: a reshape that never merges."""
    x = args[0]
    kept = [a for a, n in zip(t.axes(x), x.shape, strict=True) if n != 1]
    t.put(out, [kept.pop(0) if n != 1 else None for n in out.shape])


def expand(t: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    """An axis of size one is repeated: it carries no labels."""
    axes = t.axes(args[0])
    t.put(out, [*(None,) * (out.dim() - len(axes)), *axes])


def repeat(t: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    """Tile the labels."""
    axes = [*(None,) * (out.dim() - args[0].dim()), *t.axes(args[0])]
    t.put(out, [np.tile(a, k) if isinstance(a, np.ndarray) else None for a, k in zip(axes, args[1], strict=True)])


def repeat_interleave(t: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    """Repeat each label."""
    times, dim = args[1], kwargs.get("dim", args[2] if len(args) > 2 else None)
    axes = list(t.axes(args[0]))
    if not isinstance(times, int) or dim is None:
        t.unknown(func, [x for x in args if isinstance(x, Tensor)], out)
        return
    a = axes[dim]
    axes[dim] = np.repeat(a, times) if isinstance(a, np.ndarray) else None
    t.put(out, axes)


def cat(t: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor) -> None:
    """Labels one after the other; axes without labels give rigid entries. The other axes are tied."""
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
    """A new axis without labels; the others are tied."""
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0) % out.dim()
    first = list(t.axes(args[0][0]))
    for x in args[0][1:]:
        for i, a in enumerate(t.axes(x)):
            if x.shape[i] > 1:
                first[i] = t.tie(first[i], a, "stack")
    first.insert(dim, None)
    t.put(out, first)


def slice_(t: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor) -> None:
    """A part of an axis keeps its labels."""
    x, dim = args[0], args[1] if len(args) > 1 else kwargs.get("dim", 0)
    start = args[2] if len(args) > 2 else kwargs.get("start")
    end = args[3] if len(args) > 3 else kwargs.get("end")
    step = args[4] if len(args) > 4 else kwargs.get("step", 1)
    axes = list(t.axes(x))
    a = axes[dim]
    axes[dim] = a[slice(start, end, step)] if isinstance(a, np.ndarray) else None
    t.put(out, axes)


def narrow(t: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor) -> None:
    """A part of an axis keeps its labels."""
    axes = list(t.axes(args[0]))
    a = axes[args[1]]
    axes[args[1]] = a[args[2] : args[2] + args[3]] if isinstance(a, np.ndarray) else None
    t.put(out, axes)


def select(t: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor) -> None:
    """One position: the axis cannot lose any."""
    axes = list(t.axes(args[0]))
    t.freeze(axes.pop(args[1]), "its positions are read one by one")
    t.put(out, axes)


def unbind(t: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Sequence[Tensor]) -> None:
    """All positions one by one: the axis cannot lose any."""
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
    """What is added is rigid."""
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
    """Positions move around: they cannot go."""
    axes = list(t.axes(args[0]))
    for dim in args[2] if len(args) > 2 else range(len(axes)):
        t.freeze(axes[dim], "roll moves its positions")
    t.put(out, axes)


RULES: dict[str, Rule] = {
    **every("view _unsafe_view reshape _reshape_alias flatten unflatten", reshape),
    **every("transpose t swapaxes transpose_", transpose),
    **every("squeeze unsqueeze squeeze_ unsqueeze_", squeeze),
    **every("split split_with_sizes chunk unsafe_split unsafe_chunk unsafe_split_with_sizes", parts),
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
}
