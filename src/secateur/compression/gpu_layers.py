"""Linear layers whose weights are packed for GPUs: by a bit mask, or as 2:4."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError, SecateurError
from ..formats import Packed, pack
from ..formats.packed import PADDING
from ..kernels import gpu
from ..kernels.library import ACTIVATIONS
from .modules import Installed

_bits_linear, _semi_linear = torch.ops.secateur.bits_linear.default, torch.ops.secateur.semi_linear.default


def packed_for_gpu(weight: Tensor) -> Packed:
    """A weight ``(outputs, inputs)`` of float32, float16 or bfloat16 as the kernels for GPUs read it, on the CPU.

    Raises:
        RecipeError: it cannot be packed.
    """
    return pack(weight, gpu.KINDS[weight.dtype], group=gpu.GROUP, panel=gpu.PANEL).indexed(col=False, bits=True)


class GpuLinear(Installed):
    """``y = x W^T + b`` for a packed W of ``(outputs, inputs)``, by its bit mask; on the CPU it is right, and slow.

    Args:
        packed: with panels of 64 columns and a bit mask; its values are float32, float16 or bfloat16.
        bias: ``(outputs,)``, or None; it takes the dtype of the values.
        whole: keep the dense weight too, for more tokens than the kernel takes. Without it they wait for the weight to
            be unpacked at each call.

    Raises:
        ModelError: the matrix is packed in another way.
    """

    values: Tensor
    start: Tensor
    bits: Tensor
    dense: Tensor | None

    def __init__(self, packed: Packed, bias: Tensor | None, activation: str = "none", whole: bool = False) -> None:
        if packed.panel != gpu.PANEL or packed.bits is None or packed.values.dtype not in gpu.KINDS:
            raise ModelError(f"kernels for GPUs read bit masks of {gpu.PANEL} columns and float values")
        super().__init__(packed.rows, packed.cols, None, activation)
        self.group = packed.group
        for name, part in (("values", packed.values), ("start", packed.start), ("bits", packed.bits)):
            self.register_buffer(name, part)
        if bias is not None:
            self.bias = bias.detach().to(packed.values, copy=True)
        self.register_buffer("dense", self._unpacked() if whole else None, persistent=False)
        self._seen = self._versions()

    @property
    def form(self) -> str:
        """How it is stored: ``bits`` or ``bits+dense``."""
        return "bits" if self.dense is None else "bits+dense"

    @property
    def dtype(self) -> torch.dtype:
        """Of the values."""
        return self.values.dtype

    @property
    def packed(self) -> Packed:
        """The weight, on the CPU."""
        values, start, bits = self.values.cpu(), self.start.cpu(), self.bits.cpu()
        return Packed(self.rows, self.cols, self.group, gpu.PANEL, values, start, None, bits)

    @property
    def stored(self) -> int:
        """How many parameters are kept: values and biases."""
        return self.values.numel() - PADDING + (0 if self.bias is None else self.rows)

    @property
    def weight(self) -> Tensor:
        """The weight ``(outputs, inputs)``, dense and where the layer is: a copy."""
        return self._unpacked()

    def parts(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a file keeps, but for the bias."""
        stored, facts = self.packed.stored()
        return stored, {**facts, "index": ["bits"], "form": self.form}

    def _unpacked(self) -> Tensor:
        if not gpu.runs_here(self.values):
            return self.packed.dense().to(self.values.device)
        return gpu.unpack(self.values, self.start, self.bits, self.rows, self.cols, self.group)

    def _versions(self) -> list[tuple[int, int]]:
        parts = (self.values, self.start, self.bits)  # a dense weight may be a copy of the values
        return [(id(t), 0 if t.is_inference() else t._version) for t in parts]

    def _arguments(self) -> tuple[Any, ...]:
        if not torch.compiler.is_compiling() and self._versions() != self._seen:
            self._accept()
        kept = self._buffers
        parts = (kept["values"], kept["start"], kept["bits"], kept["dense"], kept["bias"])
        return (*parts, self.rows, self.cols, self.group, ACTIVATIONS[self.activation])

    def _accept(self) -> None:
        """What was replaced is checked, for a kernel trusts its indexes; this waits for the GPU."""
        self.packed.check()
        if self.dense is not None:
            self.dense = self._unpacked()
        self._seen = self._versions()

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self._accept()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        _stays(fn, self.values, ("cpu", "cuda"))
        known = self._versions() == self._seen
        found = nn.Module._apply(self, fn, recurse)
        if known:  # what is moved is not changed
            self._seen = self._versions()
        return found

    def forward(self, x: Tensor) -> Tensor:
        """``(..., inputs)`` to ``(..., outputs)``, in the dtype of x; sums are float32."""
        found: Tensor = _bits_linear(x, *self._arguments())
        return found

    def extra_repr(self) -> str:
        """What print(model) shows."""
        share = 1 - (self.values.numel() - PADDING) / (self.rows * self.cols)
        return (
            f"{self.cols} to {self.rows}, {share:.1%} zeros, {gpu.KINDS[self.dtype]} by {self.form}, "
            f"bias={self.bias is not None}, activation={self.activation}"
        )


