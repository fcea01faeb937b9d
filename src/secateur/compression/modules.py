"""Layers whose weights are packed: same forward, same outputs, no zeros."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..formats import Packed
from ..kernels import ops
from ..kernels.library import ACTIVATIONS

_linear, _conv2d = torch.ops.secateur.sparse_linear.default, torch.ops.secateur.sparse_conv2d.default
_INDEXES = ("col", "bits", "quad")
_PARTS = ("values", "start", *_INDEXES, "scale")
#: What a convolution has besides a matrix.
GEOMETRY = ("kernel", "stride", "padding", "dilation")


class Installed(nn.Module):
    """A layer in the place of another: float32 arithmetic on the CPU, for inference.

    Attributes:
        rows, cols: outputs and inputs, of a convolution the inputs at every position of the kernel.
        bias: ``(rows,)`` float32, or None.
        activation: what comes behind it: ``none`` or ``relu``.
    """

    bias: Tensor | None

    def __init__(self, rows: int, cols: int, bias: Tensor | None, activation: str) -> None:
        super().__init__()
        self.rows, self.cols, self.activation = rows, cols, activation
        self.register_buffer("bias", None if bias is None else bias.detach().float().clone())

    @property
    def weight(self) -> Tensor:
        """The weight, dense and in float32: a copy, so changing it changes nothing."""
        raise NotImplementedError

    @property
    def stored(self) -> int:
        """How many parameters are kept: values and biases."""
        raise NotImplementedError

    @property
    def nonzeros(self) -> int:
        """How many of those are not zero."""
        return self.stored

    @property
    def unseen_bytes(self) -> int:
        """Bytes that are held beside the buffers."""
        return 0

    def parts(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a file keeps, but for the bias: tensors and facts."""
        raise NotImplementedError

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        probe = fn(torch.zeros(1))
        if probe.dtype != torch.float32 or probe.device.type != "cpu":
            raise ModelError(
                f"a compressed layer stays in float32 arithmetic on the CPU: it cannot become {probe.dtype} on "
                f"{probe.device}; convert the dense model, then compress it"
            )
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]


class Sparse(Installed):
    """What sparse layers share: the parts of a packed matrix as buffers, and that they stay together."""

    values: Tensor
    start: Tensor
    col: Tensor | None
    bits: Tensor | None
    quad: Tensor | None
    scale: Tensor | None

    def __init__(self, packed: Packed, bias: Tensor | None, activation: str = "none") -> None:
        super().__init__(packed.rows, packed.cols, None, activation)
        self.group, self.panel, self.dynamic = packed.group, packed.panel, packed.dynamic
        del self.bias  # the buffers lie in the order in which the operators take them
        for name in _PARTS:
            self.register_buffer(name, getattr(packed, name))
        self.register_buffer("bias", None if bias is None else bias.detach().float().clone())
        self._facts = (self.rows, self.cols, self.group, self.panel, ACTIVATIONS[activation], self.dynamic)
        self._seen = self._versions()

    @property
    def packed(self) -> Packed:
        """The weight."""
        parts = {name: getattr(self, name) for name in _PARTS}
        return Packed(self.rows, self.cols, self.group, self.panel, **parts, dynamic=self.dynamic)

    @property
    def stored(self) -> int:
        """How many parameters are kept: values and biases."""
        return self.packed.nonzeros + (0 if self.bias is None else self.rows)

    @property
    def weight(self) -> Tensor:
        """The weight, dense: a copy, so changing it changes nothing."""
        return self.packed.dense()

    def parts(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a file keeps, but for the bias: the smaller index, and which of them there were."""
        stored, facts = self.packed.stored()
        return stored, {**facts, "index": [key for key in _INDEXES if getattr(self, key) is not None]}

    def _versions(self) -> list[tuple[int, int]]:
        kept = self._buffers
        watched = {key: kept[key] for key in ("start", *_INDEXES)}
        if kept["quad"] is not None:  # it holds the values once more
            watched["values"] = kept["values"]
        return [
            (t.data_ptr() if key == "values" else id(t), 0 if t.is_inference() else t._version)
            for key, t in watched.items()
            if t is not None
        ]

    def _arguments(self) -> tuple[Any, ...]:
        if not torch.compiler.is_compiling() and self._versions() != self._seen:
            self.packed.check()  # a kernel trusts its indexes
            self._seen = self._versions()
        return (*self._buffers.values(), *self._facts)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self.packed.check()

    def extra_repr(self) -> str:
        """What print(model) shows."""
        kinds = [name for name in _INDEXES if getattr(self, name) is not None]
        values = f"{str(self.values.dtype)[6:]}{'-dynamic' if self.dynamic else ''} by {' and '.join(kinds)}"
        return (
            f"{self.cols} to {self.rows}, {1 - self.packed.density:.1%} zeros, {values}, "
            f"bias={self.bias is not None}, activation={self.activation}"
        )


class SparseLinear(Sparse):
    """``y = x W^T + b`` for a packed W of ``(outputs, inputs)``."""

    def forward(self, x: Tensor) -> Tensor:
        """``(..., inputs)`` to ``(..., outputs)``, in the dtype of x."""
        multiply = ops.linear if ops.direct(x) else _linear
        found: Tensor = multiply(x, *self._arguments())
        return found


class SparseConv2d(Sparse):
    """A convolution without groups, for a packed weight of ``(outputs, inputs * height * width)``."""

    def __init__(
        self,
        packed: Packed,
        bias: Tensor | None,
        kernel: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        activation: str = "none",
    ) -> None:
        super().__init__(packed, bias, activation)
        self.kernel, self.stride, self.padding, self.dilation = (list(x) for x in (kernel, stride, padding, dilation))

    @property
    def weight(self) -> Tensor:
        """The weight ``(outputs, inputs, height, width)``, dense: a copy."""
        return super().weight.view(self.rows, -1, *self.kernel)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, inputs, height, width)`` to ``(batch, outputs, height, width)``."""
        convolve = ops.conv2d if ops.direct(x) else _conv2d
        arguments = (*self._arguments(), self.kernel, self.stride, self.padding, self.dilation)
        found: Tensor = convolve(x, *arguments)
        return found

    def parts(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a file keeps, but for the bias."""
        tensors, facts = super().parts()
        return tensors, facts | {key: getattr(self, key) for key in GEOMETRY}

    def extra_repr(self) -> str:
        """What print(model) shows."""
        return f"{super().extra_repr()}, kernel={tuple(self.kernel)}, stride={tuple(self.stride)}"
