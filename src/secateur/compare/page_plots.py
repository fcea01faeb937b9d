"""The plots of one subject: its score against what each result keeps, needs, and took to make; and its layers."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..report import charts, scatter
from ..report import values as v
from .page_data import Frame

_SHARE = re.compile(r"[\d.]+")


@dataclass(frozen=True)
class Against:
    """What a score is drawn against."""

    key: str
    title: str
    axis: str
    path: tuple[str, ...]
    text: Callable[[float], str]
    more: bool = False
    caption: str = ""


#: Places that are as near as this count as one.
SAME = 0.01

AGAINST = (
    Against(
        "sparsity",
        "Score against sparsity",
        "Sparsity of the pruned layers, as reached",
        ("sparsity",),
        v.percent,
        more=True,
        caption="A curve joins targets that ask for a share; a pattern such as 2:4 stands alone, right of its place.",
    ),
    Against(
        "flops",
        "Score against effective FLOPs",
        "Operations of one forward pass that meet a weight that is not zero",
        ("effective_flops",),
        v.short,
        caption="What a machine would have to do that skips every zero; few machines do.",
    ),
    Against(
        "bytes",
        "Score against bytes",
        "Bytes, a bit for every weight and a value for those that stay",
        ("sparse_bytes",),
        v.size,
    ),
    Against(
        "latency",
        "Score against latency",
        "Time of one forward pass, as measured",
        ("latency", "seconds"),
        v.duration,
    ),
    Against(
        "cost",
        "Score against the cost of pruning",
        "Time of the whole run, measured",
        ("cost", "seconds"),
        v.duration,
        caption="Runs that share a machine disturb each other: read large differences only.",
    ),
)


def tradeoffs(frame: Frame, name: str) -> list[dict[str, Any]]:
    """Score against whatever was measured, each with its front; a close-up beside it where some are far off."""
    made = []
    for one in AGAINST:
        curves = _curves(frame, one)
        spots = [s for c in curves for s in c.spots]
        if not spots or (one.key != "sparsity" and len({round(s.x, 9) for s in spots}) < 2):
            continue
        views = [{"tab": "Whole range", "head": "Whole range", **_drawn(frame, one, curves, f"{name}-{one.key}")}]
        near = close(frame, spots)
        if near is not None:
            shown = [replace(c, spots=[s for s in c.spots if near[0] <= s.y <= near[1]]) for c in curves]
            away = [s for c in curves for s in c.spots if not near[0] <= s.y <= near[1]]
            out = ", ".join(f"{_where(s)} ({frame.show(s.y)})" for s in away[:8])
            more = f" and {len(away) - 8} more" if len(away) > 8 else ""
            drawn = _drawn(frame, one, shown, f"{name}-{one.key}-close", curves, near)
            drawn["caption"] = f"Out of view: {out}{more}. {drawn['caption']}"
            views.append({"tab": "Close-up", "head": "Close-up", **drawn})
        made.append({"title": one.title, "views": views})
    return made


def _front(frame: Frame, one: Against) -> set[tuple[str, str]]:
    """(label, target) of what no other contender beats on both axes; one with a failed run is not on it."""
    known = [
        (label, target, x, found.value)
        for label in frame.labels
        for target in frame.targets
        if (found := frame.score(label, target)) is not None
        and found.value is not None
        and not found.failures
        and (x := frame.figure(label, target, *one.path)) is not None
    ]
    up = 1 if frame.up else -1
    places = [((1 - x) if one.more else x, up * y) for _, _, x, y in known]
    kept = unbeaten(places)
    return {(label, target) for (label, target, _, _), on in zip(known, kept, strict=True) if on}


def unbeaten(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which (cost, gain) no other beats on both; costs within one per cent are equal.

    Counts that are rounded in every row or layer differ a little at one target, which is no reason to be on a front.

    >>> unbeaten([(100.0, 0.9), (100.5, 0.95), (50.0, 0.8), (120.0, 0.95)])
    [False, True, True, False]
    """
    return [
        not any((d > b and c <= a * (1 + SAME)) or (d == b and c < a * (1 - SAME)) for c, d in points)
        for a, b in points
    ]


def _curves(frame: Frame, one: Against) -> list[scatter.Curve]:
    curves = []
    best = _front(frame, one)
    for label in frame.labels:
        curve = scatter.Curve(label, frame.slots[label])
        for target in frame.targets:
            found, x = frame.score(label, target), frame.figure(label, target, *one.path)
            if found is None or found.value is None or x is None:
                continue
            seeds = f"n = {found.n}" if found.n > 1 else "one seed, no interval"
            lost = f", {found.failures} failed" if found.failures else ""
            tip = (
                f"{plain(label)} at {plain(target)}|{frame.metric} {frame.interval(found, bare=True)}|{seeds}{lost}|"
                f"{one.title.removeprefix('Score against ')} {one.text(x)}"
            )
            linked = one.key == "sparsity" and bool(_SHARE.fullmatch(target))
            patterns = [t for t in frame.targets if one.key == "sparsity" and ":" in t]
            aside = 30.0 * (1 + patterns.index(target)) if target in patterns else 0.0
            curve.spots.append(
                scatter.Spot(x, found.value, tip, found.low, found.high, linked, (label, target) in best, aside)
            )
        curves.append(curve)
    return curves


