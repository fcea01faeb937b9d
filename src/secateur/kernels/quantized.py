"""A dense product of int8 values: ``torch.ops.secateur.dense_int8``, over torch's own quantized kernels.

Where zeros are few, a dense product of small numbers may be faster than a sparse one. Activations become eight bits
with one scale a call, as torch does it; seven bits where the processor's instructions would overflow (no VNNI).
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import SecateurError
from ..formats.packed import steps
from . import ops
from .library import instructions

_registry = torch.library.Library("secateur", "FRAGMENT")
_registry.define("dense_int8(Tensor x, Tensor values, Tensor scale, Tensor? bias) -> Tensor")


def available() -> bool:
    """Whether this torch multiplies int8 values on this processor."""
    return torch.backends.quantized.engine in ("x86", "fbgemm", "onednn")


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """``(rows, cols)`` of floats as int8 and ``(rows,)`` float32 scales: symmetric, rounded to nearest.

    A row that has been quantized already keeps its integers.
    """
    scale = steps(weight)
    return (weight.float() / scale[:, None]).round().clamp(-127, 127).to(torch.int8), scale


class _Known:
    """The values in the order in which torch's kernels read them, kept with them; not copied, not saved."""

    def __init__(self, values: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        with warnings.catch_warnings():  # torch calls its quantized tensors deprecated; their kernels are not
            warnings.simplefilter("ignore")
            zero = torch.zeros(len(scale), dtype=torch.long, device="cpu")
            made = torch._make_per_channel_quantized_tensor(values, scale.double(), zero, 0)
        self.packed: Any = torch.ops.quantized.linear_prepack(made, bias)
        self.parts = _state(values, scale, bias)

    def __deepcopy__(self, memo: object) -> None:
        """A copy of the values makes its own."""

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return (type(None), ())


def _state(*parts: Tensor | None) -> list[tuple[int, int]]:
    """Which tensors they are, and how often they have been changed."""
    return [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in parts if t is not None]


def dense_int8(x: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """``x W^T + b`` for W of int8 ``values (rows, cols)`` times ``scale (rows,)``.

    Args:
        x: ``(..., cols)`` of floats. Where one is not finite the product is computed in floats.

    Raises:
        SecateurError: the parts were converted, or x does not fit.
    """
    if values.dtype != torch.int8 or scale.dtype != torch.float32:
        raise SecateurError(
            f"a compressed layer has been converted (its values are {values.dtype}): convert the model before it is "
            "compressed"
        )
    ops.refuse(x, values.shape[1], -1)
    given = x.float().contiguous()
    if not available() or not bool(given.sum().isfinite()):
        return F.linear(given, values.float() * scale[:, None], bias).to(x.dtype)
    known: _Known | None = getattr(values, "_secateur_dense", None)
    if known is None or known.parts != _state(values, scale, bias):
        known = _Known(values, scale, bias)
        values._secateur_dense = known  # type: ignore[attr-defined]
    narrow = not {"avx512_vnni", "avx_vnni"} & instructions()
    found: Tensor = torch.ops.quantized.linear_dynamic(given, known.packed, narrow)
    return found.to(x.dtype)


def _fake(x: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], values.shape[0]))


def _each(info: object, dims: tuple[int | None, ...], x: Tensor, *rest: Any) -> tuple[Tensor, int]:
    return torch.ops.secateur.dense_int8(ops.first(dims, x), *rest), 0


_registry.impl("dense_int8", dense_int8, "CPU")
torch.library.register_fake("secateur::dense_int8", _fake, lib=_registry)
torch.library.register_autograd("secateur::dense_int8", ops.no_backward, lib=_registry)
if hasattr(torch.library, "register_vmap"):
    torch.library.register_vmap("secateur::dense_int8", _each, lib=_registry)
