"""How many units of each family go, so that a target is met."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from ..allocation.fixed import tabled
from ..graph import Family
from ..select import select
from .score import Scores
from .targets import Target

_FLOOR = 0.1  # of a family stays, whatever its scores


def step_of(family: Family, multiple: int) -> int:
    """Units are removed in steps: to a multiple of ``multiple``, or singly where a unit is many positions (a head)."""
    single = all(len(p) == 1 for p in family.units[0].places.values())
    steps = (math.lcm(multiple, family.multiple), family.multiple, multiple)
    return next((n for n in steps if n > 1 and len(family) >= 2 * n), 1) if single else 1


def rounded(family: Family, keep: float, multiple: int) -> int:
    """How many units stay for a fraction: to the nearest multiple, at least one step and the floor."""
    step = step_of(family, multiple)
    least = max(step, -(-int(np.ceil(_FLOOR * len(family))) // step) * step)
    count = round(keep * len(family) / step) * step
    return int(min(len(family), max(least, count)))


def uniform(families: Sequence[Family], scores: Sequence[Scores], keep: float, multiple: int) -> list[int]:
    """Every family keeps the same fraction."""
    return [rounded(f, keep, multiple) for f in families]


def ranked(families: Sequence[Family], scores: Sequence[Scores], keep: float, multiple: int) -> list[int]:
    """One threshold for all families, on scores divided by their family's mean."""
    return _over(families, [s / (s.mean() or 1.0) for s in scores], keep, multiple)


def raw(families: Sequence[Family], scores: Sequence[Scores], keep: float, multiple: int) -> list[int]:
    """One threshold for all families, on the scores as they are."""
    return _over(families, scores, keep, multiple)


def _over(families: Sequence[Family], level: Sequence[Scores], keep: float, multiple: int) -> list[int]:
    """How many units of each family are among the best share of all."""
    everything = np.sort(np.concatenate(level))
    edge = everything[min(len(everything) - 1, int((1 - keep) * len(everything)))]
    above, at = ([int(test(s, edge).sum()) for s in level] for test in (np.greater, np.equal))
    # Scores that are all alike, as those of a fresh batch norm, are shared out, not kept whole.
    share = min(1.0, max(0.0, (keep * len(everything) - sum(above)) / max(sum(at), 1)))
    return [rounded(f, (a + share * e) / len(f), multiple) for f, a, e in zip(families, above, at, strict=True)]


def standardized(families: Sequence[Family], scores: Sequence[Scores], keep: float, multiple: int) -> list[int]:
    """One threshold for all families; the scores come standardized (FLAP, arXiv 2312.11983)."""
    return _over(families, scores, keep, multiple)


def isomorphic(families: Sequence[Family], scores: Sequence[Scores], keep: float, multiple: int) -> list[int]:
    """One threshold for the families of one footprint; every footprint keeps the same share (arXiv 2407.04616)."""
    kinds: dict[str, list[int]] = {}
    for i, family in enumerate(families):
        kinds.setdefault(family.kind, []).append(i)
    counts = [0] * len(families)
    for members in kinds.values():
        found = ranked([families[i] for i in members], [scores[i] for i in members], keep, multiple)
        for i, count in zip(members, found, strict=True):
            counts[i] = count
    return counts


def sizes(family: Family, multiple: int) -> list[int]:
    """How many units of a family may stay: multiples of its step from the floor up, and all of them."""
    step = step_of(family, multiple)
    return [*range(rounded(family, 0.0, multiple), len(family), step), len(family)]


def names_of(families: Sequence[Family]) -> list[str]:
    """The families' names; of several that are called alike, all but the first have a number."""
    seen: dict[str, int] = {}
    found = []
    for family in families:
        seen[family.name] = seen.get(family.name, 0) + 1
        found.append(family.name if seen[family.name] == 1 else f"{family.name} #{seen[family.name]}")
    return found


def explicit(
    families: Sequence[Family], active: Sequence[int], table: Mapping[str, float], sparsity: float, multiple: int
) -> list[int]:
    """What a table says of the active families, to the nearest size; by name, or the name of the tensor."""
    called = {n: [n, n.split(":")[0], n.split(":")[0].removesuffix(".weight")] for n in names_of(families)}
    found = list(tabled(called, table, sparsity).values())
    return [
        min(sizes(families[i], multiple), key=lambda size: abs(size - (1.0 - found[i]) * len(families[i])))
        for i in active
    ]


ALLOCATIONS: dict[str, Callable[[Sequence[Family], Sequence[Scores], float, int], list[int]]] = {
    "uniform": uniform,
    "global": ranked,
    "raw": raw,
    "standardized": standardized,
    "isomorphic": isomorphic,
}


def gone(families: Sequence[Family], scores: Sequence[Scores], counts: Sequence[int]) -> frozenset[int]:
    """The labels that go when each family keeps its best ``count`` units; ties keep the earlier."""
    lost: list[frozenset[int]] = []
    for family, score, count in zip(families, scores, counts, strict=True):
        if count < len(family):
            kept = select(torch.from_numpy(score)[None], count)[0].numpy()
            lost += [family.units[k].gone for k in np.flatnonzero(~kept).tolist()]
    return frozenset().union(*lost)


def meet(
    families: Sequence[Family],
    scores: Sequence[Scores],
    target: Target,
    allocation: str,
    multiple: int,
    counts_of: Callable[[frozenset[int]], int],
) -> tuple[frozenset[int], list[int]]:
    """The largest model within the target, by bisection on the fraction that is kept.

    Args:
        counts_of: how much of the target's quantity is left without these labels.

    Returns:
        The labels that go and how many units each family keeps. Where even the smallest model is above the
        target, that one.
    """
    limit = target.remaining(counts_of(frozenset()))
    low, high = 0.0, 1.0
    best = None
    within: dict[tuple[int, ...], bool] = {}  # the fractions of a search often round to the same sizes
    for _ in range(20):
        keep = (low + high) / 2
        counts = ALLOCATIONS[allocation](families, scores, keep, multiple)
        key = tuple(counts)
        if key not in within:
            labels = gone(families, scores, counts)
            within[key] = counts_of(labels) <= limit
            best = (labels, counts) if within[key] else best
        if within[key]:
            low = keep
        else:
            high = keep
        if high - low < 1e-4:
            break
    if best is None:
        counts = ALLOCATIONS[allocation](families, scores, 0.0, multiple)
        best = (gone(families, scores, counts), counts)
    return best
