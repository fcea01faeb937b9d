"""What each family of aten operations does to labels.

A rule is ``rule(tracer, func, args, kwargs, out)``. Pointwise operations are told by torch's own tag. What no rule
knows freezes its inputs, with its name as the reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import lookups, moves, products
from .trace import Axis, Rule, Tracer, every


def pointwise(t: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    """Tie all inputs, axis by axis, as broadcasting aligns them."""
    tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
    first = out if isinstance(out, Tensor) else out[0]
    result: list[Axis] = [None] * first.dim()
    labelled = [False] * first.dim()
    rigid = [False] * first.dim()
    for x in tensors:
        offset = first.dim() - x.dim()
        if offset < 0:
            continue
        for i, axis in enumerate(t.axes(x)):
            if x.shape[i] == 1:
                continue
            place = i + offset
            if axis is None:
                rigid[place] = True
                if labelled[place]:
                    result[place], labelled[place] = t.tie(result[place], None, name(func)), False
            elif labelled[place] or rigid[place]:
                known = result[place] if labelled[place] else None
                tied = t.tie(known, axis, name(func))
                result[place], labelled[place] = tied, tied is not None
                rigid[place] = tied is None
            else:
                result[place], labelled[place] = axis, True
    for x in (out,) if isinstance(out, Tensor) else out:
        if isinstance(x, Tensor):
            t.put(x, result)


def name(func: Any) -> str:
    """The operation's name without namespace and overload."""
    return str(func).removeprefix("aten.").split(".")[0]


