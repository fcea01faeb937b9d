"""Allocations that look at how layers respond to data."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..registry import register
from .base import LayerFacts, Sketch


def _wanda(weight: Tensor, input_norm: Tensor) -> Tensor:
    """Weight magnitude times input norm, the score in which outliers are counted."""
    return weight.abs() * input_norm


@register("allocation", paper="2310.05175", measure=_wanda)
def owl(layers: Mapping[str, LayerFacts], *, sparsity: float, lam: float = 0.08, m: float = 5.0) -> dict[str, float]:
    """Blocks with more outliers keep more: the density follows the share of scores above ``m`` times the mean.

    :: keep_b = (1 - S) + r_b - mean(r),  r = 2 lam (D - min D) / (max D - min D),  D_b = share of |w| ||x|| > m mean

    Choose it for language models from 60 % on, with wanda or sparsegpt.

    Beware: ``lam`` and ``m`` are tuned for each model in the paper; at 50 % it gains little.

    Source: Yin et al., Outlier weighed layerwise sparsity, arXiv 2310.05175, section 3 and the official code.
    """
    blocks: dict[str, list[str]] = {}
    for name, facts in layers.items():
        blocks.setdefault(facts.block if facts.block is not None else name, []).append(name)
    ratio, size = {}, {}
    for block, names in blocks.items():
        sketches: list[Sketch] = [s for n in names if (s := layers[n].sketch) is not None]
        size[block] = sum(s.numel for s in sketches)
        mean = sum(s.total for s in sketches) / size[block]
        ratio[block] = sum(s.above(m * mean) for s in sketches) / size[block]
    low, high = min(ratio.values()), max(ratio.values())
    spread = {b: 2 * lam * (r - low) / (high - low) if high > low else 0.0 for b, r in ratio.items()}
    # The paper's blocks are of one size; with unequal ones the mean is weighted so that the total is met.
    mean = sum(spread[b] * size[b] for b in spread) / sum(size.values())
    keeps = {b: 1.0 - sparsity + spread[b] - mean for b in spread}
    return _within(layers, {n: keeps[b] for b, names in blocks.items() for n in names})


def _within(layers: Mapping[str, LayerFacts], keeps: dict[str, float]) -> dict[str, float]:
    """Clip to [0, 1] and shift the others so that the weighted mean stays."""
    total = sum(f.numel for f in layers.values())
    wanted = sum(keeps[n] * layers[n].numel for n in layers)
    for _ in range(len(layers)):
        keeps = {n: min(1.0, max(0.0, k)) for n, k in keeps.items()}
        missing = wanted - sum(keeps[n] * layers[n].numel for n in layers)
        free = [n for n, k in keeps.items() if (k < 1.0 if missing > 0 else k > 0.0)]
        room = sum(layers[n].numel for n in free)
        if abs(missing) <= 1e-9 * total or not room:
            break
        keeps.update({n: keeps[n] + missing / room for n in free})
    return keeps
