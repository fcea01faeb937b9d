"""The best, and those that are not shown to be worse: a set, not a winner."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .cells import Cell, Measure, tables
from .plain import plain_dict
from .rows import Row
from .statistics import LEVEL, Estimate, paired, up
from .verdicts import FEW


@dataclass(frozen=True)
class Beaten:
    """A contender that is shown to be worse than another: by whom, and by how much (the other minus it)."""

    label: str
    by: str
    estimate: Estimate


@dataclass(frozen=True)
class Leaders:
    """The best at one target of one subject, and those that are not shown to be worse than it.

    With a probability of at least ``level`` the contender whose true mean is best is among ``members`` or ``open``,
    whichever it is (one-sided paired t, each contender against all others, after Bonferroni).

    Attributes:
        leader: the member with the best mean; a name to begin with, not a winner.
        members: not shown to be worse than any other, the best mean first.
        beaten: shown to be worse.
        open: label -> why nothing can be said: too few seeds, or runs failed.
        text: all of it in one sentence.
    """

    subject: str
    target: str
    metric: str
    level: float
    leader: str | None
    members: tuple[str, ...]
    beaten: tuple[Beaten, ...]
    open: Mapping[str, str]
    text: str

    def to_dict(self) -> dict[str, Any]:
        return plain_dict(self)


def leaders(rows: Iterable[Row], *, level: float = LEVEL, measure: Measure | None = None) -> list[Leaders]:
    """At every target of every subject the contenders that may be the best; the baseline is left out.

    Source: Gupta, On some multiple decision (selection and ranking) rules, Technometrics 7, 1965, with Bonferroni's
    bound in place of his.
    """
    return [_leaders(table, level) for table in tables(rows, measure).values()]


def _leaders(table: Mapping[str, Cell], level: float) -> Leaders:
    some = next(iter(table.values()))
    usable = [cell for cell in table.values() if len(cell.finite) >= 2]
    others = max(1, len(usable) - 1)
    beaten: dict[str, Beaten] = {}
    for cell in usable:
        for other in usable:
            if other is cell or other.failures:
                continue
            found = paired(other.scores, cell.scores, scale=cell.scale, level=1 - 2 * (1 - level) / others)
            if found.shown != (1 if cell.higher_is_better else -1):
                continue
            held = beaten.get(cell.label)
            if held is None or (found.p or 0.0) < (held.estimate.p or 0.0):
                beaten[cell.label] = Beaten(cell.label, other.label, found)
    undecided = {}
    for label, cell in sorted(table.items()):
        if label not in beaten and cell.failures:
            undecided[label] = f"{cell.failures} of {len(cell.scores)} runs failed"
        elif len(cell.finite) < 2:
            undecided[label] = f"{FEW} (n = {len(cell.finite)})"
    sign = -1 if some.higher_is_better else 1
    means = {cell.label: float(np.mean(up(np.array(list(cell.finite.values())), cell.scale))) for cell in usable}
    members = [cell.label for cell in usable if cell.label not in beaten and cell.label not in undecided]
    members.sort(key=lambda label: (sign * means[label], label))
    text = _sentence(members, len(beaten), len(undecided), max((len(cell.finite) for cell in usable), default=0))
    return Leaders(
        some.subject,
        some.target,
        some.metric,
        level,
        members[0] if members else None,
        tuple(members),
        tuple(beaten[label] for label in sorted(beaten)),
        undecided,
        text,
    )


def _sentence(members: Sequence[str], beaten: int, undecided: int, n: int) -> str:
    rest = f"; of {undecided} nothing can be said" if undecided else ""
    if not members:
        return "no contender can be named" + rest
    if len(members) == 1 and beaten:
        return f"{members[0]} alone is not shown to be worse than another at n = {n}" + rest
    if len(members) == 1:
        return f"{members[0]} has nothing to be compared with" + rest
    return f"{members[0]} has the best mean; not shown to be worse at n = {n}: {', '.join(members[1:])}{rest}"