class SemiLinear(Installed):
    """``y = x W^T + b`` for a 2:4 W of ``(outputs, inputs)``, which torch multiplies; on the CPU right, and slow.

    Args:
        weight: float16 or bfloat16, on the device where the layer is to be; see `kernels.gpu.compress_semi`.
        bias: ``(outputs,)``, or None.

    Raises:
        SecateurError: the weight is not 2:4, or its device does not multiply such weights.
    """

    form = "2:4"
    kept: Tensor
    meta: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, activation: str = "none") -> None:
        kept, meta = gpu.compress_semi(weight)
        super().__init__(weight.shape[0], weight.shape[1], None, activation)
        self.register_buffer("kept", kept)
        self.register_buffer("meta", meta)
        if bias is not None:
            self.bias = bias.detach().to(weight, copy=True)

    @property
    def dtype(self) -> torch.dtype:
        """Of the values."""
        return self.kept.dtype

    @property
    def packed(self) -> Packed:
        """The weight as a file keeps it, on the CPU."""
        return packed_for_gpu(self.weight)

    @property
    def stored(self) -> int:
        """How many parameters are kept: two of four, and biases."""
        return self.rows * self.cols // 2 + (0 if self.bias is None else self.rows)

    @property
    def weight(self) -> Tensor:
        """The weight ``(outputs, inputs)``, dense and where the layer is: a copy."""
        return gpu.dense_semi(self.kept, self.meta, self.rows, self.cols)

    def parts(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a file keeps, but for the bias: the same format as for bit masks."""
        stored, facts = self.packed.stored()
        return stored, {**facts, "index": ["bits"], "form": self.form}

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        _stays(fn, self.kept, ("cpu", "cuda") if self.meta is not None else ("cuda",))
        return nn.Module._apply(self, fn, recurse)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., inputs)`` to ``(..., outputs)``, in the dtype of x."""
        parts = (self.kept, self.meta, self.bias)
        found: Tensor = _semi_linear(x, *parts, self.rows, self.cols, ACTIVATIONS[self.activation])
        return found

    def extra_repr(self) -> str:
        """What print(model) shows."""
        return (
            f"{self.cols} to {self.rows}, 2:4 of {gpu.KINDS[self.dtype]}, bias={self.bias is not None}, "
            f"activation={self.activation}"
        )


def _stays(fn: Any, own: Tensor, devices: tuple[str, ...]) -> None:
    """Refuse a conversion that would leave the kernels behind."""
    probe = fn(own.new_zeros(1))
    if probe.dtype != own.dtype or probe.device.type not in devices:
        raise ModelError(
            f"a compressed layer stays {own.dtype} on {' or '.join(devices)}: it cannot become {probe.dtype} on "
            f"{probe.device}; convert the dense model, then compress it"
        )


def gpu_for(layers: Mapping[str, Mapping[str, Any]]) -> tuple[str | None, str]:
    """Where a saved model belongs by its layers, and why they cannot stay as they are; None: they are for the CPU."""
    forms = {str(facts["form"]) for facts in layers.values() if "form" in facts}
    if not forms:
        return None, ""
    if not torch.cuda.is_available():
        return "cpu", "it is for GPUs, and there is none here"
    if forms - {"2:4"} and gpu.kernels() is None:
        return "cuda", f"its kernels are Triton kernels ({gpu.TRITON})"
    if "2:4" in forms:
        try:
            gpu.compress_semi(torch.zeros(gpu.SEMI_ROWS, gpu.SEMI_COLS, dtype=torch.float16, device="cuda"))
        except SecateurError as error:
            return "cuda", str(error)
    return "cuda", ""


def restored(packed: Packed, bias: Tensor | None, activation: str, form: str, device: str) -> Installed:
    """A layer from what a file kept, on a device.

    Raises:
        ValueError: the form is not known, or the matrix is not packed for it.
        SecateurError: the device does not multiply it.
    """
    if form not in ("bits", "bits+dense", "2:4") or packed.panel != gpu.PANEL or packed.values.dtype not in gpu.KINDS:
        raise ValueError(f"a layer by '{form}'")
    if form == "2:4":
        return SemiLinear(packed.dense().to(device), bias, activation).eval()
    layer = GpuLinear(packed.indexed(col=False, bits=True), bias, activation).eval().to(device)
    if form == "bits+dense":
        layer.dense = layer.weight
    return layer