def same(t: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    """The first input's labels."""
    axes = t.axes(args[0])
    for x in (out,) if isinstance(out, Tensor) else out:
        if isinstance(x, Tensor):
            t.put(x, axes if x.dim() == len(axes) else (None,) * x.dim())


def nothing(t: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    """A result that carries no labels, and asks nothing of its inputs."""
    t.rigid(out)


def spatial(t: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    """Pooling and resampling: batch and channels stay, the other axes are positions."""
    x = args[0]
    first = out if isinstance(out, Tensor) else out[0]
    axes = t.axes(x)
    count = SPATIAL[name(func)]
    for axis in axes[len(axes) - count :]:
        t.freeze(axis, f"{name(func)} goes over it as positions")
    for y in (out,) if isinstance(out, Tensor) else out:
        if isinstance(y, Tensor):
            t.put(y, (*axes[: len(axes) - count], *(None,) * (first.dim() - len(axes) + count)))


def reduce(t: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    """Sums, means, maxima: labelled axes that vanish here are noted, for zeros count in them."""
    x = args[0]
    dims = kwargs.get("dim", args[1] if len(args) > 1 else None)
    if name(func) in ("linalg_vector_norm", "norm"):
        dims = kwargs.get("dim", args[2] if len(args) > 2 else None)
    keep = kwargs.get("keepdim", next((a for a in args[2:] if isinstance(a, bool)), False))
    if name(func) in ("var", "std", "var_mean", "std_mean"):
        keep = kwargs.get("keepdim", False) or (len(args) > 3 and bool(args[3]))
        if isinstance(dims, bool):
            dims = None
    if dims is None or (isinstance(dims, (list, tuple)) and not dims):
        dims = range(x.dim())
    over = {d % x.dim() for d in ([dims] if isinstance(dims, int) else dims)} if x.dim() else set()
    axes = t.axes(x)
    t.statistics(*((i, axes[i]) for i in over))
    first = out if isinstance(out, Tensor) else out[0]
    if first.dim() == x.dim() and (keep or not over):
        result: list[Axis] = [None if i in over else a for i, a in enumerate(axes)]
    else:
        result = [a for i, a in enumerate(axes) if i not in over]
    for y in (out,) if isinstance(out, Tensor) else out:
        if isinstance(y, Tensor):
            t.put(y, result)


def softmax(t: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    """Keeps labels; zeros still count along its axis."""
    dim = args[1] % max(args[0].dim(), 1)
    t.statistics((dim, t.axes(args[0])[dim]))
    t.put(out, t.axes(args[0]))


def ordered(t: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    """Sorting and choosing along an axis: positions of that axis cannot go."""
    x = args[0]
    place = 2 if name(func) == "topk" else 1
    dim = kwargs.get("dim", args[place] if len(args) > place and isinstance(args[place], int) else -1)
    axes = list(t.axes(x))
    if axes:
        t.freeze(axes[dim], f"{name(func)} chooses along it")
        axes[dim] = None
    first = out if isinstance(out, Tensor) else out[0]
    if first.dim() < len(axes):
        del axes[dim]
    for y in (out,) if isinstance(out, Tensor) else out:
        if isinstance(y, Tensor):
            t.put(y, axes)


def batch_norm(t: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    """Tie the channel axis with weights and running statistics."""
    x = args[0]
    axes = list(t.axes(x))
    for other in args[1:5]:
        if isinstance(other, Tensor) and other.dim() == 1 and other.numel() > 1:
            axes[1] = t.tie(axes[1], t.axes(other)[0], "batch norm")
    if "no_training" not in str(func) and (len(args) <= 5 or args[5] is True):
        t.statistics(*((i, a) for i, a in enumerate(axes) if i != 1))
    t.put(out[0], axes)
    for y in out[1:]:
        if isinstance(y, Tensor):
            t.put(y, [axes[1]] if y.dim() == 1 and y.numel() == x.shape[1] else [None] * y.dim())


def layer_norm(t: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    """Tie the normalized axes with weights; zeros still count in mean and variance."""
    x, shape = args[0], args[1]
    axes = list(t.axes(x))
    start = x.dim() - len(shape)
    for other in args[2:4]:
        if isinstance(other, Tensor):
            for i, axis in enumerate(t.axes(other)):
                if x.shape[start + i] > 1:
                    axes[start + i] = t.tie(axes[start + i], axis, "layer norm")
    t.statistics(*((i, axes[i]) for i in range(start, x.dim())))
    first, *rest = out if isinstance(out, (tuple, list)) else (out,)
    t.put(first, axes)
    t.rigid(rest)


def group_norm(t: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    """Split channels into (group, within); zeros still count within a group."""
    x, weight, bias, groups = args[0], args[1], args[2], args[6]
    axes = list(t.axes(x))
    for other in (weight, bias):
        if isinstance(other, Tensor):
            axes[1] = t.tie(axes[1], t.axes(other)[0], "group norm")
    if axes[1] is not None:
        moves.split(t, axes[1], (groups, x.shape[1] // groups))
    t.statistics((1, axes[1]))
    t.put(out[0], axes)
    t.rigid(out[1:])


SPATIAL = {
    "max_pool2d_with_indices": 2,
    "max_pool3d_with_indices": 3,
    "avg_pool1d": 1,
    "avg_pool2d": 2,
    "avg_pool3d": 3,
    "_adaptive_avg_pool2d": 2,
    "_adaptive_avg_pool3d": 3,
    "adaptive_avg_pool1d": 1,
    "adaptive_max_pool2d": 2,
    "upsample_nearest1d": 1,
    "upsample_nearest2d": 2,
    "upsample_nearest3d": 3,
    "_upsample_nearest_exact2d": 2,
    "upsample_linear1d": 1,
    "upsample_bilinear2d": 2,
    "upsample_bicubic2d": 2,
    "upsample_trilinear3d": 3,
    "_upsample_bilinear2d_aa": 2,
    "_upsample_bicubic2d_aa": 2,
    "reflection_pad1d": 1,
    "reflection_pad2d": 2,
    "replication_pad2d": 2,
    "grid_sampler_2d": 2,
    "pixel_shuffle_": 2,
}

RULES: dict[str, Rule] = {
    **dict.fromkeys(SPATIAL, spatial),
    **every(
        "_to_copy detach alias lift_fresh contiguous dropout positive _conj flip zeros_like ones_like "
        "empty_like full_like rand_like randn_like native_dropout bernoulli fill_ zero_ fill zero copysign",
        same,
    ),
    **every(
        "_prelu_kernel hardswish_ hardswish hardtanh_ hardtanh silu_ silu gelu masked_fill_ where fmod "
        "remainder _softmax_backward_data rsub relu6 threshold logit_ nan_to_num nan_to_num_ clamp_min_",
        pointwise,
    ),
    **every(
        "sum mean amax amin max min prod var std var_mean std_mean linalg_vector_norm norm any all logsumexp "
        "median argmax_ count_nonzero",
        reduce,
    ),
    **every("_softmax _log_softmax softmax log_softmax _safe_softmax", softmax),
    **every("topk sort argmax argmin argsort cumsum cumprod cummax kthvalue cumsum_", ordered),
    **every(
        "_local_scalar_dense item size numel is_nonzero sym_size equal histc bincount nonzero unique2 "
        "_unique2 _assert_async _assert_tensor_metadata new_zeros new_ones new_full new_empty scalar_tensor "
        "searchsorted bucketize one_hot is_same_size",
        nothing,
    ),
    **every(
        "native_batch_norm cudnn_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training "
        "_batch_norm_no_update _batch_norm_with_update",
        batch_norm,
    ),
    "native_layer_norm": layer_norm,
    "_fused_rms_norm": layer_norm,
    "native_group_norm": group_norm,
    **lookups.RULES,
    **moves.RULES,
    **products.RULES,
}


def find(func: Any) -> Rule | None:
    """The rule of an operation, or None."""
    if not str(func).startswith("aten."):
        return None
    rule = RULES.get(name(func))
    if rule is None and torch.Tag.pointwise in func.tags:
        return pointwise
    return rule
