"""Ranks over tasks and targets: Friedman's test, Nemenyi's critical difference, and the data of its plot."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from ..errors import DataError
from .cells import Cell, Measure, tables
from .rows import Row
from .statistics import LEVEL, Floats, stats, up


@dataclass(frozen=True)
class Ranks:
    """Mean ranks of contenders, 1 the best, and which of them are not shown to differ.

    Attributes:
        labels, means: contenders, the best mean rank first, and their mean ranks.
        blocks: what was ranked within: ``subject at target``, or a subject.
        table: label -> its rank in each block.
        statistic, p: Friedman's chi square, corrected for ties, and its p.
        f, f_p: the less timid form of it after Iman and Davenport.
        critical: mean ranks that lie this far apart or further differ (Nemenyi).
        groups: largest runs of contenders that are not shown to differ, the bars of the plot.
        shown: whether Friedman's test (the form f) shows that contenders differ at all; if not, no pair does.
        left_out: contenders and blocks that have holes, and were left out.
        text: what it says.
    """

    labels: tuple[str, ...]
    means: tuple[float, ...]
    blocks: tuple[str, ...]
    table: Mapping[str, tuple[float, ...]]
    level: float
    statistic: float | None
    p: float | None
    f: float | None
    f_p: float | None
    critical: float | None
    groups: tuple[tuple[str, ...], ...]
    shown: bool
    left_out: tuple[str, ...]
    text: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def friedman(ranks_nk: Floats) -> tuple[float, float, float, float]:
    """Friedman's chi square with its p, and Iman and Davenport's F with its p, of ranks (blocks, contenders).

    >>> chi, p, f, f_p = friedman(np.array([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [2.0, 1.0, 3.0]]))
    >>> round(chi, 3), round(p, 3), round(f, 1), round(f_p, 3)
    (4.667, 0.097, 7.0, 0.049)

    Source: Demšar, Statistical comparisons of classifiers over multiple data sets, JMLR 7, 2006, section 3.2.2.
    """
    n, k = ranks_nk.shape
    ties = sum(float((c**3 - c).sum()) for c in (np.unique(row, return_counts=True)[1] for row in ranks_nk))
    rest = 1 - ties / (n * k * (k * k - 1))
    if rest <= 0:  # all contenders tie in every block
        return 0.0, 1.0, 0.0, 1.0
    chi = 12 * n / (k * (k + 1)) * float(((ranks_nk.mean(0) - (k + 1) / 2) ** 2).sum()) / rest
    p = float(stats().chi2.sf(chi, k - 1))
    room = n * (k - 1) - chi
    f = (n - 1) * chi / room if room > 1e-9 else math.inf
    f_p = float(stats().f.sf(f, k - 1, (k - 1) * (n - 1))) if math.isfinite(f) else 0.0
    return chi, p, f, f_p


def critical_difference(contenders: int, blocks: int, level: float = LEVEL) -> float:
    """Mean ranks of equal contenders lie further apart with a probability of at most ``1 - level`` (Nemenyi).

    :: q sqrt(k (k + 1) / (6 N))

    >>> round(critical_difference(4, 14, 0.9), 2)  # section 3.2.4 of the source: 2.291 sqrt(20 / 84)
    1.12

    Source: Demšar, Statistical comparisons of classifiers over multiple data sets, JMLR 7, 2006, table 5.
    """
    k = contenders
    return nemenyi(k, level) * math.sqrt(k * (k + 1) / (6 * blocks))


def nemenyi(contenders: int, level: float = LEVEL) -> float:
    """The critical value q: of the studentized range with endless degrees of freedom, over the root of two.

    >>> round(nemenyi(4), 3)
    2.569
    """
    return float(stats().studentized_range.ppf(level, contenders, math.inf)) / math.sqrt(2)


def groups_of(means: Sequence[float], critical: float) -> list[tuple[int, int]]:
    """Largest runs (first, last) of sorted mean ranks whose ends lie nearer than the critical difference.

    >>> groups_of([1.0, 1.5, 2.2, 4.0], 1.0)
    [(0, 1), (1, 2)]
    """
    found: list[tuple[int, int]] = []
    for first in range(len(means)):
        last = max(j for j in range(first, len(means)) if j == first or means[j] - means[first] < critical)
        if last > first and (not found or last > found[-1][1]):
            found.append((first, last))
    return found


def rank(
    rows: Iterable[Row],
    *,
    by: Literal["target", "subject"] = "target",
    level: float = LEVEL,
    measure: Measure | None = None,
) -> Ranks:
    """Ranks of the contenders within every block, by their means over the seeds that all of a block have.

    What failed in a block, if only in one run, is last there. Ties share their ranks. Where some contender lacks a
    block, contenders and blocks with the largest share of holes are left out until there are none.

    Args:
        by: ``target``: a subject at a target is a block. The test takes blocks for independent, which targets of one
            subject are not, so its p is too small; ``subject`` is right and needs many subjects.
    """
    if by not in ("target", "subject"):
        raise DataError(f"ranks are taken by target or by subject, not by '{by}'")
    grid = tables(rows, measure)
    labels, keys, left_out = _full({key: set(table) for key, table in grid.items()})
    ranked = {key: _ranks([grid[key][label] for label in labels]) for key in keys}
    if by == "subject":
        subjects = sorted({subject for subject, _ in keys})
        means = [np.mean([ranked[key] for key in keys if key[0] == subject], axis=0) for subject in subjects]
        names, matrix = subjects, [stats().rankdata(of_subject) for of_subject in means]
    else:
        names, matrix = [f"{s} at {t}" for s, t in keys], list(ranked.values())
    n, k = len(names), len(labels)
    if n < 2 or k < 2:
        text = f"ranks need two contenders in two blocks, and there are {k} in {n}"
        table = {label: tuple(float(row[i]) for row in matrix) for i, label in enumerate(labels)}
        order = sorted(labels, key=lambda label: (np.mean(table[label]), label))
        mean_ranks = tuple(float(np.mean(table[label])) for label in order)
        return Ranks(
            tuple(order),
            mean_ranks,
            tuple(names),
            table,
            level,
            statistic=None,
            p=None,
            f=None,
            f_p=None,
            critical=None,
            groups=(),
            shown=False,
            left_out=left_out,
            text=text,
        )
    whole = np.array(matrix)
    chi, p, f, f_p = friedman(whole)
    critical = critical_difference(k, n, level)
    best = sorted(range(k), key=lambda i: (whole[:, i].mean(), labels[i]))
    means_of = [float(whole[:, i].mean()) for i in best]
    order = [labels[i] for i in best]
    shown = f_p <= 1 - level
    runs = groups_of(means_of, critical) if shown else [(0, k - 1)]
    return Ranks(
        tuple(order),
        tuple(means_of),
        tuple(names),
        {labels[i]: tuple(float(x) for x in whole[:, i]) for i in best},
        level,
        chi,
        p,
        f,
        f_p,
        critical,
        tuple(tuple(order[first : last + 1]) for first, last in runs),
        shown,
        left_out,
        _text(order, means_of, critical, shown, n),
    )


def _text(order: Sequence[str], means: Sequence[float], critical: float, shown: bool, n: int) -> str:
    if not shown:
        return f"no difference between the ranks of {len(order)} contenders shown in {n} blocks"
    behind = [label for label, rank in zip(order, means, strict=True) if rank - means[0] >= critical]
    if not behind:
        return f"contenders differ in {n} blocks, but none is shown to rank behind {order[0]}, which ranks best"
    return f"{order[0]} ranks best in {n} blocks; shown to rank behind it: {', '.join(behind)}"


def _ranks(row: Sequence[Cell]) -> Floats:
    """Ranks of the contenders of one block, 1 the best."""
    whole = [set(cell.finite) for cell in row if not cell.failures]
    seeds = set.intersection(*whole) if whole else set()
    values = []
    for cell in row:
        if cell.failures or not cell.finite:
            values.append(math.inf)
            continue
        scores = [score for seed, score in cell.finite.items() if seed in seeds or not seeds]
        mean = float(np.mean(up(np.array(scores), cell.scale)))
        values.append(-mean if cell.higher_is_better else mean)
    ranks: Floats = stats().rankdata(values)
    return ranks


def _full(
    present: Mapping[tuple[str, str], set[str]],
) -> tuple[list[str], list[tuple[str, str]], tuple[str, ...]]:
    """Contenders and blocks without holes; whichever has the largest share of holes goes first."""
    keys, labels = list(present), sorted(set().union(*present.values()))
    left_out: list[str] = []
    while keys and labels:
        by_label = {label: sum(label not in present[key] for key in keys) / len(keys) for label in labels}
        by_key = {key: sum(label not in present[key] for label in labels) / len(labels) for key in keys}
        label = max(by_label, key=lambda label: (by_label[label], label))
        key = max(by_key, key=lambda key: (by_key[key], key))
        if by_label[label] == 0:
            break
        if by_label[label] >= by_key[key]:
            left_out.append(label)
            labels.remove(label)
        else:
            left_out.append(f"{key[0]} at {key[1]}")
            keys.remove(key)
    return labels, keys, tuple(left_out)
