"""A dense product of values of 4 bits: ``torch.ops.secateur.dense_int4``, over torch's own kernel.

Weights are integers with a scale for each group of inputs; activations are rounded to bfloat16. A few tokens are
multiplied by torch's kernel, which reads half a byte a weight. For many, weights are made bfloat16 piece by piece, or
float32 where the processor does not multiply bfloat16, and multiplied as any dense weight is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import SecateurError
from . import ops
from .library import instructions
from .quantized import state

#: Inputs that share a scale, as torch's kernel knows them.
GROUPS = (256, 128, 64, 32)
#: Tokens up to which weights are read as they are, and weights that are made floats at a time beyond that.
_FEW, _PIECE = 32, 1 << 22
_ROWS = 16  # torch's kernel takes rows by so many

_registry = torch.library.Library("secateur", "FRAGMENT")
_registry.define("dense_int4(Tensor x, Tensor values, Tensor scale, Tensor? zero, Tensor? bias) -> Tensor")


def available() -> bool:
    """Whether this torch multiplies values of 4 bits on the CPU."""
    aten = torch.ops.aten
    return all(hasattr(aten, n) for n in ("_convert_weight_to_int4pack_for_cpu", "_weight_int4pack_mm_for_cpu"))


def nibbles(codes: Tensor) -> Tensor:
    """Codes ``(rows, cols)`` of -8 to 7 as ``(rows, cols / 2)`` uint8, raised by 8, the first one of two below.

    >>> nibbles(torch.tensor([[-8, 7]], dtype=torch.int8)).tolist()
    [[240]]
    """
    raised = (codes + 8).to(torch.uint8)
    return raised[:, 0::2] | (raised[:, 1::2] << 4)


def codes_of(values: Tensor) -> Tensor:
    """The inverse of `nibbles`: ``(rows, cols)`` int8."""
    return torch.stack([values & 15, values >> 4], -1).view(values.shape[0], -1).to(torch.int8) - 8


def floats(values: Tensor, scale: Tensor, zero: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The weight ``(rows, cols)``: codes less their zeros, times the scale of their group."""
    codes = codes_of(values).view(*scale.shape, -1).to(dtype)
    if zero is not None:
        codes -= zero[..., None].to(dtype)
    return codes.mul_(scale[..., None].to(dtype)).view(len(values), -1)


class _Known:
    """The values in the order in which torch's kernel reads them, kept with them; not copied, not saved."""

    def __init__(self, values: Tensor, scale: Tensor, zero: Tensor | None) -> None:
        pad = -len(values) % _ROWS
        codes = F.pad(codes_of(values).int() + 8, (0, 0, 0, pad))
        moved = torch.zeros_like(scale) if zero is None else -zero.float() * scale
        both = torch.stack([F.pad(t, (0, 0, 0, pad)).t() for t in (scale, moved)], -1)
        self.values = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        self.scales = both.to(torch.bfloat16).contiguous()
        self.state = state(values, scale, zero)

    def __deepcopy__(self, memo: object) -> None:
        """A copy of the values makes its own."""

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return (type(None), ())


def dense_int4(x: Tensor, values: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None) -> Tensor:
    """``x W^T + b`` for a W of 4 bits.

    Args:
        x: ``(..., cols)`` of floats.
        values: of W, as `nibbles` packs them.
        scale: ``(rows, groups)`` float32.
        zero: ``(rows, groups)`` int8, the codes of zero; None where those are 0.

    Raises:
        SecateurError: the parts were converted, or x does not fit.
    """
    if values.dtype != torch.uint8 or scale.dtype != torch.float32 or (zero is not None and zero.dtype != torch.int8):
        raise SecateurError(
            f"a compressed layer has been converted (its values are {values.dtype}, its scales {scale.dtype}): convert "
            "the model before it is compressed"
        )
    rows, cols = values.shape[0], 2 * values.shape[1]
    ops.refuse(x, cols, -1)
    given = x.reshape(-1, cols).to(torch.bfloat16)
    if available() and 0 < len(given) <= _FEW:
        known: _Known | None = getattr(values, "_secateur_int4", None)
        if known is None or known.state != state(values, scale, zero):
            known = _Known(values, scale, zero)
            values._secateur_int4 = known  # type: ignore[attr-defined]
        y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            given.contiguous(), known.values, cols // scale.shape[1], known.scales
        )[:, :rows]
    else:
        y = _many(given, values, scale, zero)
    y = y.float() if bias is None else y + bias  # float32 either way
    return y.view(*x.shape[:-1], rows).to(x.dtype)


def _many(x: Tensor, values: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    dtype = torch.bfloat16 if {"avx512_bf16", "amx_bf16", "bf16"} & instructions() else torch.float32
    given, step = x.to(dtype), max(1, _PIECE // (2 * values.shape[1]))
    parts = zip(
        values.split(step), scale.split(step), scale.split(step) if zero is None else zero.split(step), strict=True
    )
    found = [F.linear(given, floats(v, s, None if zero is None else z, dtype)) for v, s, z in parts]
    return found[0] if len(found) == 1 else torch.cat(found, 1)


def _fake(x: Tensor, values: Tensor, *rest: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], values.shape[0]))


def _each(info: object, dims: tuple[int | None, ...], x: Tensor, *rest: Any) -> tuple[Tensor, int]:
    return torch.ops.secateur.dense_int4(ops.first(dims, x), *rest), 0


_registry.impl("dense_int4", dense_int4, "CPU")
torch.library.register_fake("secateur::dense_int4", _fake, lib=_registry)
torch.library.register_autograd("secateur::dense_int4", ops.no_backward, lib=_registry)
if hasattr(torch.library, "register_vmap"):
    torch.library.register_vmap("secateur::dense_int4", _each, lib=_registry)
