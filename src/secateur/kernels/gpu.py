"""Packed and 2:4 weights on GPUs as operators of torch: ``torch.ops.secateur.bits_linear`` and ``semi_linear``.

``bits_linear`` reads a packed matrix of 64 columns a panel by its bit mask (`triton_bits`): up to `FEW` tokens by a
kernel of its own; more are multiplied by cuBLAS with a dense weight, which is there already or is unpacked for the
call. ``semi_linear`` is torch's own product with 2:4 weights (cuSPARSELt, or CUTLASS where that is missing). On the
CPU both multiply densely: right, and slow. Whoever calls them has checked the indexes: a kernel trusts them.
"""

from __future__ import annotations

import warnings
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from ..errors import SecateurError
from ..formats.packed import PADDING, Packed
from .ops import FEW

#: Columns of a panel: a run is then one 64-bit mask. Rows of a group: what one program reads lies together.
PANEL, GROUP = 64, 4
#: Values that the kernels read; what is summed is float32.
KINDS = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
#: Rows and columns that a 2:4 weight is a multiple of: the larger of what cuSPARSELt and CUTLASS ask for.
SEMI_ROWS, SEMI_COLS = 32, 64

TRITON = "pip install triton"

_registry = torch.library.Library("secateur", "FRAGMENT")
_registry.define(
    "bits_linear(Tensor x, Tensor values, Tensor start, Tensor bits, Tensor? dense, Tensor? bias, "
    "int rows, int cols, int group, int activation) -> Tensor"
)
_registry.define(
    "semi_linear(Tensor x, Tensor kept, Tensor? meta, Tensor? bias, int rows, int cols, int activation) -> Tensor"
)


