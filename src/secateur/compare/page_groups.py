"""Which classes, or kinds of token, lost most; and how much the seed matters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..report import values as v
from .analysis import sensitivity
from .capability import Capability, Change, capabilities
from .page_data import Frame
from .page_words import changed
from .statistics import Estimate

#: Groups beyond which only those that some method loses most of are shown.
_GROUPS = 14


def losses(frame: Frame) -> list[dict[str, Any]]:
    """The change of every group against dense: one table a target."""
    found: dict[str, list[Capability]] = {}
    for one in capabilities(frame.rows):
        found.setdefault(one.target, []).append(one)
    order = list(dict.fromkeys(str(g) for r in frame.rows if r.done for g in r.result.get("groups") or ()))
    made = []
    for target in frame.targets:
        own = sorted(found.get(target, []), key=lambda c: frame.slots[c.label])
        if not own:
            continue
        groups = _chosen(own, order)
        most = max((_lost(change) for c in own for change in c.groups), default=0.0)
        lines = []
        for one in own:
            by_name = {change.group: change for change in one.groups}
            lines.append((one.label, [_cell(by_name.get(g), most, frame.metric) for g in groups]))
        unit = "points of accuracy" if frame.metric == "accuracy" else f"{frame.metric}"
        if any(c.change.estimate.scale == "ratio" for one in own for c in one.groups):
            unit = f"{frame.metric} as times of dense"
        caption = (
            f"The change against the dense model, in {unit}, mean over seeds. ▼ is shown to be worse than dense; ▼▼ is"
            " shown to lose more than the score as a whole; the groups of one method are corrected for their number."
            " Without a mark no loss is shown."
        )
        table = {"corner": "", "heads": groups, "rows": lines, "caption": caption, "tone": "lost"}
        made.append({"tab": target, "head": f"at target {target}", "chart": None, "table": table})
    return made


def _chosen(own: Sequence[Capability], order: Sequence[str]) -> list[str]:
    """The groups in the order of the data; of many, those with the largest losses."""
    worst: dict[str, float] = {}
    for one in own:
        for change in one.groups:
            worst[change.group] = max(worst.get(change.group, 0.0), _lost(change))
    kept = sorted(worst, key=lambda g: -worst[g])[:_GROUPS]
    return [g for g in order if g in kept]


def _lost(change: Change) -> float:
    """How far a group fell, on the scale of its comparison; 0 where it did not."""
    found = change.change.estimate
    if found.value is None:
        return 0.0
    moved = math.log(found.value) if found.scale == "ratio" else found.value
    return max(0.0, -moved if change.change.higher_is_better else moved)


def _cell(change: Change | None, most: float, metric: str) -> tuple[str, float | None, str]:
    if change is None or change.change.estimate.value is None:
        return v.NONE, None, ""
    text = _short(change.change.estimate, metric)
    mark = ""
    if change.change.verdict == "worse":
        mark = " ▼▼" if change.beyond.verdict == "worse" else " ▼"
    share = _share(_lost(change), most)
    said = f"{change.group}: {changed(change.change.estimate, metric)}, {change.change.text}"
    said += f"; beyond the whole: {change.beyond.text}"
    return text + mark, share, said


def _share(lost: float, most: float) -> float:
    return round(100 * lost / most, 1) if most > 0 else 0.0


def _short(found: Estimate, metric: str) -> str:
    """A change without its interval and unit."""
    bare = Estimate(found.value, None, None, found.level, found.n, scale=found.scale)
    return changed(bare, metric).removesuffix(f"{v.NBSP}points")


def seeds_table(frame: Frame) -> dict[str, Any] | None:
    """The spread over seeds beside the spread between methods, a line a target."""
    lines = []
    ratio = False
    for one in sensitivity(frame.rows):
        ratio = one.scale == "ratio"
        lines.append((one.target, [_spread(x, frame.metric, ratio) for x in (one.seed, one.paired, one.between)] + [
            v.percent(one.share), v.percent(one.flips),
        ]))  # fmt: skip
    if not lines:
        return None
    lines.sort(key=lambda line: frame.targets.index(line[0]))
    unit = " Spreads are of logarithms: 0.01 is one per cent." if ratio else ""
    return {
        "heads": ["Between seeds", "…not shared", "Between methods", "Decided by method", "Pairs turned by a seed"],
        "rows": lines,
        "caption": "Standard deviations of the score: of one method between seeds, the same without what a seed does to"
        " all methods alike, and of the true means of the methods. Then how much of the variance of a single run the"
        f" method decides, and how often a single seed orders a pair of methods against the mean.{unit}",
    }


def _spread(value: float | None, metric: str, ratio: bool) -> str:
    if value is None:
        return v.NONE
    if ratio:
        return v.small(value)
    return f"{100 * value:.2f}{v.NBSP}points" if metric == "accuracy" else v.small(value)
