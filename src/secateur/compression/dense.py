"""Dense layers of smaller values, for where zeros are too few to win by themselves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ModelError
from ..kernels import ops, quantized
from .modules import Installed

#: Kinds of values that have a dense form.
DENSE = ("bfloat16", "int8-dynamic")

_int8 = torch.ops.secateur.dense_int8.default


class DenseLinear(Installed):
    """``y = x W^T + b`` with every weight stored: in bfloat16, or in int8 with one scale a row.

    Args:
        weight: ``(outputs, inputs)`` of floats.
        bias: ``(outputs,)`` or None.
        kind: ``bfloat16`` (products of bfloat16, float32 sums) or ``int8-dynamic`` (activations become int8 too).
        activation: ``none`` or ``relu``.

    Raises:
        ModelError: a weight is not finite, or too large for the kind.
    """

    values: Tensor
    scale: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, kind: str, activation: str = "none") -> None:
        scale = None
        if kind == "int8-dynamic":
            values, scale = quantized.quantize(weight.detach())
        else:
            values = weight.detach().to(torch.bfloat16)
        if not bool(weight.isfinite().all()) or not bool(values.isfinite().all()):
            raise ModelError(f"a weight is not finite in {kind}: the layer stays as it is")
        super().__init__(values.shape[0], values.shape[1], bias, activation)
        self.register_buffer("values", values.contiguous())
        self.register_buffer("scale", scale)

    @classmethod
    def restored(cls, values: Tensor, scale: Tensor | None, bias: Tensor | None, activation: str) -> DenseLinear:
        """From the parts that a file keeps.

        Raises:
            ValueError: they do not fit together.
        """
        right = values.dim() == 2 and min(values.shape) > 0 and bool(values.isfinite().all())
        if scale is None:
            right = right and values.dtype == torch.bfloat16
        else:
            right = right and values.dtype == torch.int8 and scale.dtype == torch.float32
            right = right and scale.shape == values.shape[:1] and bool((scale.isfinite() & (scale > 0)).all())
        if not right:
            raise ValueError(f"dense values {tuple(values.shape)} of {values.dtype}")
        made = cls(torch.zeros(1, 1), None, "bfloat16", activation)
        made.rows, made.cols = values.shape
        made.values, made.scale, made.bias = values, scale, bias
        return made

    @property
    def kind(self) -> str:
        """Of the values."""
        return "bfloat16" if self.scale is None else "int8-dynamic"

    @property
    def stored(self) -> int:
        """How many parameters are kept."""
        return self.values.numel() + (0 if self.bias is None else self.rows)

    @property
    def nonzeros(self) -> int:
        """How many of them are not zero."""
        return int(self.values.count_nonzero()) + (0 if self.bias is None else int(self.bias.count_nonzero()))

    @property
    def unseen_bytes(self) -> int:
        """Bytes that are held beside the buffers: torch's kernels read int8 values in an order of their own."""
        return 0 if self.scale is None else self.values.numel()

    @property
    def weight(self) -> Tensor:
        """The weight in float32: a copy."""
        found = self.values.float()
        return found if self.scale is None else found * self.scale[:, None]

    def parts(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a file keeps."""
        tensors = {"values": self.values} | ({} if self.scale is None else {"scale": self.scale})
        return tensors, {"index": ["dense"], "kind": self.kind}

    def forward(self, x: Tensor) -> Tensor:
        """``(..., inputs)`` to ``(..., outputs)``, in the dtype of x."""
        if self.scale is not None:
            multiply = quantized.dense_int8 if ops.direct(x) else _int8
            y: Tensor = multiply(x, self.values, self.scale, self.bias)
        else:
            bias = None if self.bias is None else self.bias.to(torch.bfloat16)
            y = F.linear(x.to(torch.bfloat16), self.values, bias).to(x.dtype)
        return y.relu() if self.activation == "relu" else y

    def extra_repr(self) -> str:
        """What print(model) shows."""
        return (
            f"{self.cols} to {self.rows}, dense {self.kind}, bias={self.bias is not None}, activation={self.activation}"
        )


def has_dense(kind: str, module: nn.Module) -> bool:
    """Whether a layer has a dense form of such values on this machine."""
    return kind in DENSE and not isinstance(module, nn.Conv2d) and (kind == "bfloat16" or quantized.available())
