"""Charts as inline SVG: axes, lines, markers; colours and themes come from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup, escape

WIDTH, HEIGHT = 760, 310
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 34, 48
COLORS = 7

# One shape per colour, so that no series is told by colour alone.
SHAPES = (
    "M-3.2 0a3.2 3.2 0 1 0 6.4 0a3.2 3.2 0 1 0-6.4 0z",
    "M-2.9-2.9h5.8v5.8h-5.8z",
    "M0-3.8L3.8 2.9H-3.8z",
    "M0-4.1L4.1 0L0 4.1L-4.1 0z",
    "M0 3.8L3.8-2.9H-3.8z",
    "M-3.8-1.3h2.5v-2.5h2.6v2.5h2.5v2.6h-2.5v2.5h-2.6v-2.5h-2.5z",
    "M0-4L3.8-1.2L2.4 3.2H-2.4L-3.8-1.2z",
)


@dataclass
class Point:
    """One value: its slot on x, its height, and the text of its tooltip (lines split by ``|``)."""

    x: float
    y: float
    tip: str


@dataclass
class Series:
    """A named line of points; ``slot`` says its colour and shape where the order does not."""

    label: str
    points: list[Point] = field(default_factory=list)
    slot: int | None = None


@dataclass
class Chart:
    """A drawn chart, its legend entries as (index, label) and its alternative text."""

    svg: Markup
    legend: list[tuple[int, str]]
    alt: str


def marker_defs() -> Markup:
    """The marker shapes, to stand once in the page."""
    shapes = "".join(f'<path id="k{i}" d="{d}"/>' for i, d in enumerate(SHAPES))
    return Markup(f'<svg class="defs" width="0" height="0" aria-hidden="true"><defs>{shapes}</defs></svg>')


def linear_ticks(low: float, high: float, target: int = 5) -> list[float]:
    """Round numbers that cover the range."""
    if high <= low:
        high = low + (abs(low) or 1.0)
    raw = (high - low) / target
    base = 10.0 ** math.floor(math.log10(raw))
    step = next(m * base for m in (1, 2, 2.5, 5, 10) if m * base >= raw * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def padded(values: Sequence[float], share: float = 0.05) -> tuple[float, float]:
    """The range of the values with some room; room never crosses zero, nor one where all are shares.

    >>> padded([0.0, 10.0])
    (0.0, 10.5)
    """
    low, high = min(values), max(values)
    pad = share * (high - low) or share * abs(high) or share
    least = 0.0 if low >= 0 else -math.inf
    most = 1.0 if low >= 0 and 0.5 < high <= 1 else 0.0 if high < 0 else math.inf
    return max(least, low - pad), min(most, high + pad)


def log_ticks(low: float, high: float) -> tuple[list[float], list[float]]:
    """Labelled and unlabelled ticks of a logarithmic axis, the labelled covering the range."""
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    stops = [m * 10.0**e for e in range(first, last + 2) for m in (1, 2, 5)]
    bottom = max(t for t in stops if t <= low * 1.0001)
    top = next(t for t in stops if t >= high * 0.9999 and t > bottom * 1.5)
    inside = [t for t in stops if bottom <= t <= top]
    if math.log10(top / bottom) <= 2.2:
        return inside, _between(bottom, top, inside)
    every = math.ceil(math.log10(top / bottom) / 8)
    major = [t for t in inside if _is_decade(t) and (round(math.log10(t)) - first) % every == 0]
    # The ends bound the axis whether or not they carry a label.
    return [bottom, *(t for t in major if bottom < t < top), top], _between(bottom, top, major) if every == 1 else []


def _is_decade(value: float) -> bool:
    return math.isclose(math.log10(value), round(math.log10(value)), abs_tol=1e-9)


def _between(bottom: float, top: float, major: Sequence[float]) -> list[float]:
    """The nine steps of each decade that carry no label."""
    first, last = math.floor(math.log10(bottom)), math.ceil(math.log10(top))
    steps = [m * 10.0**e for e in range(first, last + 1) for m in range(1, 10)]
    return [t for t in steps if bottom < t < top and not any(math.isclose(t, u) for u in major)]


def tick_text(value: float) -> str:
    """A tick's label, without trailing zeros."""
    if value != 0 and (abs(value) < 1e-4 or abs(value) >= 1e6):
        exponent = math.floor(math.log10(abs(value)) + 1e-9)
        mantissa = f"{value / 10.0**exponent:.3g}"
        power = "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
        return power if mantissa == "1" else f"{mantissa}·{power}"
    return f"{value:,.6g}" if abs(value) < 1000 else f"{value:,.0f}"