@lru_cache(maxsize=1)
def kernels() -> ModuleType | None:
    """The Triton kernels, or None where triton is not installed."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return None
    from . import triton_bits

    return triton_bits


def runs_here(x: Tensor) -> bool:
    """Whether a Triton kernel can be launched on this tensor."""
    return x.is_cuda and kernels() is not None


def _tiling(rows: int, cols: int) -> dict[str, int]:
    """How the matrix is shared out: programs enough for a large GPU, with columns enough for each to be busy.

    By the code that is compiled (13 to 14 instructions a weight at eight columns a lane, 17 at four), not by time.
    """
    wide = cols > 8 * PANEL
    return {
        "ROWS": 4 if rows >= 4096 else 2 if rows >= 1024 else 1,
        "PANELS": 16 if wide else 8,
        "REACH": 8,
        "num_warps": 4 if wide else 2,
    }


def multiply(
    x: Tensor, values: Tensor, start: Tensor, bits: Tensor, bias: Tensor | None, rows: int, cols: int, group: int,
    activation: int, tiling: dict[str, int] | None = None,
) -> Tensor:  # fmt: skip
    """The kernel for few tokens.

    Args:
        x: ``(1 to FEW, cols)``, contiguous, of any floats.
        values, start, bits: of a `Packed` with panels of 64 columns, on the device of x; the values float32, float16
            or bfloat16.
        bias: ``(rows,)`` or None; ``activation``: 1 for ReLU.
        tiling: ``ROWS``, ``PANELS``, ``REACH`` and ``num_warps``, powers of two; by the shape where not given.

    Returns:
        ``(tokens, rows)`` in the dtype of x; products and sums are float32.
    """
    found = kernels()
    if found is None:
        raise SecateurError(f"the kernel for bit masks is a Triton kernel: {TRITON}")
    chosen = tiling or _tiling(rows, cols)
    y = x.new_empty((x.shape[0], rows))
    with torch.cuda.device_of(x):
        found.multiply[(-(-rows // chosen["ROWS"]),)](
            x, values, start, bits.view(torch.int32), bias, y, rows, cols, group,
            TOKENS=x.shape[0], BIASED=bias is not None, ACTIVATION=activation, **chosen,
        )  # fmt: skip
    return y


def unpack(values: Tensor, start: Tensor, bits: Tensor, rows: int, cols: int, group: int) -> Tensor:
    """The dense matrix ``(rows, cols)`` in the dtype of the values; arguments as for `multiply`."""
    found = kernels()
    if found is None:
        raise SecateurError(f"the kernel for bit masks is a Triton kernel: {TRITON}")
    dense = values.new_empty((rows, cols))
    with torch.cuda.device_of(values):
        grid = (-(-rows // 8), -(-cols // (2 * PANEL)))
        found.unpack[grid](
            values, start, bits.view(torch.int32), dense, rows, cols, group, ROWS=8, PANELS=2, num_warps=4
        )
    return dense


def _rows_of(x: Tensor, cols: int, device: torch.device) -> Tensor:
    """The input as ``(tokens, cols)``.

    Raises:
        SecateurError: it is not what a layer of so many inputs takes.
    """
    if not x.is_floating_point():
        raise SecateurError(f"a compressed layer takes floats, not {x.dtype}")
    if not x.dim() or x.shape[-1] != cols:
        raise SecateurError(f"a compressed layer of {cols} inputs was given the shape {tuple(x.shape)}")
    if x.device != device:
        raise SecateurError(f"a compressed layer on {device} was given an input on {x.device}")
    return x.reshape(-1, cols).contiguous()


def _activated(y: Tensor, activation: int) -> Tensor:
    return y.relu() if activation else y


def bits_linear(
    x: Tensor, values: Tensor, start: Tensor, bits: Tensor, dense: Tensor | None, bias: Tensor | None,
    rows: int, cols: int, group: int, activation: int,
) -> Tensor:  # fmt: skip
    """``secateur::bits_linear``: ``(..., cols)`` to ``(..., rows)``, in the dtype of x.

    Raises:
        SecateurError: the input does not fit, the parts do not fit together, or triton is missing on a GPU.
    """
    given = _rows_of(x, cols, values.device)
    _check_parts(values, start, bits, dense, bias, rows, cols, group)
    n = given.shape[0]
    if not n:
        return x.new_empty((*x.shape[:-1], rows))
    if n <= FEW and runs_here(given):
        y = multiply(given, values, start, bits, bias, rows, cols, group, activation)
        return y.view(*x.shape[:-1], rows)
    if dense is None and (given.is_cuda or runs_here(given)):
        dense = unpack(values, start, bits, rows, cols, group)
    elif dense is None:
        dense = Packed(rows, cols, group, PANEL, values, start, None, bits).dense()
    y = _activated(F.linear(given.to(values.dtype), dense, bias), activation)
    return y.to(x.dtype).view(*x.shape[:-1], rows)


def _check_parts(
    values: Tensor, start: Tensor, bits: Tensor, dense: Tensor | None, bias: Tensor | None,
    rows: int, cols: int, group: int,
) -> None:  # fmt: skip
    """Sizes and types; a kernel would read past what is too short. What they hold is not read: that would wait."""
    runs = rows * -(-cols // PANEL)
    whole = values.dim() == 1 and values.is_contiguous() and values.numel() >= PADDING and values.dtype in KINDS
    whole = whole and min(rows, cols, group) >= 1
    exact = ((start, torch.int32, (runs + 1,)), (bits, torch.uint8, (runs, PANEL // 8)))
    alike = ((dense, values.dtype, (rows, cols)), (bias, values.dtype, (rows,)))
    if not whole or any(
        t is not None and (t.dtype != d or t.shape != s or not t.is_contiguous() or t.device != values.device)
        for t, d, s in (*exact, *alike)
    ):
        raise SecateurError(
            f"the parts of a compressed layer of {rows} x {cols} do not fit together: values of "
            f"{', '.join(KINDS.values())}, and everything contiguous on one device"
        )


def is_semi(weight: Tensor) -> bool:
    """Whether each four inputs next to each other keep at most two, in a shape that GPUs multiply.

    Args:
        weight: ``(outputs, inputs)``; outputs a multiple of 32, inputs of 64.
    """
    rows, cols = weight.shape
    if rows % SEMI_ROWS or cols % SEMI_COLS or 0 in weight.shape:
        return False
    return bool((weight.reshape(rows, -1, 4).count_nonzero(-1) <= 2).all())


def compress_semi(weight: Tensor) -> tuple[Tensor, Tensor | None]:
    """A 2:4 weight as ``(kept, meta)``; meta is None where cuSPARSELt keeps both in one tensor.

    Args:
        weight: ``(outputs, inputs)`` of float16 or bfloat16 for which `is_semi` holds. On the CPU it is laid out as
            CUTLASS reads it.

    Raises:
        SecateurError: it is not such a weight, or this GPU or this torch has no 2:4 products.
    """
    if weight.dim() != 2 or weight.dtype not in (torch.float16, torch.bfloat16) or not is_semi(weight):
        raise SecateurError(
            f"2:4 needs float16 or bfloat16 with two of four inputs zero, outputs a multiple of {SEMI_ROWS} and inputs "
            f"of {SEMI_COLS}: not {tuple(weight.shape)} of {weight.dtype}"
        )
    weight = weight.contiguous()
    if not weight.is_cuda:
        from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

        kept, meta = sparse_semi_structured_from_dense_cutlass(weight)
        return kept, meta
    problems = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*prototype", category=UserWarning)
        for make in (torch.sparse.to_sparse_semi_structured, torch.sparse.SparseSemiStructuredTensorCUTLASS.from_dense):
            try:
                found: Any = make(weight)
                F.linear(weight.new_zeros(8, weight.shape[1]), found)  # what compresses may still not multiply here
                return found.packed, found.meta
            except (RuntimeError, NotImplementedError) as error:
                problems.append(str(error).splitlines()[0])
    raise SecateurError(f"2:4 products are not available on this GPU: {'; '.join(problems)}")


def semi(kept: Tensor, meta: Tensor | None, rows: int, cols: int) -> Tensor:
    """The tensor of torch's own class that `compress_semi` took apart."""
    known: Any = torch.sparse.SparseSemiStructuredTensorCUTLASS
    if meta is None:
        known = torch.sparse.SparseSemiStructuredTensorCUSPARSELT
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*prototype", category=UserWarning)
        made: Tensor = known(
            torch.Size((rows, cols)), packed=kept, meta=meta, packed_t=None, meta_t=None,
            compressed_swizzled_bitmask=None,
        )  # fmt: skip
    return made


