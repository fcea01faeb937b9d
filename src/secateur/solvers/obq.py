"""Pruning and quantization of small layers, one weight at a time in the order of what each costs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import RecipeError
from ..formats import Grid
from ..formats.grid import check_grid, grid
from ..granularity import Granularity
from ..registry import register
from .base import Solved
from .curvature import Curvature
from .integers import check as check_grids
from .obc import obc


def check(shape: tuple[int, int], name: str, pattern: Granularity, knobs: Mapping[str, Any]) -> None:
    """Refuse a layer that the grid does not fit, and a number of moves that there is not."""
    check_grids(shape, name, pattern, knobs)
    if isinstance(knobs["moves"], bool) or not isinstance(knobs["moves"], int) or knobs["moves"] < 0:
        raise RecipeError(f"moves is how many a row may take, 0 for none: not {knobs['moves']!r}")


@register(
    "solver",
    paper="2208.11580",
    chooses="mask",
    check=check,
    quantizes=True,
    integers="obq",
    survey=("B3.5", "C1.4", "D1"),
)
def obq(
    weight: Tensor,
    curvature: Curvature,
    keep: float,
    granularity: Granularity,
    *,
    bits: int = 4,
    group: int = 0,
    symmetric: bool = True,
    clip: str = "mse",
    moves: int = 64,
    damp: float = 0.01,
    chunk: int = 16,
    max_flops: float = 4e11,
) -> Solved:
    """Prune as obc does, round survivors one at a time, cheapest first, with exact updates; then mend both together.

    :: p = argmin (w_p - round(w_p))^2 / [H^-1]_pp;  w <- w - (w_p - round(w_p)) / [H^-1]_pp H^-1_:p

    A weight that left its grid by more than half a step is rounded at once. Then each row takes the ``moves`` that
    lower its output error most: another value for one survivor, or a survivor that goes while a zero comes back.

    Choose it for small layers (convolutions, heads, up to about 256 inputs) at 2 to 4 bits, and as the yardstick of
    sparsegpt-gptq.

    Beware: about ``4 o i^3`` operations in float64; a layer above ``max_flops`` is refused. ``moves=0`` is the paper's
    method, one after the other; the moves are an addition, and with them the error is never above it.

    Source: Frantar, Singh, Alistarh, Optimal brain compression, arXiv 2208.11580, section 5 (OBQ) and the official
    code: first pruned, grids found on what is left, then quantized, outliers first.
    """
    shape = (weight.shape[0], weight.shape[1])
    check_grid(shape, curvature.name, bits=bits, group=group, clip=clip)
    pruned = obc(weight, curvature, keep, granularity, damp=damp, chunk=chunk, max_flops=max_flops)
    found = grid(pruned.weight, bits, group, symmetric=symmetric, clip=clip, mask=pruned.mask)
    hessian, gram = curvature.damped(damp).double(), curvature.gram.double()
    run = granularity.run if granularity.keep is not None else shape[1]
    rows, masks = [], []
    for a in range(0, shape[0], chunk):
        part = slice(a, a + chunk)
        of = Grid(bits, found.group, found.scale[part], None if found.zero is None else found.zero[part])
        mask = pruned.mask[part]
        w = _quantized(pruned.weight[part].double(), mask, hessian, of)
        w, mask = _mended(w, weight[part].double(), mask, gram, of, run, moves)
        rows.append(w.float())
        masks.append(mask)
    return Solved(torch.cat(rows), torch.cat(masks), pruned.notes, found)


def _quantized(w: Tensor, mask: Tensor, hessian: Tensor, of: Grid) -> Tensor:
    """Survivors rounded in the order of what each costs; those that are not rounded yet make up for it."""
    r = torch.arange(w.shape[0], device=w.device)
    kept = mask.double()
    h = torch.linalg.inv(hessian * kept[:, :, None] * kept[:, None, :] + torch.diag_embed(1 - kept))
    half = (of.scale.double() / 2).repeat_interleave(of.group, 1)
    w, closed = w.clone(), ~mask
    for _ in range(int(mask.sum(1).max())):
        q = of.round(w.float()).double()
        error = (w - q).square().masked_fill(closed, 0.0)
        score = (error / h.diagonal(dim1=1, dim2=2)).masked_fill(closed, float("inf"))
        outlier = (error > half.square() * (1 + 1e-6)).any(1)
        p = torch.where(outlier, error.argmax(1), score.argmin(1))
        open_ = (~closed[r, p]).double()
        d = h[r, p, p]
        column = h[r, p].masked_fill(closed, 0.0)  # rounding, where there is no zero: what is fixed stays as it is
        w.addcmul_(column, ((w[r, p] - q[r, p]) / d * open_)[:, None], value=-1)
        h.baddbmm_(column[:, :, None], (column / d[:, None] * open_[:, None])[:, None, :], alpha=-1)
        h[r, p, p] = 1.0  # what is left there is rounding; one is safe to divide by
        w[r, p] = torch.where(open_ > 0, q[r, p], w[r, p])
        closed[r, p] = True
    return w.masked_fill(~mask, 0.0)


def _mended(
    w: Tensor, dense: Tensor, mask: Tensor, gram: Tensor, of: Grid, run: int, moves: int
) -> tuple[Tensor, Tensor]:
    """Each row takes the moves that lower its output error most, while there are any.

    Args:
        run: columns among which a survivor and a zero may change places.
    """
    rows, columns = w.shape
    w, mask = w.clone(), mask.clone()
    r = torch.arange(rows, device=w.device)
    power = gram.diagonal().clamp_min(1e-30)
    place = torch.arange(columns, device=w.device) // run
    together = place[:, None] == place
    zero = None if of.zero is None else of.zero.repeat_interleave(columns, 0)
    each = Grid(of.bits, of.group, of.scale.repeat_interleave(columns, 0), zero)  # a row for each survivor that may go
    slope = (w - dense) @ gram
    least = 1e-9 * (slope * (w - dense)).sum(1).clamp_min(0)  # a gain below this is rounding
    for _ in range(moves):
        to = of.round((w - slope / power).float()).double()
        change = to - w
        one = (2 * change * slope + change.square() * power).masked_fill(~mask, float("inf"))
        gain, p = one.min(1)
        # A survivor a goes, and a zero b takes the value that is best then.
        gone = w.square() * power - 2 * w * slope
        wanted = -(slope[:, None, :] - w[:, :, None] * gram) / power
        value = each.round(wanted.reshape(-1, columns).float()).reshape(wanted.shape).double()
        two = gone[:, :, None] + power * value * (value - 2 * wanted)
        two = two.masked_fill(~(mask[:, :, None] & ~mask[:, None, :] & together), float("inf"))
        pair_gain, pair = two.reshape(rows, -1).min(1)
        a, b = pair // columns, pair % columns
        swap = (pair_gain < gain) & (pair_gain < -least)
        single = ~swap & (gain < -least)
        if not bool((swap | single).any()):
            break
        new = w.clone()
        new[r[single], p[single]] = to[r[single], p[single]]
        new[r[swap], a[swap]] = 0.0
        new[r[swap], b[swap]] = value[r[swap], a[swap], b[swap]]
        mask[r[swap], a[swap]], mask[r[swap], b[swap]] = False, True
        slope += (new - w) @ gram
        w = new
    return w, mask
