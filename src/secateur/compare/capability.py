"""Which capability was lost: the change of every class, or kind of token, against the dense model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from .cells import Cell, scale_of, target_key
from .rows import Row
from .statistics import on_scale
from .verdicts import PLAIN, Comparison, Rules, compare_cells


@dataclass(frozen=True)
class Change:
    """What pruning did to one group.

    Attributes:
        change: the group pruned against the same group dense; ``worse`` is lost.
        beyond: the change of the group less the change of the score as a whole: ``worse`` lost more than its share.
    """

    group: str
    change: Comparison
    beyond: Comparison


@dataclass(frozen=True)
class Capability:
    """The groups of one contender at one target, the largest loss first.

    All groups are one family: the chance that any is falsely called worse or better is at most 1 - level, for
    ``change`` and for ``beyond`` each. The largest loss is the largest of many: its own mean overstates it.
    """

    subject: str
    target: str
    label: str
    groups: tuple[Change, ...]
    text: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def capabilities(rows: Iterable[Row], rules: Rules = PLAIN) -> list[Capability]:
    """For every contender at every target the change of each group against dense, paired by seed.

    The question, and measuring it beside the change as a whole: Hooker et al., What do compressed deep neural networks
    forget?, arXiv 1911.05248.
    """
    runs: dict[tuple[str, str, str], list[Row]] = {}
    dense: dict[str, list[Row]] = {}
    for row in rows:
        if row.role == "final":
            (dense.setdefault(row.subject, []) if row.dense else runs.setdefault(_key(row), [])).append(row)
    rules = replace(rules, variance="own")
    found = []
    for key in sorted(runs, key=lambda key: (key[0], target_key(key[1]), key[2])):
        ours, theirs = runs[key], dense.get(key[0], [])
        groups = [g for g in _groups(ours) if g in _groups(theirs)]
        if not groups:
            continue
        changes = compare_cells([(_cell(ours, g, False), _cell(theirs, g, False)) for g in groups], rules)
        beyond = compare_cells([(_cell(ours, g, True), _cell(theirs, g, True)) for g in groups], rules)
        scale = scale_of(next((row.metric for row in (*ours, *theirs) if row.metric), ""))
        beyond = [replace(one, estimate=on_scale(one.estimate, scale)) for one in beyond]
        of = [Change(group, a, b) for group, a, b in zip(groups, changes, beyond, strict=True)]
        of.sort(key=lambda change: (_loss(change.change), change.group))
        found.append(Capability(*key, tuple(of), _text(of)))
    return found


def _key(row: Row) -> tuple[str, str, str]:
    return row.subject, row.target, row.label


def _groups(rows: Iterable[Row]) -> list[str]:
    """Groups of all runs that are done, in order."""
    return list(dict.fromkeys(str(g) for row in rows if row.done for g in row.result.get("groups") or ()))


def _loss(change: Comparison) -> float:
    """Sorts the largest loss first, and groups without a figure last."""
    value = change.estimate.value
    if value is None:
        return math.inf
    return value if change.higher_is_better else -value


def _text(changes: Iterable[Change]) -> str:
    changes = list(changes)
    worse = [change.group for change in changes if change.change.verdict == "worse"]
    more = [change.group for change in changes if change.beyond.verdict == "worse"]
    if not worse:
        return f"no group of {len(changes)} is shown to be worse than dense"
    text = f"shown to be worse than dense: {', '.join(worse)}"
    return f"{text}; by more than the whole: {', '.join(more)}" if more else text


def _cell(rows: Iterable[Row], group: str, relative: bool) -> Cell:
    """One group of one contender, seed by seed; relative to the whole score as a difference (of logarithms)."""
    scores: dict[int, float | None] = {}
    some: Mapping[str, Any] = {}
    for row in rows:
        subject, target, label = _key(row)
        some = {"subject": subject, "target": target, "label": label}
        own, whole = (row.figure("groups", group), row.score) if row.done else (None, None)
        scores[row.seed] = own
        if relative:
            scores[row.seed] = None if own is None or whole is None else _apart(own, whole, row.metric)
    done = [row for row in rows if row.done and row.metric]
    metric = done[0].metric if done else ""
    up = done[0].higher_is_better if done else True
    return Cell(
        **some, metric=metric, higher_is_better=up, scale="difference" if relative else scale_of(metric), scores=scores
    )


def _apart(own: float, whole: float, metric: str) -> float | None:
    if scale_of(metric) == "difference":
        return own - whole
    return math.log(own / whole) if own > 0 and whole > 0 else None