def n(value: float) -> str:
    """A coordinate: one decimal, none where it is whole."""
    return f"{value:.1f}".removesuffix(".0")


def lines(
    series: Sequence[Series],
    *,
    y_label: str,
    x_label: str,
    slots: Sequence[str],
    alt: str,
    log: bool = False,
    bounds: tuple[float, float] | None = None,
    text: Callable[[float], str] = tick_text,
    connect: bool = True,
) -> Chart | None:
    """Lines with markers over slots (blocks or layers); None when there is no point."""
    values = [p.y for s in series for p in s.points]
    if not values:
        return None
    low, high = bounds or (min(values), max(values))
    minor: list[float] = []
    if log:
        ticks, minor = log_ticks(low, high)
    else:
        ticks = linear_ticks(low, high)
    bottom, top = ticks[0], ticks[-1]

    def scale(value: float) -> float:
        return math.log10(value) if log else value

    span = scale(top) - scale(bottom)
    inner = WIDTH - LEFT - RIGHT
    step = inner / max(1, len(slots))
    nudge = min(step * 0.66 / max(1, len(series)), 6.0)

    def at_x(slot: float, k: int) -> float:
        return LEFT + (slot + 0.5) * step + (k - (len(series) - 1) / 2) * nudge

    def at_y(value: float) -> float:
        return TOP + (1 - (scale(value) - scale(bottom)) / span) * (HEIGHT - TOP - BOTTOM)

    base = HEIGHT - BOTTOM
    out = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(alt)}">']
    out.append(f'<text class="ax" x="0" y="13">{escape(y_label)}</text>')
    out.extend(f'<path class="gm" d="M{LEFT} {n(at_y(t))}H{WIDTH - RIGHT}"/>' for t in minor)
    for tick in ticks:
        y = at_y(tick)
        out.append(f'<path class="gr" d="M{LEFT} {n(y)}H{WIDTH - RIGHT}"/>')
        out.append(f'<text class="ti" x="{LEFT - 8}" y="{n(y + 4)}" text-anchor="end">{escape(text(tick))}</text>')
    out.append(f'<path class="bl" d="M{LEFT} {base}H{WIDTH - RIGHT}"/>')
    for slot in _shown(slots, step):
        x = LEFT + (slot + 0.5) * step
        out.append(f'<path class="bl" d="M{n(x)} {base}v4"/>')
        anchor = "end" if slot == len(slots) - 1 and len(slots[slot]) > 4 else "middle"
        x = WIDTH - RIGHT if anchor == "end" else x
        out.append(f'<text class="ti" x="{n(x)}" y="{base + 18}" text-anchor="{anchor}">{escape(slots[slot])}</text>')
    middle = LEFT + inner / 2
    out.append(f'<text class="ax" x="{n(middle)}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>')
    for order, one in enumerate(series):
        k = order if one.slot is None else one.slot
        out.append(f'<g class="s s{k % COLORS}" data-s="{k}">')
        if connect and len(one.points) > 1:
            groups: dict[float, list[float]] = {}
            for p in one.points:
                groups.setdefault(p.x, []).append(p.y)
            middles = [(x, sorted(ys)[len(ys) // 2]) for x, ys in sorted(groups.items())]
            path = "L".join(f"{n(at_x(x, order))} {n(at_y(y))}" for x, y in middles)
            dash = f' stroke-dasharray="{(5, 2)[k // COLORS % 2]} 3"' if k >= COLORS else ""
            out.append(f'<path class="li"{dash} d="M{path}"/>')
        shape = (k + k // COLORS) % len(SHAPES)
        out.extend(
            f'<use href="#k{shape}" x="{n(at_x(p.x, order))}" y="{n(at_y(p.y))}" data-t="{escape(p.tip)}"/>'
            for p in one.points
        )
        out.append("</g>")
    out.append('<circle class="ring" r="6.5"/></svg>')
    keys = [(k if s.slot is None else s.slot, s.label) for k, s in enumerate(series)]
    return Chart(Markup("".join(out)), keys, alt)


def _shown(slots: Sequence[str], step: float) -> list[int]:
    """The slots whose labels fit: every, every second, every fifth ..."""
    if not slots:
        return []
    words = len(slots) - 1 if not slots[-1].isdigit() else None
    widest = max(len(s) for s in slots[:words]) if slots[:words] else len(slots[0])
    every = next((m for m in (1, 2, 5, 10, 20, 50, 100, 200, 500) if m * step >= 7 * widest + 12), len(slots))
    shown = [i for i in range(len(slots)) if i % every == 0 and i != words]
    if words is not None:
        room = (7 * len(slots[words]) + 16) / step
        shown = [i for i in shown if i < words - room] + [words]
    return shown


def bars(rows: Sequence[tuple[str, float | None, str]], *, x_label: str, alt: str) -> Chart | None:
    """Horizontal bars from zero; dots on a logarithmic axis where values differ more than twentyfold."""
    values = [v for _, v, _ in rows if v is not None and v > 0]
    if not values:
        return None
    log = max(values) / min(values) > 20
    minor: list[float] = []
    if log:
        ticks, minor = log_ticks(min(values) / 1.3, max(values) * 1.1)
    else:
        ticks = linear_ticks(0, max(values))
    left = 24 + min(220, 8 * max(len(label) for label, _, _ in rows))
    right, row, top = 96, 34, 8
    height = top + row * len(rows) + 46
    base = top + row * len(rows)
    inner = WIDTH - left - right

    def at_x(value: float) -> float:
        if log:
            return left + inner * math.log(value / ticks[0]) / math.log(ticks[-1] / ticks[0])
        return left + inner * value / ticks[-1]

    out = [f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(alt)}">']
    out.extend(f'<path class="gm" d="M{n(at_x(t))} {top}V{base}"/>' for t in minor)
    for tick in ticks:
        out.append(f'<path class="gr" d="M{n(at_x(tick))} {top}V{base}"/>')
        shown = escape(tick_text(tick))
        out.append(f'<text class="ti" x="{n(at_x(tick))}" y="{base + 18}" text-anchor="middle">{shown}</text>')
    axis = x_label + (" (logarithmic)" if log else "")
    out.append(
        f'<text class="ax" x="{n(left + inner / 2)}" y="{height - 6}" text-anchor="middle">{escape(axis)}</text>'
    )
    for k, (label, value, beside) in enumerate(rows):
        y = top + row * k + row / 2
        color = "sd" if k == 0 else f"s{(k - 1) % COLORS}"
        name = label if len(label) <= 27 else label[:26] + "…"
        out.append(f'<text class="la" x="{left - 12}" y="{n(y + 4.5)}" text-anchor="end">{escape(name)}</text>')
        end = float(left)
        if value is not None and value > 0:
            end = at_x(value)
            if log:
                out.append(f'<path class="gr" d="M{left} {n(y)}H{n(end)}"/>')
                out.append(f'<circle class="{color}" cx="{n(end)}" cy="{n(y)}" r="6"/>')
            else:
                out.append(f'<rect class="{color}" x="{left}" y="{n(y - 9)}" width="{n(end - left)}" height="18"/>')
        out.append(f'<text class="la" x="{n(end + 12)}" y="{n(y + 4.5)}">{escape(beside)}</text>')
    out.append(f'<path class="bl" d="M{left} {top}V{base}"/></svg>')
    return Chart(Markup("".join(out)), [], alt)
