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
from .statistics import LEVEL, Estimate, Floats, mean

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
    both, expected, total = _counts(_Mask.of(left), _Mask.of(right))
    return _ratio(both.sum(), total.sum()), _ratio(expected.sum(), total.sum())


@dataclass(frozen=True)
class _Mask:
    """The bits of all layers, how many positions each layer has, and how many of them it keeps."""

    bits: Bits
    sizes: tuple[int, ...]
    kept: Floats

    @classmethod
    def of(cls, layers: Sequence[Bits]) -> _Mask:
        bits = np.concatenate(layers) if layers else np.zeros(0, bool)
        return cls(bits, tuple(len(layer) for layer in layers), np.array([float(layer.sum()) for layer in layers]))


def _counts(left: _Mask, right: _Mask) -> tuple[Floats, Floats, Floats]:
    """Of every layer: kept by both, expected to be, and kept by either counted twice where by both."""
    ends = np.cumsum(left.sizes, dtype=int)
    so_far = np.concatenate([[0], np.cumsum(left.bits & right.bits)])
    both = np.diff(so_far[ends].astype(float), prepend=0.0)
    return both, left.kept * right.kept / np.maximum(1, left.sizes), left.kept + right.kept


def _ratio(both: float, total: float) -> float | None:
    return float(both / (total - both)) if total else None


def overlaps(rows: Iterable[Row], level: float = LEVEL) -> list[Overlap]:
    """How far masks agree, for every pair of contenders at one target and for each contender under different seeds.

    Pairs of contenders share the seed. Runs without a sketch, and pairs whose sketches have other positions, are out.
    """
    sketches: dict[tuple[str, str], dict[str, dict[int, _Mask]]] = {}
    for (subject, target, label), runs in _final(rows).items():
        masks = {run.seed: _Mask.of(unpack(run.result["sketch"])) for run in runs if run.result.get("sketch")}
        if masks:
            sketches.setdefault((subject, target), {})[label] = masks
    found = []
    for (subject, target), table in sketches.items():
        for a, b in [*((label, label) for label in table), *combinations(table, 2)]:
            if a == b:
                pairs = list(combinations(table[a].values(), 2))
            else:
                pairs = [(table[a][seed], table[b][seed]) for seed in table[a] if seed in table[b]]
            if overlap := _overlap((subject, target, a, b), pairs, level):
                found.append(overlap)
    return found


def _overlap(where: tuple[str, str, str, str], pairs: Sequence[tuple[_Mask, _Mask]], level: float) -> Overlap | None:
    alike = [(x, y) for x, y in pairs if x.sizes == y.sizes == pairs[0][0].sizes and (x.kept.sum() or y.kept.sum())]
    if not alike:
        return None
    both, expected, total = (np.array(of) for of in zip(*(_counts(x, y) for x, y in alike), strict=True))
    whole = mean([_ratio(x, y) for x, y in zip(both.sum(1), total.sum(1), strict=True)], level=level)
    if where[2] == where[3]:
        whole = Estimate(whole.value, None, None, level, whole.n, spread=whole.spread)
    chance = float(np.mean([_ratio(x, y) for x, y in zip(expected.sum(1), total.sum(1), strict=True)]))
    known = total > 0
    with np.errstate(invalid="ignore"):
        shares = [np.where(known, of / np.where(known, total - of, 1.0), 0.0).sum(0) for of in (both, expected)]
    times = known.sum(0)
    layers = tuple((float(x / n), float(y / n)) if n else (None, None) for x, y, n in zip(*shares, times, strict=True))
    return Overlap(*where, whole, chance, layers, len(alike))
