"""Solvers whose survivors are integers times a scale: pruning and quantization of a layer in one pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..formats.grid import Grid, check_grid, grid
from ..granularity import Granularity
from ..registry import register
from ..select import select
from .base import Solved
from .curvature import Curvature
from .sparsegpt import sweep


def check(shape: tuple[int, int], name: str, pattern: Granularity, knobs: Mapping[str, Any]) -> None:
    """Refuse a layer that a solver's grid does not fit, before any work."""
    run = pattern.run if pattern.keep is not None else 1
    check_grid(shape, name, bits=knobs["bits"], group=knobs["group"], clip=knobs["clip"], run=run)


@register(
    "solver",
    name="sparsegpt-gptq",
    paper="2301.00774",
    chooses="mask",
    check=check,
    quantizes=True,
    integers="sparsegpt-gptq",
    survey=("B3.5", "C1.4", "D1"),
)
def sparsegpt_gptq(
    weight: Tensor,
    curvature: Curvature,
    keep: float,
    granularity: Granularity,
    mask: Tensor | None = None,
    *,
    bits: int = 4,
    group: int = 64,
    symmetric: bool = True,
    clip: str = "mse",
    damp: float = 0.01,
    block: int = 128,
) -> Solved:
    """SparseGPT and GPTQ in one sweep: survivors are rounded as they are passed, and later columns make up for both.

    :: q_j = m_j round(w_j),  w_right <- w_right - (w_j - q_j) U_j,right / U_jj,  H^-1 = U^T U

    Choose it to prune and quantize a language model together: what rounding costs is seen by the choice of the
    next columns' masks, on the one Hessian that both need. With sparsity 0 it is GPTQ.

    Beware: survivors that round to zero count as kept. Grids are found as the sweep reaches a group of columns, on
    the survivors as pruning alone would leave them, for they grow; the official code finds one grid for each row on
    the dense weights.

    Source: Frantar and Alistarh, SparseGPT, arXiv 2301.00774 and its official code; groups after
    Frantar et al., GPTQ, arXiv 2210.17323, and its official code (without reordered columns).
    """
    shape = (weight.shape[0], weight.shape[1])
    run = granularity.run if granularity.keep is not None else 1
    check_grid(shape, curvature.name, bits=bits, group=group, clip=clip, most=16, run=run)
    snap = _Groups(shape, bits, group, symmetric, clip)
    return snap.solved(sweep(weight, curvature, keep, granularity, damp, block, snap=snap, held=mask))


@register("solver", paper="2210.17323", check=check, quantizes=True, integers="gptq", survey="D1")
def gptq(
    weight: Tensor,
    score: Tensor,
    curvature: Curvature,
    keep: float,
    granularity: Granularity,
    *,
    bits: int = 4,
    group: int = 64,
    symmetric: bool = True,
    clip: str = "mse",
    damp: float = 0.01,
    block: int = 128,
) -> Solved:
    """Choose the mask by score, then round the survivors column by column; later columns make up for both.

    :: q_j = m_j round(w_j),  w_right <- w_right - (w_j - q_j) U_j,right / U_jj,  m given

    Choose it to quantize after pruning by another criterion (wanda, or magnitude for what is sparse already): the
    mask stays as it is. With sparsity 0 it is GPTQ.

    Beware: the mask does not see what rounding costs; sparsegpt-gptq chooses both together.

    Source: Frantar et al., GPTQ, arXiv 2210.17323, with groups as in its official code (without
    reordered columns); the mask is held as in SparseGPT's official code, arXiv 2301.00774.
    """
    shape = (weight.shape[0], weight.shape[1])
    check_grid(shape, curvature.name, bits=bits, group=group, clip=clip, most=16)
    mask = granularity.unpool(select(granularity.pool(score), keep), shape)
    snap = _Groups(shape, bits, group, symmetric, clip)
    return snap.solved(sweep(weight, curvature, keep, granularity, damp, block, snap=snap, given=mask))


@register("solver", name="round", check=check, quantizes=True, integers="round", shares="share", survey="D1")
def round_to_nearest(
    weight: Tensor,
    score: Tensor,
    keep: float,
    granularity: Granularity,
    *,
    bits: int = 4,
    group: int = 64,
    symmetric: bool = True,
    clip: str = "mse",
) -> Solved:
    """Choose the mask by score, then round each survivor to the nearest value of its group's grid.

    :: w <- m scale round(w / scale)

    Choose it for 8 bits, or without data.

    Beware: at 4 bits and less the solvers gptq and sparsegpt-gptq lose far less on language models.

    Source: common practice; the order prune, then quantize is that of Han et al., Deep compression, arXiv 1510.00149.
    """
    shape = (weight.shape[0], weight.shape[1])
    mask = granularity.unpool(select(granularity.pool(score), keep), shape)
    found = grid(weight, bits, group, symmetric=symmetric, clip=clip, mask=mask)
    return Solved(found.round(weight * mask), mask, grid=found)


class _Groups:
    """The grids of a layer, found group by group as a sweep reaches them."""

    def __init__(self, shape: tuple[int, int], bits: int, group: int, symmetric: bool, clip: str) -> None:
        self.bits, self.group, self.clip, self.symmetric = bits, group or shape[1], clip, symmetric
        self._found: list[Grid] = []

    def begin(self, weight: Tensor, mask: Tensor) -> None:
        """The grid of the next columns."""
        self._found.append(grid(weight, self.bits, 0, symmetric=self.symmetric, clip=self.clip, mask=mask))

    def column(self, weight: Tensor, index: int) -> Tensor:
        """The nearest values of a column, by the grid that was found last."""
        return self._found[-1].column(weight, 0)

    def solved(self, made: Solved) -> Solved:
        """The solution with its grid."""
        zeros = [g.zero for g in self._found if g.zero is not None]
        scale = torch.cat([g.scale for g in self._found], 1)
        whole = Grid(self.bits, self.group, scale, torch.cat(zeros, 1) if zeros else None)
        return Solved(made.weight, made.mask, made.notes, whole)
