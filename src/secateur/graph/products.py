"""Rules for matrix products, convolutions and attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from .moves import split
from .trace import Axis, Rule, Tracer, every


def matmul(t: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor) -> None:
    """``mm``, ``bmm``, ``addmm``, ``baddbmm``, ``mv``, ``dot``: tie what is contracted, and the batch."""
    operands = [x for x in args if isinstance(x, Tensor)]
    added = operands[0] if len(operands) == 3 else None
    a, b = operands[-2:]
    left, right = list(t.axes(a)), list(t.axes(b))
    if a.shape[-1] > 1:
        t.tie(left[-1], right[0 if b.dim() == 1 else -2], "a matrix product")
    batch: list[Axis] = []
    if a.dim() == 3:
        batch = [t.tie(left[0], right[0], "a batched product") if a.shape[0] > 1 else None]
    inner = left[-1] if isinstance(left[-1], np.ndarray) else right[0 if b.dim() == 1 else -2]
    free = [(left[i], a.shape[i]) for i in range(a.dim() - 1)]
    t.cost(2, *free, (inner, a.shape[-1]), *([(right[-1], b.shape[-1])] if b.dim() >= 2 else []))
    rows = [left[-2]] if a.dim() >= 2 else []
    columns = [right[-1]] if b.dim() >= 2 else []
    axes = [*batch, *rows, *columns]
    if added is not None:
        offset = out.dim() - added.dim()
        for i, axis in enumerate(t.axes(added)):
            if added.shape[i] > 1:
                axes[i + offset] = t.tie(axes[i + offset], axis, "a bias")
    t.put(out, axes)


def linear(t: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor) -> None:
    """``x W^T + b``."""
    x, weight = args[0], args[1]
    bias = args[2] if len(args) > 2 else None
    axes = list(t.axes(x))
    o, i = t.axes(weight)
    if weight.shape[1] > 1:
        t.tie(axes[-1], i, "a linear layer")
    t.cost(2, *zip(axes[:-1], x.shape[:-1], strict=True), (i, weight.shape[1]), (o, weight.shape[0]))
    axes[-1] = o
    if isinstance(bias, Tensor) and bias.numel() > 1:
        axes[-1] = t.tie(o, t.axes(bias)[0], "a bias")
    t.put(out, axes)


def convolution(t: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor) -> None:
    """Grouped ones split channels into (group, within); removing within goes through all groups alike."""
    x, weight, bias = args[0], args[1], args[2]
    transposed, groups = bool(args[6]), int(args[8])
    channels = t.axes(x)[1]
    axes = t.axes(weight)
    for kernel in axes[2:]:
        t.freeze(kernel, "a position of a kernel")
    first, second = axes[0], axes[1]
    if groups == 1:
        fed, made = (first, second) if transposed else (second, first)
        if x.shape[1] > 1:
            t.tie(channels, fed, "a convolution")
    else:
        per_in = x.shape[1] // groups
        group_in, within_in = split(t, channels, (groups, per_in))
        if transposed:
            group_w, within_w = split(t, first, (groups, per_in))
            t.tie(group_in, group_w, "groups of a convolution")
            if per_in > 1:
                t.tie(within_in, within_w, "a grouped convolution")
            made = _outer(t, group_in, second, groups, weight.shape[1])
        else:
            made = first
            group_out, _ = split(t, first, (groups, weight.shape[0] // groups))
            t.tie(group_in, group_out, "groups of a convolution")
            if per_in > 1:
                t.tie(within_in, second, "a grouped convolution")
    if isinstance(bias, Tensor) and bias.numel() > 1:
        made = t.tie(made, t.axes(bias)[0], "a bias")
    positions = int(np.prod((x if transposed else out).shape[2:])) * out.shape[0] * int(np.prod(weight.shape[2:]))
    t.cost(2 * positions, (first, weight.shape[0]), (second, weight.shape[1]))
    t.put(out, [None, made, *(None,) * (out.dim() - 2)])


def _outer(t: Tracer, group: Axis, within: Axis, groups: int, size: int) -> Axis:
    from .moves import merge

    return merge(t, [group, within], [groups, size])


def attention(t: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    """Fused scaled-dot-product attention of ``(batch, heads, tokens, dim)``."""
    q, k, v = args[:3]
    first = out if isinstance(out, Tensor) else out[0]
    qa, ka, va = (list(t.axes(x)) for x in (q, k, v))
    width = q.shape[-1]
    if width > 1:
        t.tie(qa[-1], ka[-1], "attention")
        if v.shape[-1] == width:  # fused kernels want it so; the others take twice as long, which no FLOPs make up for
            va[-1] = t.tie(qa[-1], va[-1], "attention's values")
        if kwargs.get("scale") is None:
            t.freeze(qa[-1], "attention divides by the root of the head's width, which would change")
    heads = [ka[-3], va[-3]] if q.dim() >= 3 else []
    if q.dim() >= 4:
        times = q.shape[-3] // k.shape[-3]
        for a in heads:
            wide = np.repeat(a, times) if isinstance(a, np.ndarray) else a
            if q.shape[-3] > 1 and (k.shape[-3] > 1 or times == 1):
                qa[-3] = t.tie(qa[-3], wide, "attention heads")
            elif isinstance(qa[-3], np.ndarray) and k.shape[-3] == 1:
                pass  # one key-value head for all: query heads are free
    for x in args[3:]:
        if isinstance(x, Tensor) and x.dim() >= 3 and x.shape[-3] > 1:
            qa[-3] = t.tie(qa[-3], t.axes(x)[-3], "an attention mask")
    mask = kwargs.get("attn_mask", kwargs.get("attn_bias"))
    if isinstance(mask, Tensor) and mask.dim() >= 3 and mask.shape[-3] > 1:
        qa[-3] = t.tie(qa[-3], t.axes(mask)[-3], "an attention mask")
    rows = [(qa[i], q.shape[i]) for i in range(q.dim() - 1)]
    for width_axis, width in ((qa[-1], q.shape[-1]), (va[-1], v.shape[-1])):
        t.cost(2 * k.shape[-2], *rows, (width_axis, width))
    t.put(first, [*qa[:-1], va[-1]])
    if not isinstance(out, Tensor):
        t.rigid([y for y in out[1:] if isinstance(y, Tensor)])


def grouped_mm(t: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor) -> None:
    """``(tokens, i) x (experts, i, o)``: experts are chosen by tokens, so their axis is the router's."""
    x, weight = args[:2]
    xa, wa = t.axes(x), t.axes(weight)
    if x.dim() == 2 and weight.dim() == 3:
        t.tie(xa[1], wa[1], "a grouped product")
        t.freeze(wa[0], "experts are numbered by the router")
        t.cost(2 * x.shape[0], (wa[1], weight.shape[1]), (wa[2], weight.shape[2]))
        t.put(out, [None, wa[2]])
        return
    t.unknown(func, [x, weight], out)


RULES: dict[str, Rule] = {
    **every("mm bmm addmm baddbmm mv dot addmv addbmm", matmul),
    **every("linear addmm_linear", linear),
    **every("convolution _convolution mkldnn_convolution convolution_overrideable", convolution),
    **every(
        "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention "
        "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention "
        "_scaled_dot_product_fused_attention_overrideable scaled_dot_product_attention "
        "_scaled_dot_product_attention_math",
        attention,
    ),
    "_grouped_mm": grouped_mm,
}