def _log(frame: Frame, spots: Sequence[scatter.Spot]) -> bool:
    return frame.metric == "perplexity" and scatter.wants_log([s.y for s in spots], 3)


def close(frame: Frame, spots: Sequence[scatter.Spot]) -> tuple[float, float] | None:
    """Bounds on y that hold the better half, where the worst are so far off that the rest is one line."""
    log = _log(frame, spots)
    ys = sorted((math.log(s.y) if log else s.y for s in spots), reverse=frame.up)
    best, middle, worst = ys[0], ys[len(ys) // 2], ys[-1]
    if abs(worst - best) <= 6 * abs(middle - best) or middle == best:
        return None
    end = best + 3 * (middle - best)
    low, high = min(best, end), max(best, end)
    return (math.exp(low), math.exp(high)) if log else (low, high)


def _drawn(
    frame: Frame,
    one: Against,
    curves: Sequence[scatter.Curve],
    file: str,
    whole: Sequence[scatter.Curve] = (),
    near: tuple[float, float] | None = None,
) -> dict[str, Any]:
    """A plot with its caption; of ``whole`` the lines are drawn that lead out of view."""
    spots = [s for c in curves for s in c.spots]
    every = [s for c in whole or curves for s in c.spots]
    log_y = _log(frame, spots)
    shown = clipped(curves, log_y, frame)
    xs = [s.x for s in every]
    log_x = not one.more and scatter.wants_log(xs, 8)
    way = "higher" if frame.up else "lower"
    dense = frame.dense
    level = (dense.value, f"dense {frame.show(dense.value)}") if dense is not None and dense.value is not None else None
    seen = [e for c in shown for s in c.spots for e in (s.y, s.low, s.high) if e is not None]
    seen += [*([level[0]] if level else []), *(near or ())]
    y = scatter.Axis(
        f"{frame.metric.capitalize()} on the test data, {way} is better{' (logarithmic)' if log_y else ''}",
        log_y,
        v.percent if frame.metric == "accuracy" else charts.tick_text,
        (min(seen), max(seen)) if log_y else charts.padded(seen),
    )
    x = scatter.Axis(
        one.axis + (" (logarithmic)" if log_x else ""),
        log_x,
        one.text,
        None if log_x else charts.padded(xs, 0.04),
        _unit(max(xs)) if one.key == "bytes" else 1.0,
    )
    alt = (
        f"{one.title} of {', '.join(c.label for c in curves if c.spots)}: {len(spots)} points, {frame.metric} from "
        f"{frame.show(min(s.y for s in spots))} to {frame.show(max(s.y for s in spots))}."
    )
    chart = scatter.scatter(shown, x=x, y=y, alt=alt, level=level, dodge=_dodge(spots), through=whole or None)
    named = [_where(s) for c in curves for s in c.spots if s.front]
    side = "more" if one.more else "less"
    ring = (
        f" A ring marks what no other mean beats on both axes ({side} and {way}; places within one per cent are equal):"
        f" {', '.join(named)}."
        if named
        else ""
    )
    caption = f"Points are means over seeds, bars their {_level(frame)} intervals.{ring} {one.caption}".strip()
    return {"chart": chart, "caption": caption, "file": file, "table": None}


def _unit(most: float) -> float:
    """What bytes are counted in, so that ticks are round."""
    return float(next((u for u in (2**30, 2**20, 2**10) if most >= 2 * u), 1))


def _dodge(spots: Sequence[scatter.Spot]) -> float:
    """How far neighbours stand apart: most where they share their places."""
    low, high = min(s.x for s in spots), max(s.x for s in spots)
    places = len({round((s.x - low) / ((high - low) or 1.0), 2) for s in spots})
    return 3.0 if 2 * places <= len(spots) else 0.0


def _where(spot: scatter.Spot) -> str:
    return spot.tip.split("|", 1)[0]


def _level(frame: Frame) -> str:
    found = next((e.level for e in frame.scores.values()), 0.95)
    return v.percent(found)


def clipped(curves: Sequence[scatter.Curve], log: bool, frame: Frame) -> list[scatter.Curve]:
    """The same with intervals cut that would leave nothing to see of the points: they end at the edge of the plot."""
    ys = [s.y for c in curves for s in c.spots]
    low, high = min(ys), max(ys)
    if log and low > 0:
        bottom, top = low / (high / low) ** 0.25, high * (high / low) ** 0.25
    else:
        room = 0.25 * (high - low) or abs(high) or 1.0
        bottom, top = low - room, high + room
    if frame.metric == "accuracy":
        bottom, top = max(0.0, bottom), min(1.0, top)
    return [
        replace(
            c,
            spots=[
                replace(
                    s,
                    low=None if s.low is None else max(s.low, bottom),
                    high=None if s.high is None else min(s.high, top),
                )
                for s in c.spots
            ],
        )
        for c in curves
    ]


def plain(text: str) -> str:
    """Text inside a tooltip, whose lines are split by a bar."""
    return text.replace("|", "/")
