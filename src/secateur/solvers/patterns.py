"""Masks from a small library: every kernel of a layer keeps one of few patterns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import RecipeError
from ..granularity import Granularity
from ..registry import register
from ..select import keep_count, select
from .base import Solved


def check(shape: tuple[int, int], name: str, pattern: Granularity, knobs: Mapping[str, Any]) -> None:
    """Refuse anything but N:M, and a library without patterns."""
    if pattern.keep is None:
        raise RecipeError(
            f"solver 'kernel-patterns' works on N:M, such as 4:9 for kernels of 3x3, not on '{pattern.name}'"
        )
    if isinstance(knobs["patterns"], bool) or not isinstance(knobs["patterns"], int) or knobs["patterns"] < 1:
        raise RecipeError(f"patterns is how many a layer may have, at least 1: not {knobs['patterns']!r}")


@register("solver", paper="2001.00138", check=check, survey=("A2.2", "B3.5"))
def kernel_patterns(
    weight: Tensor, score: Tensor, keep: float, granularity: Granularity, *, patterns: int = 8, center: bool = True
) -> Solved:
    """Every run of M weights keeps N in one of few patterns, which all kernels of a layer share; survivors do not move.

    :: natural_k = the N best of kernel k;  library = the ``patterns`` most frequent of these;
       kernel k keeps the pattern p of the library with the largest sum_{j in p} s_kj

    With granularity ``4:9`` a run is a kernel of 3 x 3: its weights lie side by side along the input. With ``center``
    the middle weight of an odd run belongs to every pattern.

    Choose it for 3 x 3 convolutions on processors whose compiler knows the patterns.

    Beware: no kernel of this package is faster for it. Layers whose input is no multiple of M (1 x 1 convolutions,
    linear layers) are refused: name the others with only. The library is each layer's own, where the paper has one for
    the network; its removal of whole kernels (connectivity) and its training with ADMM are not in it.

    >>> from ..granularity import parse
    >>> score = torch.tensor([[9.0, 8, 1, 0], [7, 6, 0, 1], [5, 4, 3, 0], [0, 3, 2, 9]])
    >>> kernel_patterns(score, score, 0.5, parse("2:4"), patterns=1).mask.int().tolist()[3]
    [1, 1, 0, 0]

    Source: Niu et al., PatDNN, arXiv 2001.00138, section 4.1, from descriptions and another's code (github.com/
    7bvcxz/PatDNN): the center and the largest others are a kernel's pattern, the library the most frequent ones, and a
    kernel takes that with the largest l2 norm; here the largest sum of scores, with magnitude the l1 norm. Ma et al.,
    PCONV, arXiv 1909.05073, for the center.
    """
    pooled = granularity.pool(score)
    runs, width = pooled.shape
    count = keep_count(keep, width)
    ranked = pooled.double()
    if center and width % 2 and count:
        ranked = ranked.clone()
        ranked[:, width // 2] = torch.inf
    natural = select(ranked, count)
    found, often = natural.unique(dim=0, return_counts=True)  # sorted, so that ties are the same everywhere
    order = torch.argsort(often, descending=True, stable=True)[:patterns]
    library = found[order]
    kept = pooled.double() @ library.to(torch.float64).T
    mask_pu = library[kept.argmax(1)]
    mask = granularity.unpool(mask_pu, (weight.shape[0], weight.shape[1]))
    note = f"{len(library)} patterns, of {len(found)} that {runs} kernels would have had alone"
    return Solved(weight * mask, mask, notes=(note,))
