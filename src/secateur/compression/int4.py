"""Dense layers of integers of 4 bits, as a quantizer chose them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import ModelError
from ..formats.grid import Grid, grid_of
from ..kernels import int4, ops
from ..kernels.library import ACTIVATIONS
from .modules import Installed

_product = torch.ops.secateur.dense_int4.default


def found_grid(weight: Tensor) -> Grid | None:
    """The grid of 4 bits or less on which a matrix lies exactly, with the widest groups that the kernel knows."""
    fits = (grid_of(weight, group) for group in int4.GROUPS)
    return next((found for found in fits if found is not None), None)


class Int4Linear(Installed):
    """``y = x W^T + b`` for W of integers of 4 bits with a scale for each group of inputs.

    Args:
        weight: ``(outputs, inputs)`` of floats that lie on the grid: nothing is rounded here.
        bias: ``(outputs,)`` or None.
        grid: of 4 bits, in groups that the kernel knows; found where it is not given.
        activation: ``none`` or ``relu``.

    Raises:
        ModelError: the weight lies on no such grid.
    """

    values: Tensor
    scale: Tensor
    zero: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, grid: Grid | None = None, activation: str = "none") -> None:
        grid = grid or found_grid(weight)
        codes = None if grid is None else grid.codes(weight.float())
        if grid is None or codes is None or not torch.equal(grid.values(codes), weight.float()):
            raise ModelError("this weight is not on a grid of 4 bits: quantize the model first (prune --quantize int4)")
        super().__init__(weight.shape[0], weight.shape[1], bias, activation)
        self.register_buffer("values", int4.nibbles(codes).contiguous())
        self.register_buffer("scale", grid.scale.float().contiguous())
        self.register_buffer("zero", None if grid.zero is None else grid.zero.to(torch.int8).contiguous())

    @classmethod
    def restored(
        cls, values: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, activation: str
    ) -> Int4Linear:
        """From the parts that a file keeps.

        Raises:
            ValueError: they do not fit together.
        """
        scale = scale.float()
        right = values.dim() == 2 and values.dtype == torch.uint8 and scale.dim() == 2 and min(scale.shape) > 0
        right = right and len(scale) == len(values) and 2 * values.shape[1] in [g * scale.shape[1] for g in int4.GROUPS]
        right = right and bool((scale.isfinite() & (scale > 0)).all())
        if right and zero is not None:
            right = zero.shape == scale.shape and zero.dtype == torch.int8 and bool(((zero >= -8) & (zero <= 7)).all())
        if not right:
            raise ValueError(f"values of 4 bits {tuple(values.shape)} of {values.dtype}")
        made = cls(torch.zeros(1, 32), None, None, activation)
        made.rows, made.cols = values.shape[0], 2 * values.shape[1]
        made.values, made.scale, made.zero, made.bias = values, scale, zero, bias
        return made

    @property
    def group(self) -> int:
        """Inputs that share a scale."""
        return self.cols // self.scale.shape[1]

    @property
    def stored(self) -> int:
        """How many parameters are kept."""
        return self.rows * self.cols + (0 if self.bias is None else self.rows)

    @property
    def nonzeros(self) -> int:
        """How many of them are not zero."""
        return int(self.weight.count_nonzero()) + (0 if self.bias is None else int(self.bias.count_nonzero()))

    @property
    def weight(self) -> Tensor:
        """The weight in float32: a copy."""
        return int4.floats(self.values, self.scale, self.zero)

    def parts(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a file keeps: scales in bfloat16 where that holds them, as those of secateur's grids."""
        short = self.scale.to(torch.bfloat16)
        tensors = {"values": self.values, "scale": short if torch.equal(short.float(), self.scale) else self.scale}
        return tensors | ({} if self.zero is None else {"zero": self.zero}), {"index": ["dense"], "kind": "int4"}

    def forward(self, x: Tensor) -> Tensor:
        """``(..., inputs)`` to ``(..., outputs)``, in the dtype of x."""
        multiply = int4.dense_int4 if ops.direct(x) else _product
        y: Tensor = multiply(x, self.values, self.scale, self.zero, self.bias, ACTIVATIONS[self.activation])
        return y

    def extra_repr(self) -> str:
        """What print(model) shows."""
        return (
            f"{self.cols} to {self.rows}, dense int4 in groups of {self.group}, bias={self.bias is not None}, "
            f"activation={self.activation}"
        )
