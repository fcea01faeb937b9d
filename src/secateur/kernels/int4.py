"""A dense product of values of 4 bits: ``torch.ops.secateur.dense_int4``.

Weights are integers with a scale for each group of inputs. A few tokens are multiplied in float32 by a kernel that
reads half a byte a weight. For many, weights are made bfloat16 piece by piece, or float32 where the processor does not
multiply bfloat16, and multiplied as any dense weight is. Without compiled kernels that is done for few tokens too, and
is slow.
"""

from __future__ import annotations

import ctypes
import operator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import SecateurError
from . import ops
from .library import SLACK, Int4, instructions, library

#: Inputs that share a scale, as the kernel knows them.
GROUPS = (256, 128, 64, 32)
#: Tokens up to which weights are read as they are, and how many at a time.
_FEW, _AT_ONCE = 8, 4
#: Weights that are made floats at a time.
_PIECE = 1 << 22

_registry = torch.library.Library("secateur", "FRAGMENT")
_registry.define(
    "dense_int4(Tensor x, Tensor values, Tensor scale, Tensor? zero, Tensor? bias, int activation) -> Tensor"
)


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


def floats(values: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """The weight ``(rows, cols)`` float32: codes less their zeros, times the scale of their group."""
    codes = codes_of(values).view(*scale.shape, -1).float()
    if zero is not None:
        codes -= zero[..., None].float()
    return codes.mul_(scale[..., None]).view(len(values), -1)


class _Known:
    """The parts of a weight as the kernel takes them; kept at its values, for building it costs as much as a call."""

    def __init__(self, parts: tuple[Tensor, Tensor, Tensor | None, Tensor | None], activation: int) -> None:
        values, scale, zero, bias = parts
        right = values.dtype == torch.uint8 and all(t is None or t.dtype == torch.float32 for t in (scale, bias))
        if not right or (zero is not None and zero.dtype != torch.int8):
            raise SecateurError(
                f"a compressed layer has been converted (its values are {values.dtype}, its scales {scale.dtype}): "
                "convert the model before it is compressed"
            )
        rows, cols = values.shape[0], 2 * values.shape[1]
        group = cols // max(1, scale.shape[1])
        fits = scale.shape == (rows, cols // group) and cols % group == 0 and group in GROUPS
        fits = fits and (zero is None or zero.shape == scale.shape) and (bias is None or bias.shape == (rows,))
        self.held = [t for t in parts if t is not None]
        if not fits or not all(t.is_cpu and t.is_contiguous() for t in self.held):
            raise SecateurError(f"the parts of a compressed layer of {rows} x {cols} do not fit together")
        self.parts, self.activation = parts[1:], activation
        self.addresses = [t.data_ptr() for t in self.held]
        self.held = self.held[1:]
        places = (None if t is None else t.data_ptr() for t in parts)
        self.place = ctypes.byref(Int4(rows, cols, group, activation, *places))
        self.room: dict[int, int] = {}

    def __deepcopy__(self, memo: object) -> None:
        """A copy of a tensor lies elsewhere: nothing is known of it."""

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return (type(None), ())

    def still(self, parts: tuple[Tensor, Tensor, Tensor | None, Tensor | None], activation: int) -> bool:
        """Whether it describes these parts: the same tensors, and where they were."""
        return (
            self.activation == activation
            and all(map(operator.is_, self.parts, parts[1:]))
            and self.addresses == [parts[0].data_ptr(), *map(Tensor.data_ptr, self.held)]
        )


def dense_int4(
    x: Tensor, values: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, activation: int
) -> Tensor:
    """``x W^T + b`` for a W of 4 bits, in the dtype of x.

    Args:
        x: ``(..., cols)`` of floats.
        values: of W, as `nibbles` packs them.
        scale: ``(rows, groups)`` float32.
        zero: ``(rows, groups)`` int8, the codes of zero; None where those are 0.
        activation: one of `library.ACTIVATIONS`.

    Raises:
        SecateurError: the parts were converted, or x does not fit.
    """
    rows, cols, shape = values.shape[0], 2 * values.shape[1], x.shape
    if not shape or shape[-1] != cols or not x.is_floating_point():
        ops.refuse(x, cols, -1)
    parts = (values, scale, zero, bias)
    known: _Known | None = getattr(values, "_secateur_int4", None)
    if known is None or not known.still(parts, activation):
        known = _Known(parts, activation)
        values._secateur_int4 = known  # type: ignore[attr-defined]
    n, found = x.numel() // cols, library()
    if found is None or n > _FEW:
        y = _many(x.reshape(n, cols), known, *parts[:3])
        y = y.float() if bias is None else y + bias  # float32 either way
        return (y.relu() if activation else y).view(*shape[:-1], rows).to(x.dtype)
    given = x if x.dtype == torch.float32 and x.is_contiguous() else x.contiguous().float()
    y = given.new_empty((*shape[:-1], rows))
    source, target, threads = given.data_ptr(), y.data_ptr(), torch.get_num_threads()
    for first in range(0, n, _AT_ONCE):
        part = min(_AT_ONCE, n - first)
        room = known.room.get(part)
        if room is None:
            room = known.room[part] = found.scratch_int4(known.place, part) + SLACK
        memory = ops.scratch.address(room)
        found.int4_vector(known.place, source + 4 * first * cols, part, target + 4 * first * rows, memory, threads)
    return y if y.dtype == x.dtype else y.to(x.dtype)


def _many(x: Tensor, known: _Known, values: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    small = bool({"avx512_bf16", "amx_bf16", "bf16"} & instructions())
    given, (rows, half) = x.to(torch.bfloat16 if small else torch.float32), values.shape
    step, kernels = max(1, _PIECE // (2 * half)), library()
    done: list[Tensor] = []
    for first in range(0, rows, step):
        last = min(first + step, rows)
        if kernels is None:
            of = slice(first, last)
            weight = floats(values[of], scale[of], None if zero is None else zero[of]).to(given.dtype)
        else:
            weight = given.new_empty(last - first, 2 * half)
            kernels.int4_floats(known.place, first, last, weight.data_ptr(), small, torch.get_num_threads())
        done.append(F.linear(given, weight))
    return done[0] if len(done) == 1 else torch.cat(done, 1)


def _fake(x: Tensor, values: Tensor, *rest: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], values.shape[0]))


def _each(info: object, dims: tuple[int | None, ...], x: Tensor, *rest: Any) -> tuple[Tensor, int]:
    return torch.ops.secateur.dense_int4(ops.first(dims, x), *rest), 0


_registry.impl("dense_int4", dense_int4, "CPU")
torch.library.register_fake("secateur::dense_int4", _fake, lib=_registry)
torch.library.register_autograd("secateur::dense_int4", ops.no_backward, lib=_registry)
if hasattr(torch.library, "register_vmap"):
    torch.library.register_vmap("secateur::dense_int4", _each, lib=_registry)