def dense_semi(kept: Tensor, meta: Tensor | None, rows: int, cols: int) -> Tensor:
    """The dense weight ``(rows, cols)`` again, bit for bit but for the sign of zeros."""
    if meta is not None:
        from torch.sparse._semi_structured_conversions import sparse_semi_structured_to_dense_cutlass

        dense: Tensor = sparse_semi_structured_to_dense_cutlass(kept, meta)
        return dense
    whole = F.linear(torch.eye(cols, dtype=kept.dtype, device=kept.device), semi(kept, meta, rows, cols))
    return whole.T.contiguous()


def semi_linear(
    x: Tensor, kept: Tensor, meta: Tensor | None, bias: Tensor | None, rows: int, cols: int, activation: int
) -> Tensor:
    """``secateur::semi_linear``: ``(..., cols)`` to ``(..., rows)``, in the dtype of x.

    Raises:
        SecateurError: the input does not fit.
    """
    given = _rows_of(x, cols, kept.device).to(kept.dtype)
    if not given.shape[0]:
        return x.new_empty((*x.shape[:-1], rows))
    weight = semi(kept, meta, rows, cols) if kept.is_cuda else dense_semi(kept, meta, rows, cols)
    y = _activated(F.linear(given, weight, bias), activation)
    return y.to(x.dtype).reshape(*x.shape[:-1], rows).contiguous()


def _no_backward(context: object, gradient: Tensor) -> None:
    raise SecateurError("a compressed model is for inference: train the masked one, then compress it")


def _register(name: str, call: Any, rows_at: int) -> None:
    """Kernels for both devices, and what tracing, autograd and vmap ask for; ``rows`` is behind so many parts."""
    full = f"secateur::{name}"
    for key in ("CPU", "CUDA"):
        _registry.impl(name, call, key)

    def fake(x: Tensor, *rest: Any) -> Tensor:
        return x.new_empty((*x.shape[:-1], rest[rows_at]))

    def each(info: object, dims: Any, x: Tensor, *rest: Any) -> tuple[Tensor, int]:
        if dims[0] is None or any(d is not None for d in tree_leaves(tuple(dims[1:]))):
            raise SecateurError("torch.vmap maps a compressed layer over its inputs, not over its weights")
        return getattr(torch.ops.secateur, name)(x.movedim(dims[0], 0), *rest), 0

    torch.library.register_fake(full, fake, lib=_registry)
    torch.library.register_autograd(full, _no_backward, lib=_registry)
    if hasattr(torch.library, "register_vmap"):  # from torch 2.5
        torch.library.register_vmap(full, each, lib=_registry)


_register("bits_linear", bits_linear, 5)
_register("semi_linear", semi_linear, 3)
