"""The kernels as operators of torch: ``torch.ops.secateur.sparse_linear`` and ``sparse_conv2d``.

They take the parts of a packed matrix (`formats.Packed`), which whoever calls them has checked: a kernel trusts its
indexes. Without compiled kernels the same operators multiply densely: right, and slow.
"""

from __future__ import annotations

import ctypes
import operator
import threading
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from ..errors import SecateurError
from ..formats.packed import MOST_OF_QUADS, PADDING, Packed, quad_words
from .library import DYNAMIC, KINDS, SLACK, Convolution, Library, Matrix, library

#: Tokens up to which each weight is read once for all of them.
FEW = 4

_PARTS = (
    "Tensor x, Tensor values, Tensor start, Tensor? col, Tensor? bits, Tensor? quad, Tensor? scale, "
    "Tensor? bias, int rows, int cols, int group, int panel, int activation, bool dynamic"
)
#: Tokens (whole blocks of 64 and 128), and floats of images, that are laid out at a time, whatever the size of a batch.
_TOKENS, _FLOATS = 2048, 8 << 20
#: Multiplications for each input that is copied together, below which a convolution reads inputs where they are.
_COPIED = 2.0
#: Rows that a task of a convolution computes at a time, at most (``Piece`` of the kernels).
_ROWS = 256

_registry = torch.library.Library("secateur", "DEF")
_registry.define(f"sparse_linear({_PARTS}) -> Tensor")
_registry.define(f"sparse_conv2d({_PARTS}, int[] kernel, int[] stride, int[] padding, int[] dilation) -> Tensor")

_Some = Tensor | None
_Parts = tuple[Tensor, Tensor, _Some, _Some, _Some, _Some, _Some]


def _address(tensor: _Some) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class _Known:
    """The parts of a matrix as the kernels take them; kept at its values, for building it costs as much as a call."""

    def __init__(
        self, parts: _Parts, rows: int, cols: int, group: int, panel: int, activation: int, dynamic: bool
    ) -> None:
        values, start, col, bits, quad, scale, bias = parts
        kind = DYNAMIC if dynamic and values.dtype == torch.int8 else KINDS.get(values.dtype)
        whole = ((start, torch.int32), (quad, torch.int32), (col, torch.uint8), (bits, torch.uint8))
        indexes = all(t is None or t.dtype == dtype for t, dtype in whole)
        if kind is None or not indexes or any(t is not None and t.dtype != torch.float32 for t in (scale, bias)):
            raise SecateurError(
                f"a compressed layer has been converted (its values are {values.dtype}): kernels read float32, "
                "bfloat16 and int8 values with float32 scales; convert the model before it is compressed"
            )
        if not _fits(parts, rows, cols, group, panel) or (quad is not None and kind != DYNAMIC):
            raise SecateurError(f"the parts of a compressed layer of {rows} x {cols} do not fit together")
        self.parts = parts[1:]
        self.held = [t for t in parts[1:] if t is not None]
        self.addresses = [values.data_ptr(), *map(Tensor.data_ptr, self.held)]
        self.facts = (rows, cols, group, panel, activation, dynamic)
        self.matrix = Matrix(rows, cols, group, panel, kind, activation, *map(_address, parts))
        self.place = ctypes.byref(self.matrix)
        self.scratch: dict[tuple[bool, int], int] = {}

    def __deepcopy__(self, memo: object) -> None:
        """A copy of a tensor lies elsewhere: nothing is known of it."""

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return (type(None), ())

    def still(self, parts: _Parts, facts: tuple[int, ...]) -> bool:
        """Whether it describes these parts: the same tensors, and where they were (``t.data = other`` moves one)."""
        return (
            self.facts == facts
            and all(map(operator.is_, self.parts, parts[1:]))
            and self.addresses == [parts[0].data_ptr(), *map(Tensor.data_ptr, self.held)]
        )


