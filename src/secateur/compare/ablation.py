"""What each step of a compound brings: the compound beside itself with that step switched off, seed by seed."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .cells import Cell, cells
from .contender import contenders
from .page_tables import Column, Grid
from .page_words import changed
from .rows import Row
from .statistics import Estimate, paired

#: Sizes that are compared beside the score, as they are called.
SIZES = (("parameters", "parameters"), ("nonzero", "not zero"), ("bytes", "bytes"), ("flops", "FLOPs"))


@dataclass(frozen=True)
class Brought:
    """One step: the compound with it against the compound without it.

    Attributes:
        number, step: which.
        whole, without: the cells that are compared.
        sizes: what the compound has over what it has without the step, as `SIZES` names them.
    """

    number: int
    step: str
    whole: Cell
    without: Cell
    sizes: Mapping[str, float | None]

    @property
    def moved(self) -> Estimate:
        """What the step does to the score, with its interval: the difference over seeds, or the ratio."""
        return paired(self.whole.scores, self.without.scores, scale=self.whole.scale)

    @property
    def mean(self) -> float | None:
        """The mean score without the step; geometric where scores multiply."""
        return _mean(self.without)


@dataclass(frozen=True)
class Ablation:
    """A compound at a target of a subject, and what each of its steps brings there."""

    subject: str
    label: str
    target: str
    metric: str
    steps: tuple[Brought, ...]

    @property
    def mean(self) -> float | None:
        """The mean score with all steps."""
        return _mean(self.steps[0].whole)


def ablations(study: Mapping[str, Any], rows: Iterable[Row]) -> list[Ablation]:
    """Those of a study, as plain data, whose runs are there with and without each step."""
    rows = list(rows)
    found = []
    methods = study.get("methods")
    methods = methods if isinstance(methods, (list, tuple)) else ()
    asked = [m for m in methods if isinstance(m, Mapping) and m.get("ablate")]
    table = cells(rows) if asked else {}
    for entry in asked:
        whole, *variants = contenders(entry)
        for subject, target in sorted({(s, t) for s, t, label in table if label == whole.label}):
            steps = []
            for variant in variants:
                there = table.get((subject, target, variant.label))
                if there is not None and variant.off is not None:
                    sizes = {
                        key: _ratio(rows, subject, target, whole.label, variant.label, key) for key, _ in SIZES
                    }  # fmt: skip
                    base = table[subject, target, whole.label]
                    steps.append(Brought(variant.off, variant.without, base, there, sizes))
            if steps:
                found.append(Ablation(subject, whole.label, target, steps[0].whole.metric, tuple(steps)))
    return found


def _ratio(rows: Sequence[Row], subject: str, target: str, whole: str, without: str, key: str) -> float | None:
    def mean(label: str) -> float | None:
        own = [r for r in rows if (r.subject, r.target, r.label, r.role) == (subject, target, label, "final")]
        values = [x for r in own if r.done and (x := r.figure(key)) is not None]
        return statistics.mean(values) if values else None

    above, below = mean(whole), mean(without)
    return None if above is None or not below else above / below


def _mean(cell: Cell) -> float | None:
    values = list(cell.finite.values())
    if not values:
        return None
    return statistics.geometric_mean(values) if cell.scale == "ratio" else statistics.mean(values)


def text(found: Sequence[Ablation]) -> list[str]:
    """Lines for a terminal."""
    lines = []
    for one in found:
        wide = max(len(s.step) for s in one.steps) + 6
        mean = "no score" if one.mean is None else f"{one.mean:.4g}"
        lines += [
            f"what each step of {one.label} brings at {one.target}: {one.metric} {mean} with all of them",
            f"{'without':{wide}}{one.metric:>12}" + "".join(f"{name + ' x':>14}" for _, name in SIZES),
        ]
        for s in one.steps:
            score = "failed" if s.mean is None else f"{s.mean:.4g}"
            sizes = "".join(f"{'-' if (x := s.sizes[k]) is None else format(x, '.3f'):>14}" for k, _ in SIZES)
            lines.append(f"{f'  {s.number}  {s.step}':{wide}}{score:>12}{sizes}")
        lines += ["(sizes: with the step, over without it)", ""]
    return lines


def grids(found: Sequence[Ablation]) -> list[tuple[str, Grid]]:
    """A table for each, for the report."""
    made = []
    for k, one in enumerate(found):
        heads = [
            Column("Step"), Column(f"{one.metric.capitalize()} without it", True), Column("What it does to that", True),
            *(Column(f"{name[0].upper()}{name[1:]}, with it over without", True) for _, name in SIZES),
        ]  # fmt: skip
        title = f"{one.label} on {one.subject} at {one.target}"
        grid = Grid(f"steps-{k}", f"what each step of {title} brings", heads)
        for s in one.steps:
            moved = s.moved
            score = "–" if s.mean is None else f"{s.mean:.4g}"
            ratios = [(("–", None) if (x := s.sizes[key]) is None else (f"{x:.3f}×", x)) for key, _ in SIZES]
            cell: tuple[str, Any] = (changed(moved, one.metric), moved.value)
            grid.rows.append([(f"{s.number} {s.step}", None), (score, s.mean), cell, *ratios])
        made.append((title, grid))
    return made
