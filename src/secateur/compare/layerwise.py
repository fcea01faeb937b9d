"""Layer by layer: where each method keeps weights, how far two masks agree, and layers that are gone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np

from .cells import target_key
from .rows import Row
from .sketch import Bits, unpack
from .statistics import LEVEL, Estimate, mean

#: A layer that keeps this fraction of its weights or less is almost gone.
ALMOST = 0.001


@dataclass(frozen=True)
class Layer:
    """One layer of a profile: the fraction of its weights that is kept, over seeds."""

    name: str
    parameters: int
    density: float
    low: float
    high: float


@dataclass(frozen=True)
class Profile:
    """Where a method keeps weights at one target: its layers in the model's order; low and high over ``n`` seeds."""

    subject: str
    target: str
    label: str
    layers: tuple[Layer, ...]
    n: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Overlap:
    """How far the masks of two contenders agree at one target of one subject, at the positions of their sketches.

    Attributes:
        left, right: of the same label it is one contender under two seeds.
        jaccard: kept by both over kept by either, averaged over seeds; of one contender over pairs of seeds, which
            share seeds, so it has no interval.
        expected: the same of independent masks that keep as many in every layer (expected intersection over expected
            union).
        layers: (jaccard, expected) of every layer, averaged; None where neither keeps anything.
        n: pairs of masks.
    """

    subject: str
    target: str
    left: str
    right: str
    jaccard: Estimate
    expected: float
    layers: tuple[tuple[float | None, float | None], ...]
    n: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Gone:
    """Layers that one target took.

    Attributes:
        gone: layers that keep nothing, under some seed.
        almost: layers that keep a fraction of `ALMOST` or less, and something, under some seed.
        seeds: runs with such a layer, of ``n``.
    """

    target: str
    gone: tuple[str, ...]
    almost: tuple[str, ...]
    seeds: int
    n: int


@dataclass(frozen=True)
class Collapse:
    """The targets at which a method takes whole layers, the lowest first; none of them is an answer too."""

    subject: str
    label: str
    targets: tuple[Gone, ...]

    @property
    def first(self) -> str | None:
        """The lowest target at which a layer keeps nothing."""
        return next((found.target for found in self.targets if found.gone), None)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "first": self.first}


def _final(rows: Iterable[Row]) -> dict[tuple[str, str, str], list[Row]]:
    """(subject, target, label) -> runs that are done, of contenders, by seed."""
    found: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if row.role == "final" and row.done and not row.dense:
            found.setdefault((row.subject, row.target, row.label), []).append(row)
    order = sorted(found, key=lambda key: (key[0], target_key(key[1]), key[2]))
    return {key: sorted(found[key], key=lambda row: row.seed) for key in order}


def profiles(rows: Iterable[Row]) -> list[Profile]:
    """The density profile of every contender at every target; runs whose layers differ from the first run's are out."""
    found = []
    for (subject, target, label), runs in _final(rows).items():
        with_layers = [run.result["layers"] for run in runs if run.result.get("layers")]
        if not with_layers:
            continue
        names = [(layer["name"], layer["parameters"]) for layer in with_layers[0]]
        alike = [ls for ls in with_layers if [(layer["name"], layer["parameters"]) for layer in ls] == names]
        kept = np.array([[layer["kept"] for layer in layers] for layers in alike], float)
        density = kept / np.maximum(1, np.array([parameters for _, parameters in names]))
        layers = tuple(
            Layer(name, int(parameters), float(column.mean()), float(column.min()), float(column.max()))
            for (name, parameters), column in zip(names, density.T, strict=True)
        )
        found.append(Profile(subject, target, label, layers, len(alike)))
    return found


def collapses(rows: Iterable[Row], almost: float = ALMOST) -> list[Collapse]:
    """For every contender the targets at which a layer keeps nothing, or almost nothing."""
    found: dict[tuple[str, str], list[Gone]] = {}
    for (subject, target, label), runs in _final(rows).items():
        none: dict[str, None] = {}
        few: dict[str, None] = {}
        seeds = n = 0
        for run in runs:
            layers = run.result.get("layers") or ()
            n += bool(layers)
            gone = [layer["name"] for layer in layers if layer["parameters"] and not layer["kept"]]
            low = [layer["name"] for layer in layers if 0 < layer["kept"] <= almost * layer["parameters"]]
            none.update(dict.fromkeys(gone))
            few.update(dict.fromkeys(low))
            seeds += bool(gone or low)
        targets = found.setdefault((subject, label), [])
        if seeds:
            targets.append(Gone(target, tuple(none), tuple(few), seeds, n))
    return [Collapse(subject, label, tuple(targets)) for (subject, label), targets in found.items()]


def jaccard(left: Sequence[Bits], right: Sequence[Bits]) -> tuple[float | None, float | None]:
    """Kept by both over kept by either, and what independent masks with the same counts would give.

    A random mask that keeps b of N meets one that keeps a in ``a b / N`` positions.

    >>> jaccard([np.array([True, True, False, False])], [np.array([True, False, True, False])])
    (0.3333333333333333, 0.3333333333333333)
    """
    both = sum(int((a & b).sum()) for a, b in zip(left, right, strict=True))
    either = sum(int((a | b).sum()) for a, b in zip(left, right, strict=True))
    chance = sum(int(a.sum()) * int(b.sum()) / max(1, a.size) for a, b in zip(left, right, strict=True))
    total = both + either
    return (both / either, chance / (total - chance)) if either else (None, None)


def overlaps(rows: Iterable[Row], level: float = LEVEL) -> list[Overlap]:
    """How far masks agree, for every pair of contenders at one target and for each contender under different seeds.

    Pairs of contenders share the seed. Runs without a sketch, and pairs whose sketches have other positions, are out.
    """
    sketches: dict[tuple[str, str], dict[str, dict[int, list[Bits]]]] = {}
    for (subject, target, label), runs in _final(rows).items():
        bits = {run.seed: unpack(run.result["sketch"]) for run in runs if run.result.get("sketch")}
        if bits:
            sketches.setdefault((subject, target), {})[label] = bits
    found = []
    for (subject, target), table in sketches.items():
        for a, b in [*((label, label) for label in table), *combinations(table, 2)]:
            if a == b:
                pairs = list(combinations(table[a].values(), 2))
            else:
                pairs = [(table[a][seed], table[b][seed]) for seed in table[a] if seed in table[b]]
            pairs = [(x, y) for x, y in pairs if [len(one) for one in x] == [len(one) for one in y]]
            whole = [(j, e) for j, e in (jaccard(x, y) for x, y in pairs) if j is not None and e is not None]
            if not whole:
                continue
            estimate = mean([j for j, _ in whole], level=level)
            if a == b:
                estimate = Estimate(estimate.value, None, None, level, estimate.n, spread=estimate.spread)
            layers = tuple(
                _averages([jaccard([x[i]], [y[i]]) for x, y in pairs if len(x) == len(pairs[0][0])])
                for i in range(len(pairs[0][0]))
            )
            expected = float(np.mean([e for _, e in whole]))
            found.append(Overlap(subject, target, a, b, estimate, expected, layers, len(whole)))
    return found


def _averages(values: Sequence[tuple[float | None, float | None]]) -> tuple[float | None, float | None]:
    kept = [(j, e) for j, e in values if j is not None and e is not None]
    return (float(np.mean([j for j, _ in kept])), float(np.mean([e for _, e in kept]))) if kept else (None, None)