def _fits(parts: _Parts, rows: int, cols: int, group: int, panel: int) -> bool:
    """Whether the sizes are those of one matrix: a kernel would read past what is too short."""
    values, start, col, bits, quad, scale, bias = parts
    if min(rows, cols, group) < 1 or group > 64 or panel not in (64, 128, 192, 256) or (col is None and bits is None):
        return False
    runs, nonzeros = rows * -(-cols // panel), values.numel() - PADDING
    sizes = ((values, nonzeros + PADDING), (start, runs + 1), (col, nonzeros), (bits, runs * panel // 8))
    right = nonzeros >= 0 and all(
        t is None or (t.numel() == size and t.is_contiguous() and t.is_cpu)
        for t, size in (*sizes, (scale, rows), (bias, rows))
    )
    if quad is not None and right:
        head = rows + runs + 1
        right = bits is not None and cols <= MOST_OF_QUADS and quad.dim() == 1 and quad.is_contiguous() and quad.is_cpu
        right = right and len(quad) >= head and len(quad) == head + quad_words(int(quad[head - 1]))
    return right and int(start[-1]) == nonzeros


def _matrix(
    values: Tensor, start: Tensor, col: _Some, bits: _Some, quad: _Some, scale: _Some, bias: _Some,
    rows: int, cols: int, group: int, panel: int, activation: int, dynamic: bool,
) -> _Known:  # fmt: skip
    """The parts as the kernels take them.

    Raises:
        SecateurError: a part was converted or moved after it was packed.
    """
    parts = (values, start, col, bits, quad, scale, bias)
    facts = (rows, cols, group, panel, activation, dynamic)
    known: _Known | None = getattr(values, "_secateur_matrix", None)
    if known is None or not known.still(parts, facts):
        known = _Known(parts, *facts)
        values._secateur_matrix = known  # type: ignore[attr-defined]
    return known


def refuse(x: Tensor, cols: int, dim: int) -> None:
    """Raise SecateurError unless x is a tensor of floats with ``cols`` entries along ``dim``."""
    if not x.is_floating_point():
        raise SecateurError(f"a compressed layer takes floats, not {x.dtype}")
    if not x.dim():
        raise SecateurError(f"a compressed layer of {cols} inputs was given a single number")
    if x.shape[dim] != cols:
        raise SecateurError(f"a compressed layer of {cols} inputs was given {x.shape[dim]} (shape {tuple(x.shape)})")


def direct(x: Tensor) -> bool:
    """Whether nothing watches operators now, so that a kernel may be called without one: calling costs more than work.

    False under torch.compile, export, tracing, any dispatch mode, torch.func, and where a gradient is wanted.
    """
    return (
        type(x) is Tensor
        and x.is_cpu
        and x.layout is torch.strided
        and not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
        and not (x.requires_grad and torch.is_grad_enabled())
    )


class _Scratch(threading.local):
    """Memory that a kernel fills and nobody else reads, kept from call to call."""

    held = torch.empty(0, device="cpu")

    def address(self, floats: int) -> int:
        if self.held.numel() < floats:
            self.held = torch.empty(floats, dtype=torch.float32, device="cpu")
        return self.held.data_ptr()


scratch = _Scratch()


def linear(
    x: Tensor, values: Tensor, start: Tensor, col: _Some, bits: _Some, quad: _Some, scale: _Some, bias: _Some,
    rows: int, cols: int, group: int, panel: int, activation: int, dynamic: bool,
) -> Tensor:  # fmt: skip
    """``secateur::sparse_linear``: ``(..., cols)`` to ``(..., rows)``, in the dtype of x."""
    shape = x.shape
    if not shape or shape[-1] != cols or not x.is_floating_point():
        refuse(x, cols, -1)
    known = _matrix(values, start, col, bits, quad, scale, bias, rows, cols, group, panel, activation, dynamic)
    given = x if x.dtype == torch.float32 and x.is_contiguous() else x.contiguous().float()
    n = given.numel() // cols
    y = given.new_empty((*shape[:-1], rows))
    found = library()
    if found is None:
        weight = Packed(rows, cols, group, panel, values, start, col, bits, None, scale).dense().float()
        y = _activated(F.linear(given, weight, bias), activation)
    elif n:
        few = n <= FEW or (col is None and quad is None)
        multiply, need = (found.vector, found.scratch_vector) if few else (found.linear, found.scratch_linear)
        count = min(FEW if few else _TOKENS, n)
        room = known.scratch.get((few, count))
        if room is None:
            room = known.scratch[few, count] = need(known.place, count) + SLACK
        memory, threads = scratch.address(room), torch.get_num_threads()
        source, target = given.data_ptr(), y.data_ptr()
        for first in range(0, n, count):
            part = min(count, n - first)
            multiply(known.place, source + 4 * first * cols, part, target + 4 * first * rows, memory, threads)
    return y if y.dtype == x.dtype else y.to(x.dtype)


def conv2d(
    x: Tensor, values: Tensor, start: Tensor, col: _Some, bits: _Some, quad: _Some, scale: _Some, bias: _Some,
    rows: int, cols: int, group: int, panel: int, activation: int, dynamic: bool,
    kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
) -> Tensor:  # fmt: skip
    """``secateur::sparse_conv2d``: ``(batch, channels, height, width)``; the weight is ``(rows, columns)``."""
    channels, rest = divmod(cols, kernel[0] * kernel[1])
    if x.dim() != 4 or rest:
        raise SecateurError(
            f"a sparse convolution of {cols} columns and kernel {tuple(kernel)} takes (batch, channels, height, "
            f"width), not {tuple(x.shape)}"
        )
    refuse(x, channels, 1)
    sizes = _out_sizes(x.shape[2:], kernel, stride, padding, dilation)
    if min(sizes) <= 0:
        raise SecateurError(f"a sparse convolution of kernel {tuple(kernel)} was given only {tuple(x.shape[2:])}")
    place = _matrix(values, start, col, bits, quad, scale, bias, rows, cols, group, panel, activation, dynamic).place
    found = library()
    if found is None or col is None:
        weight = Packed(rows, cols, group, panel, values, start, col, bits, None, scale).dense().float()
        weight = weight.view(rows, channels, *kernel)
        out = F.conv2d(x.float(), weight, bias, tuple(stride), tuple(padding), tuple(dilation))
        return _activated(out, activation).to(x.dtype).contiguous()
    y = x.new_empty((x.shape[0], rows, *sizes), dtype=torch.float32)
    if not y.numel():
        return y.to(x.dtype)
    room = 2 * max(1, x[0].numel())  # about what one image takes when it is laid out
    how: Any = [tuple(pair) for pair in (kernel, stride, padding, dilation)]
    nonzeros = values.numel() - PADDING
    for part, target in zip(x.split(max(1, _FLOATS // room)), y.split(max(1, _FLOATS // room)), strict=True):
        given = part.float().contiguous()
        about = _geometry(found, tuple(given.shape), rows, nonzeros, tuple(sizes), *how, _COPIED)
        memory = scratch.address(about.room)
        found.convolution(place, about.place, given.data_ptr(), target.data_ptr(), memory, torch.get_num_threads())
    return y.to(x.dtype)


class _Geometry:
    """A convolution of images of one size as the kernels take it."""

    def __init__(self, about: Convolution, offsets: Tensor, room: int) -> None:
        self.about, self.offsets, self.room = about, offsets, room
        self.about.offset = offsets.data_ptr()
        self.place = ctypes.byref(self.about)


_Pair = tuple[int, int]


@lru_cache(maxsize=256)
def _geometry(
    found: Library, shape: Sequence[int], weight_rows: int, nonzeros: int, sizes: _Pair, kernel: _Pair, stride: _Pair,
    padding: _Pair, dilation: _Pair, copied: float,
) -> _Geometry:  # fmt: skip
    """How images are read: as they are, or laid out as one flat line for each channel and phase of the stride.

    Position ``(h, w)`` of every kernel position lies at a fixed distance from output ``(h, w)`` then.
    """
    batch, channels, high, wide = shape
    phases = (1 if kernel[0] == 1 else stride[0], 1 if kernel[1] == 1 else stride[1])  # others are never read
    rows = (kernel[0] - 1) * dilation[0] // phases[0] + sizes[0]
    columns = (kernel[1] - 1) * dilation[1] // phases[1] + sizes[1]
    plain = not any(padding) and stride == (1, 1)
    pitch = wide if plain else columns
    about = Convolution(None, batch, channels * phases[0] * phases[1], high * wide, *sizes, pitch)
    if not plain:
        about.length = _spread(rows * pitch)
        about.laid, about.in_h, about.in_w = 1, high, wide
        about.stride_h, about.stride_w = stride
        about.phase_h, about.phase_w = phases
        about.pad_h, about.pad_w = padding
    offsets = _offsets(channels, kernel, phases, dilation, about.length, pitch)
    aligned = not bool((offsets % found.lanes).any())
    pays = nonzeros >= copied * offsets.numel() * -(-weight_rows // _ROWS)
    small = (sizes[0] - 1) * pitch + sizes[1] < found.block_convolution(ctypes.byref(about))
    about.copied = small or (pays and not aligned)
    return _Geometry(about, offsets, found.scratch_convolution(ctypes.byref(about)) + SLACK)


def _spread(floats: int) -> int:
    """So many floats or a few more: an odd number of cache lines, for even ones would fall on few places of a cache."""
    return (-(-floats // 16) | 1) * 16


def _offsets(channels: int, kernel: _Pair, phases: _Pair, dilation: _Pair, line: int, pitch: int) -> Tensor:
    """``(columns,)``: where each column of the weight, a channel at a kernel position, finds its input."""
    c = torch.arange(channels, device="cpu")[:, None, None] * (phases[0] * phases[1])
    i, j = (torch.arange(n, device="cpu") * step for n, step in zip(kernel, dilation, strict=True))
    i, j = i[None, :, None], j[None, None]
    lines = c + i % phases[0] * phases[1] + j % phases[1]
    found = lines * line + i // phases[0] * pitch + j // phases[1]
    if int(found.max()) >= 1 << 31:
        raise SecateurError(
            f"an image of {channels} channels and {line} positions is more than a sparse convolution takes"
        )
    return found.reshape(-1).to(torch.int32).contiguous()


def _out_sizes(
    size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> list[int]:
    return [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(size, kernel, stride, padding, dilation, strict=True)
    ]


def _activated(y: Tensor, activation: int) -> Tensor:
    return y.relu() if activation else y


def _fake_linear(x: Tensor, *rest: object) -> Tensor:
    rows = rest[7]
    assert isinstance(rows, int | torch.SymInt)
    return x.new_empty((*x.shape[:-1], rows))


def _fake_conv2d(x: Tensor, *rest: object) -> Tensor:
    rows, kernel, stride, padding, dilation = rest[7], *rest[13:]
    return x.new_empty((x.shape[0], rows, *_out_sizes(x.shape[2:], kernel, stride, padding, dilation)))  # type: ignore[arg-type]


def no_backward(context: object, *gradients: Any) -> None:
    """What every operator here says to a gradient."""
    raise SecateurError("a compressed model is for inference: train the masked one, then compress it")


_registry.impl("sparse_linear", linear, "CPU")
_registry.impl("sparse_conv2d", conv2d, "CPU")
torch.library.register_fake("secateur::sparse_linear", _fake_linear, lib=_registry)
torch.library.register_fake("secateur::sparse_conv2d", _fake_conv2d, lib=_registry)
torch.library.register_autograd("secateur::sparse_linear", no_backward, lib=_registry)
torch.library.register_autograd("secateur::sparse_conv2d", no_backward, lib=_registry)


def _each_linear(info: object, dims: Sequence[int | None], x: Tensor, *rest: Any) -> tuple[Tensor, int]:
    return torch.ops.secateur.sparse_linear(first(dims, x), *rest), 0


def _each_conv2d(info: object, dims: Sequence[int | None], x: Tensor, *rest: Any) -> tuple[Tensor, int]:
    given = first(dims, x)
    found = torch.ops.secateur.sparse_conv2d(given.flatten(0, 1), *rest)
    return found.unflatten(0, given.shape[:2]), 0


def first(dims: Sequence[int | None], x: Tensor) -> Tensor:
    """The input of a mapped operator with the mapped dimension in front; weights are not mapped over."""
    if dims[0] is None or any(d is not None for d in tree_leaves(tuple(dims[1:]))):
        raise SecateurError("torch.vmap maps a compressed layer over its inputs, not over its weights")
    return x.movedim(dims[0], 0)


if hasattr(torch.library, "register_vmap"):  # from torch 2.5; what torch does without a rule has crashed
    torch.library.register_vmap("secateur::sparse_linear", _each_linear, lib=_registry)
    torch.library.register_vmap("secateur::sparse_conv2d", _each_conv2d, lib=_registry)
