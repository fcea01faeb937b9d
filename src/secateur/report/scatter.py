"""Charts over two axes of numbers: points with intervals, curves, a front, a level; and ranks on a line."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup, escape

from secateur.report import charts
from secateur.report.charts import BOTTOM, COLORS, LEFT, RIGHT, TOP, WIDTH, Chart, n, tick_text

HEIGHT = 400


@dataclass
class Spot:
    """One value: its place, its interval on y, its tooltip (lines split by ``|``), and whether a curve goes through.

    ``aside`` moves it on the drawing alone, by so many units, from others at the same place.
    """

    x: float
    y: float
    tip: str
    low: float | None = None
    high: float | None = None
    linked: bool = True
    front: bool = False
    aside: float = 0.0


@dataclass
class Curve:
    """A named set of spots; ``slot`` says which colour and shape it has in every plot of a page."""

    label: str
    slot: int
    spots: list[Spot] = field(default_factory=list)


@dataclass(frozen=True)
class Axis:
    """What an axis is called, and how it runs."""

    label: str
    log: bool = False
    text: Callable[[float], str] = tick_text
    bounds: tuple[float, float] | None = None
    unit: float = 1.0

    def ticks(self, values: Sequence[float]) -> tuple[list[float], list[float]]:
        """Labelled and unlabelled ticks that cover the values."""
        low, high = self.bounds or (min(values), max(values))
        if not self.log:
            return [t * self.unit for t in charts.linear_ticks(low / self.unit, high / self.unit)], []
        return charts.log_ticks(low, high * (1.0001 if high > low else 1.5))


class _Scale:
    """From values to places on the drawing."""

    def __init__(self, axis: Axis, values: Sequence[float], start: float, end: float) -> None:
        self.major, self.minor = axis.ticks(values)
        self.log, self.start, self.end = axis.log, start, end
        self.low, self.high = self._of(self.major[0]), self._of(self.major[-1])

    def _of(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def beyond(self, value: float) -> float:
        """The place, also of what is out of view."""
        if self.log and value <= 0:
            return self.start
        share = (self._of(value) - self.low) / (self.high - self.low)
        return self.start + min(9.0, max(-9.0, share)) * (self.end - self.start)

    def __call__(self, value: float) -> float:
        low, high = sorted((self.start, self.end))
        return min(high, max(low, self.beyond(value)))


def wants_log(values: Sequence[float], times: float = 20) -> bool:
    """Whether a logarithmic axis serves: all positive, and far apart."""
    return bool(values) and min(values) > 0 and max(values) / min(values) > times


def scatter(
    curves: Sequence[Curve],
    *,
    x: Axis,
    y: Axis,
    alt: str,
    level: tuple[float, str] | None = None,
    dodge: float = 0.0,
    through: Sequence[Curve] | None = None,
    height: int = HEIGHT,
) -> Chart | None:
    """Curves with markers and intervals; None when there is no point.

    Args:
        level: a value on y with its name, drawn across: the dense model.
        through: the same curves with the spots that are out of view, for the lines that lead there.
        dodge: how far neighbouring curves stand apart on x, where all share their values.
    """
    spots = [s for c in curves for s in c.spots]
    if not spots:
        return None
    reach = [e for s in spots for e in (s.y, s.low, s.high) if e is not None and (e > 0 or not y.log)]
    if level is not None and (level[0] > 0 or not y.log):
        reach.append(level[0])
    base = height - BOTTOM
    across = _Scale(x, [s.x for s in spots], LEFT + 8, WIDTH - RIGHT - 8)
    up = _Scale(y, reach, base, TOP)
    out = [f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(alt)}">']
    out += _frame(x, y, across, up, base)
    if level is not None:
        at = up(level[0])
        out.append(f'<path class="lv" d="M{LEFT} {n(at)}H{WIDTH - RIGHT}"/>')
        near = [across(s.x) for s in spots if abs(up(s.y) - at) < 40] or [LEFT]
        left = min(near) - LEFT > WIDTH - RIGHT - max(near)
        place, anchor = (LEFT + 6, "start") if left else (WIDTH - RIGHT, "end")
        out.append(f'<text class="ti" x="{place}" y="{n(at - 6)}" text-anchor="{anchor}">{escape(level[1])}</text>')
    front = sorted((across(s.x) + s.aside, up(s.y)) for s in spots if s.front)
    if len(front) > 1:
        way = "L".join(f"{n(a)} {n(b)}" for a, b in front)
        out.append(f'<path class="fr" d="M{way}"/>')
    for k, curve in enumerate(curves):
        shift = (k - (len(curves) - 1) / 2) * dodge
        out += _curve(curve, through[k] if through else curve, across, up, shift, base)
    out.append('<circle class="ring" r="6.5"/></svg>')
    return Chart(Markup("".join(out)), [(c.slot, c.label) for c in curves if c.spots], alt)


def _frame(x: Axis, y: Axis, across: _Scale, up: _Scale, base: float) -> list[str]:
    out = [f'<text class="ax" x="0" y="13">{escape(y.label)}</text>']
    out += [f'<path class="gm" d="M{LEFT} {n(up(t))}H{WIDTH - RIGHT}"/>' for t in up.minor]
    out += [f'<path class="gm" d="M{n(across(t))} {TOP}V{n(base)}"/>' for t in across.minor]
    for tick in up.major:
        out.append(f'<path class="gr" d="M{LEFT} {n(up(tick))}H{WIDTH - RIGHT}"/>')
        out.append(
            f'<text class="ti" x="{LEFT - 8}" y="{n(up(tick) + 4)}" text-anchor="end">{escape(y.text(tick))}</text>'
        )
    last = -math.inf
    for tick in across.major:
        at, text = across(tick), x.text(tick)
        out.append(f'<path class="gr" d="M{n(at)} {TOP}V{n(base)}"/>')
        wide = 7.2 * len(text)
        middle = min(at, WIDTH - wide / 2)
        if middle - last > wide + 8:
            out.append(f'<text class="ti" x="{n(middle)}" y="{n(base + 18)}" text-anchor="middle">')
            out.append(f"{escape(text)}</text>")
            last = middle
    middle = LEFT + (WIDTH - LEFT - RIGHT) / 2
    out.append(f'<path class="bl" d="M{LEFT} {n(base)}H{WIDTH - RIGHT}"/>')
    out.append(f'<text class="ax" x="{n(middle)}" y="{n(base + 42)}" text-anchor="middle">{escape(x.label)}</text>')
    return out


def _curve(curve: Curve, whole: Curve, across: _Scale, up: _Scale, shift: float, base: float) -> list[str]:
    k = curve.slot
    out = [f'<g class="s s{k % COLORS}" data-s="{k}">']
    linked = [s for s in whole.spots if s.linked] if curve.spots else []
    if len(linked) > 1:
        path = "L".join(f"{n(across(s.x) + shift)} {n(up.beyond(s.y))}" for s in linked)
        dash = f' stroke-dasharray="{(5, 2)[k // COLORS % 2]} 3"' if k >= COLORS else ""
        line = f'<path class="li"{dash} d="M{path}"/>'
        if whole is not curve:  # a window: lines that lead out of view end at its edge
            box = f"{LEFT} {TOP} {WIDTH - LEFT - RIGHT} {n(base - TOP)}"
            x, y, wide, high = box.split()
            line = f'<svg x="{x}" y="{y}" width="{wide}" height="{high}" viewBox="{box}" overflow="hidden">{line}</svg>'
        out.append(line)
    for s in curve.spots:
        if s.low is not None and s.high is not None and s.high > s.low:
            at, top, low = across(s.x) + shift + s.aside, up(s.high), up(s.low)
            out.append(
                f'<path class="er" d="M{n(at)} {n(top)}V{n(low)}M{n(at - 3)} {n(top)}h6M{n(at - 3)} {n(low)}h6"/>'
            )
    shape = (k + k // COLORS) % len(charts.SHAPES)
    for s in curve.spots:
        x, y = n(across(s.x) + shift + s.aside), n(up(s.y))
        if s.front:
            out.append(f'<circle class="on" cx="{x}" cy="{y}" r="7.5"/>')
        out.append(f'<use href="#k{shape}" x="{x}" y="{y}" data-t="{escape(s.tip)}"/>')
    out.append("</g>")
    return out


def ranking(
    ranks: Sequence[tuple[str, int, float]],
    groups: Sequence[Sequence[str]],
    *,
    distance: float | None,
    alt: str,
    distance_label: str = "critical difference",
) -> Chart | None:
    """Mean ranks on a line, 1 at the left; a bar joins those whose difference is not shown.

    Args:
        ranks: label, slot and mean rank.
        groups: labels that a bar joins.
        distance: how far apart two ranks must be, where one distance holds for all pairs.
    """
    if len(ranks) < 2:
        return None
    ordered = sorted(ranks, key=lambda r: r[2])
    most = math.ceil(max(r[2] for r in ordered) - 1e-9)
    most = max(most, 2, len(ordered) if len(ordered) <= 12 else most)
    left, right, top = 190, 190, 62
    place = {label: rank for label, _, rank in ordered}
    bars = sorted((min(place[i] for i in g), max(place[i] for i in g)) for g in groups if len(g) > 1)
    half = (len(ordered) + 1) // 2
    under = top + 16 + 9 * len(bars)
    height = under + 26 * half + 10

    def at(rank: float) -> float:
        return left + (rank - 1) / (most - 1) * (WIDTH - left - right)

    out = [f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(alt)}">']
    out.append(f'<path class="bl" d="M{left} {top}H{WIDTH - right}"/>')
    for tick in range(1, most + 1):
        out.append(f'<path class="bl" d="M{n(at(tick))} {top}v-6"/>')
        out.append(f'<text class="ti" x="{n(at(tick))}" y="{top - 11}" text-anchor="middle">{tick}</text>')
    out.append(f'<text class="ax" x="0" y="{top - 11}">Mean rank, 1 is best</text>')
    if distance is not None and distance <= most - 1:
        end = at(1 + distance)
        out.append(f'<path class="cd" d="M{left} 20H{n(end)}M{left} 15v10M{n(end)} 15v10"/>')
        out.append(f'<text class="ti" x="{n(end + 9)}" y="24">{escape(distance_label)} {distance:.2f}</text>')
    for k, (low, high) in enumerate(bars):
        y = top + 13 + 9 * k
        out.append(f'<path class="gb" d="M{n(at(low) - 5)} {y}H{n(at(high) + 5)}"/>')
    for k, (label, slot, rank) in enumerate(ordered):
        first = k < half
        row = k if first else len(ordered) - 1 - k
        y, x = under + 26 * row + 12, at(rank)
        edge, anchor = (left - 12, "end") if first else (WIDTH - right + 12, "start")
        name = label if len(label) <= 20 else label[:19] + "…"
        out.append(f'<g class="s s{slot % COLORS}" data-s="{slot}">')
        out.append(f'<path class="wi" d="M{n(x)} {top}V{n(y)}H{n(edge + (6 if first else -6))}"/>')
        shape = (slot + slot // COLORS) % len(charts.SHAPES)
        tip = f"{label.replace('|', '/')}|mean rank {rank:.2f}"
        out.append(f'<use href="#k{shape}" x="{n(x)}" y="{top}" data-t="{escape(tip)}"/></g>')
        out.append(f'<text class="la" x="{n(edge)}" y="{n(y + 4.5)}" text-anchor="{anchor}">')
        out.append(f"{escape(f'{rank:.2f}  {name}' if not first else f'{name}  {rank:.2f}')}</text>")
    out.append('<circle class="ring" r="6.5"/></svg>')
    return Chart(Markup("".join(out)), [], alt)
