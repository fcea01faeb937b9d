"""A sparse matrix as the kernels read it, and as a file keeps it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import ModelError, RecipeError
from .grid import steps_of

#: Zeros kept behind the values: kernels load whole vectors and may read past the last one.
PADDING = 256

#: ``int8-dynamic``: where bits or quads are read, a token's activations become int8 too, with one scale a token.
KINDS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8, "int8-dynamic": torch.int8}
#: What may be packed and stored: what the kernels for the CPU read, and what those for GPUs read besides.
_DTYPES = {**KINDS, "float16": torch.float16}

_MOST = (1 << 31) - 1
#: Columns up to which sums of products of bytes stay below 2^31.
MOST_OF_QUADS = 1 << 16


@dataclasses.dataclass(frozen=True)
class Packed:
    """A matrix of shape ``(rows, cols)`` without its zeros.

    It is cut into groups of rows and panels of columns; a *run* is what one row keeps in one panel. Runs lie group by
    group, in a group panel by panel, in a panel row by row: a panel of the activations then stays in a processor's
    first-level cache while a group of rows reads it.

    Attributes:
        rows, cols: the shape.
        group: rows in a group, at most 64.
        panel: columns in a panel: a multiple of 64, at most 256.
        values: ``(nonzeros + PADDING,)`` of float32, bfloat16, float16 (for GPUs) or int8, in the order of the runs.
        start: ``(runs + 1,)`` int32, where each run begins.
        col: ``(nonzeros,)`` uint8, each value's column within its panel; None where ``bits`` says it.
        bits: ``(runs, panel / 8)`` uint8, a bit for each column, lowest first; None where ``col`` says it.
        quad: int32, for integer arithmetic with many tokens; beside ``bits``, of dynamic values only, and never in a
            file: one part after the other, the sum of each row's values ``(rows,)``, where the quads of each run begin
            ``(runs + 1,)``, the quads (four neighboring columns of which any is kept, as one word), and a byte for
            each, which one of its panel it is, and zeros up to a whole word.
        scale: ``(rows,)`` float32 by which int8 values are multiplied; None for floats.
        dynamic: whether activations become int8 as well, where bits or quads are read; of int8 values only.
    """

    rows: int
    cols: int
    group: int
    panel: int
    values: Tensor
    start: Tensor
    col: Tensor | None
    bits: Tensor | None
    quad: Tensor | None = None
    scale: Tensor | None = None
    dynamic: bool = False

    @property
    def nonzeros(self) -> int:
        """How many values there are."""
        return self.values.numel() - PADDING

    @property
    def density(self) -> float:
        """Share of the matrix that is kept."""
        return self.nonzeros / max(1, self.rows * self.cols)

    def bytes(self) -> int:
        """Bytes in memory."""
        held = (self.values, self.start, self.col, self.bits, self.quad, self.scale)
        return sum(t.numel() * t.element_size() for t in held if t is not None)

    def dense(self) -> Tensor:
        """The matrix ``(rows, cols)``: in the values' dtype, int8 as float32 times its scale."""
        mask, order = _mask(self), _order(self.rows, self.cols, self.group, self.panel)
        values = self.values[: self.nonzeros]
        runs = values.new_zeros(mask.shape, dtype=torch.float32 if self.scale is not None else values.dtype)
        runs[mask] = values.to(runs.dtype)
        whole = torch.empty_like(runs)
        whole[order] = runs
        found = whole.view(self.rows, -1)[:, : self.cols].contiguous()
        return found if self.scale is None else found * self.scale[:, None]

    def indexed(self, col: bool, bits: bool, quad: bool = False) -> Packed:
        """The same matrix with these indexes: ``col`` for many tokens, ``bits`` for few, ``quad`` (with bits) for both.

        Raises:
            RecipeError: quads of values that are not dynamic, or of too many columns.
        """
        if quad and (not self.dynamic or self.cols > MOST_OF_QUADS):
            raise RecipeError(f"quads are of int8-dynamic values and up to {MOST_OF_QUADS:,} columns")
        mask = _mask(self)
        return dataclasses.replace(
            self,
            col=_columns(mask) if col else None,
            bits=_bits(mask) if bits or quad else None,
            quad=_quads(self, mask) if quad else None,
        )

    def check(self) -> Packed:
        """The same, after every index has been found to stay inside.

        Raises:
            ModelError: the parts do not describe one matrix.
        """
        if self.rows < 1 or self.cols < 1 or not _cut(self.group, self.panel):
            raise ModelError(f"a packed matrix of {self.rows} x {self.cols} in groups of {self.group} rows is damaged")
        runs = self.rows * -(-self.cols // self.panel)
        if self.values.dtype not in _DTYPES.values():
            raise ModelError(f"packed values are {self.values.dtype}: kernels read {', '.join(_DTYPES)}")
        whole = self.start.dtype == torch.int32 and self.start.shape == (runs + 1,) and self.values.dim() == 1
        if not whole or self.nonzeros < 0 or int(self.start[0]) != 0 or int(self.start[-1]) != self.nonzeros:
            raise ModelError(f"the runs of a packed matrix of {self.rows} x {self.cols} are damaged")
        counts = self.start.long().diff()
        inside = bool(((counts >= 0) & (counts <= self.panel)).all())
        if not inside or (self.col is None and self.bits is None) or not bool(self.values.isfinite().all()):
            raise ModelError(f"the runs of a packed matrix of {self.rows} x {self.cols} are damaged")
        if self.col is not None and (self.col.dtype != torch.uint8 or self.col.shape != (self.nonzeros,)):
            raise ModelError("the columns of a packed matrix are damaged")
        if self.bits is not None and (self.bits.dtype != torch.uint8 or self.bits.shape != (runs, self.panel // 8)):
            raise ModelError("the bit mask of a packed matrix is damaged")
        masks = [_unbits(self.bits, self.panel)] if self.bits is not None else []
        if self.col is not None:
            masks.append(_mask(dataclasses.replace(self, bits=None)))
        last = self.cols - (-(-self.cols // self.panel) - 1) * self.panel
        order = _order(self.rows, self.cols, self.group, self.panel)
        edge = order % -(-self.cols // self.panel) == -(-self.cols // self.panel) - 1
        for mask in masks:
            if not torch.equal(mask.sum(1), counts) or bool(mask[edge, last:].any()):
                raise ModelError(f"the columns of a packed matrix of {self.rows} x {self.cols} are damaged")
        if len(masks) == 2 and not torch.equal(masks[0], masks[1]):
            raise ModelError("the columns and the bit mask of a packed matrix differ")
        if self.col is not None:
            rising = self.col[1:] > self.col[:-1]
            border = self.start[1:-1].long()
            rising[border[(border > 0) & (border < self.nonzeros)] - 1] = True  # the next run may begin anywhere
            if not bool(rising.all()):
                raise ModelError("the columns of a packed matrix are not in order")
        if (
            (self.scale is None) != (self.values.dtype != torch.int8)
            or (self.dynamic and self.scale is None)
            or (
                self.scale is not None
                and (
                    self.scale.dtype != torch.float32
                    or self.scale.shape != (self.rows,)
                    or not bool((self.scale.isfinite() & (self.scale > 0)).all())
                )
            )
        ):
            raise ModelError("the scales of a packed matrix are damaged")
        if self.quad is not None:
            able = self.bits is not None and self.dynamic and self.cols <= MOST_OF_QUADS
            if not able or self.quad.dtype != torch.int32 or not torch.equal(self.quad, _quads(self, masks[0])):
                raise ModelError("the quads of a packed matrix are not those of its values")
        return self

    def stored(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a file keeps: tensors and facts; the smaller of bit mask and columns, and no padding."""
        mask = _mask(self)
        by_bits = mask.numel() // 8 <= self.nonzeros + 2 * mask.shape[0]  # of columns, the counts are kept too
        tensors = {"values": self.values[: self.nonzeros]}
        if by_bits:
            tensors["bits"] = _bits(mask)
        else:
            tensors |= {"col": _columns(mask), "counts": mask.sum(1).to(torch.int16)}
        if self.scale is not None:
            tensors["scale"] = self.scale
        facts: dict[str, Any] = {"rows": self.rows, "cols": self.cols, "group": self.group, "panel": self.panel}
        return tensors, {**facts, "dynamic": True} if self.dynamic else facts


def pack(weight: Tensor, kind: str = "float32", *, group: int | None = None, panel: int | None = None) -> Packed:
    """Pack a matrix; both indexes are there, for `Packed.indexed` to choose from.

    Args:
        weight: ``(rows, cols)`` of floats. What is exactly zero goes.
        kind: of the values: ``float32``, ``bfloat16`` or ``float16`` (rounded to nearest; the latter for GPUs),
            ``int8`` (one scale a row, symmetric: that of the integers where a row has been quantized, so that nothing
            moves; what rounds to zero stays stored) or ``int8-dynamic`` (the same, and
            activations become int8 where bits or quads are read).
        group, panel: how it is cut, within the bounds of `Packed`; by its shape and density where not given.

    Raises:
        RecipeError: it is no matrix, is not finite, or the kind or the cut is not known.
    """
    if kind not in _DTYPES:
        raise RecipeError(f"values of kind '{kind}' are not known: {', '.join(_DTYPES)}")
    if weight.dim() != 2 or 0 in weight.shape or not weight.is_floating_point():
        raise RecipeError(f"only matrices of floats can be packed, not {tuple(weight.shape)} of {weight.dtype}")
    dense = weight.detach().to("cpu", torch.float32)
    if not bool(dense.isfinite().all()):
        raise RecipeError("a weight is not finite: nothing is packed")
    rows, cols = dense.shape
    density = float(dense.count_nonzero()) / dense.numel()
    group = group or _group(rows)
    panel = panel or (128 if density >= 0.08 else 256)
    if not _cut(group, panel):
        raise RecipeError(f"groups of {group} rows and panels of {panel} columns: at most 64, and 64, 128, 192 or 256")
    panels = -(-cols // panel)
    padded = torch.nn.functional.pad(dense, (0, panels * panel - cols))
    runs = padded.view(rows * panels, panel)[_order(rows, cols, group, panel)]
    mask = runs != 0
    count = int(mask.sum())
    if count > _MOST:
        raise RecipeError(f"{count:,} values are more than one packed matrix holds ({_MOST:,}): split the layer")
    scale = None
    found = runs[mask]
    if _DTYPES[kind] == torch.int8:
        scale = steps(dense)
        of_run = _order(rows, cols, group, panel) // panels
        found = (found / scale[of_run].repeat_interleave(mask.sum(1))).round().clamp(-127, 127)
    values = torch.zeros(count + PADDING, dtype=_DTYPES[kind])
    values[:count] = found.to(_DTYPES[kind])
    if not bool(values.isfinite().all()):
        raise RecipeError(f"a weight is too large for {kind}: nothing is packed")
    start = torch.zeros(mask.shape[0] + 1, dtype=torch.int32)
    start[1:] = mask.sum(1).cumsum(0)
    dynamic = kind == "int8-dynamic"
    return Packed(rows, cols, group, panel, values, start, _columns(mask), _bits(mask), None, scale, dynamic)


def steps(weight: Tensor) -> Tensor:
    """A scale ``(rows,)`` for each row in int8: the step that its weights are multiples of, or 1/127 of the largest."""
    exact = steps_of(weight)
    return torch.where(exact > 0, exact, weight.abs().amax(1).float().clamp(min=1e-30) / 127.0)


def restore(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Packed:
    """From what `Packed.stored` gave, as a file brought it.

    Raises:
        ModelError: it does not describe a matrix.
    """
    try:
        rows, cols, group, panel = (int(facts[k]) for k in ("rows", "cols", "group", "panel"))
        if min(rows, cols) < 1 or not _cut(group, panel):
            raise ValueError(f"{rows} x {cols} in groups of {group} rows and panels of {panel} columns")
        values = tensors["values"]
        bits, col = tensors.get("bits"), tensors.get("col")
        runs = rows * -(-cols // panel)
        if bits is not None:
            if bits.dtype != torch.uint8 or bits.shape != (runs, panel // 8):
                raise ValueError("bit mask")
            counts = _unbits(bits, panel).sum(1)
        else:
            counts = tensors["counts"]
            if counts.dtype != torch.int16 or counts.shape != (runs,) or tensors["col"].shape != values.shape:
                raise ValueError("columns")
        if values.dim() != 1 or int(counts.sum()) != values.numel():
            raise ValueError("values")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ModelError(f"a packed matrix is damaged: {error}") from None
    padded = torch.zeros(values.numel() + PADDING, dtype=values.dtype)
    padded[: values.numel()] = values
    start = torch.zeros(runs + 1, dtype=torch.int32)
    start[1:] = counts.cumsum(0)
    col, bits, scale = (None if t is None else t.contiguous() for t in (col, bits, tensors.get("scale")))
    return Packed(rows, cols, group, panel, padded, start, col, bits, None, scale, bool(facts.get("dynamic"))).check()


def _cut(group: int, panel: int) -> bool:
    """Whether the kernels know groups and panels of these sizes."""
    return 0 < group <= 64 and panel in (64, 128, 192, 256)


def _group(rows: int) -> int:
    """Many rows read one panel; few enough that several threads share the work evenly."""
    return 64 if rows >= 2048 else 32 if rows >= 512 else 16


def _order(rows: int, cols: int, group: int, panel: int) -> Tensor:
    """``(runs,)``: for each run as it is stored, its place in the order of rows, then panels."""
    panels = -(-cols // panel)
    place = torch.arange(rows * panels, device="cpu").view(rows, panels)
    return torch.cat([part.T.reshape(-1) for part in place.split(group)])


def _columns(mask: Tensor) -> Tensor:
    return mask.nonzero()[:, 1].to(torch.uint8)


_POWERS = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device="cpu")


def _bits(mask: Tensor) -> Tensor:
    return (mask.view(mask.shape[0], -1, 8).to(torch.uint8) * _POWERS).sum(2, dtype=torch.uint8)


def _unbits(bits: Tensor, panel: int) -> Tensor:
    return (bits[:, :, None] & _POWERS).ne(0).view(bits.shape[0], panel)


def quad_words(quads: int) -> int:
    """Words that so many quads take, with the byte beside each."""
    return quads + -(-quads // 4)


def _quads(packed: Packed, mask: Tensor) -> Tensor:
    """The values once more, as `Packed.quad` says."""
    of_quad = mask.view(mask.shape[0], -1, 4)
    kept = of_quad.any(2)
    four = of_quad[kept]
    values = torch.zeros(four.shape, dtype=torch.int8, device="cpu")
    values[four] = packed.values[: packed.nonzeros]
    start = torch.zeros(len(kept) + 1, dtype=torch.int32, device="cpu")
    start[1:] = kept.sum(1).cumsum(0)
    run, place = kept.nonzero().T
    row = _order(packed.rows, packed.cols, packed.group, packed.panel) // -(-packed.cols // packed.panel)
    total = torch.zeros(packed.rows, dtype=torch.int32, device="cpu")
    total.index_add_(0, row[run], values.sum(1, dtype=torch.int32))
    places = torch.nn.functional.pad(place.to(torch.uint8), (0, -len(place) % 4))
    return torch.cat([total, start, values.view(torch.int32).view(-1), places.view(torch.int32)])


def _mask(packed: Packed) -> Tensor:
    """``(runs, panel)`` bool: what is kept."""
    if packed.bits is not None:
        return _unbits(packed.bits, packed.panel)
    assert packed.col is not None
    counts = packed.start.diff()
    mask = torch.zeros(len(counts), packed.panel, dtype=torch.bool, device="cpu")
    run = torch.arange(len(counts), device="cpu").repeat_interleave(counts)
    columns = packed.col.long()  # a panel of 256 is no number of theirs, and comparing would wrap it to zero
    if bool((columns >= packed.panel).any()):
        raise ModelError("the columns of a packed matrix are damaged")
    mask[run, columns] = True
    return mask
