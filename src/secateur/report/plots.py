"""The plots of a report."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from secateur.report import charts
from secateur.report import values as v
from secateur.report.read import (
    Record,
    block_of,
    kinds_of,
    layer_sparsity_of,
)

_CROWD = 6


def overlay(runs: Sequence[Record], labels: Sequence[str], key: str) -> charts.Chart | None:
    """One line for each run, one value for each block: mean sparsity by parameters, or median error."""
    blocks = sorted({b for run in runs for x in v.maps(run.get("layers")) if (b := block_of(x)) is not None})
    if not blocks:
        return None
    slot = {block: i for i, block in enumerate(blocks)}
    series = []
    for run, label in zip(runs, labels, strict=True):
        cells: dict[int, list[tuple[float, float]]] = {}
        for layer in v.maps(run.get("layers")):
            block, value = block_of(layer), layer_sparsity_of(layer) if key == "sparsity" else v.figure(layer, "error")
            if block is not None and value is not None:
                cells.setdefault(block, []).append((value, v.figure(layer, "parameters") or 1.0))
        points = []
        for block, cell in sorted(cells.items()):
            if key == "sparsity":
                y = sum(x * n for x, n in cell) / sum(n for _, n in cell)
            else:
                y = statistics.median(x for x, _ in cell)
            shown = v.percent(y) if key == "sparsity" else v.small(y)
            points.append(charts.Point(slot[block], y, f"{label}, block {block}|{_NAMES[key][0]} {shown}"))
        series.append(charts.Series(label, points))
    return _draw(series, key, [str(b) for b in blocks], "Block", over="Mean" if key == "sparsity" else "Median")


_NAMES = {"sparsity": ("sparsity", "Sparsity"), "error": ("error", "Relative output error")}


def plots_of(run: Record) -> list[dict[str, Any]]:
    """The plots of one run, with their captions: sparsity and output error by block."""
    layers = v.maps(run.get("layers"))
    blocks = sorted({b for x in layers if (b := block_of(x)) is not None})
    kinds = kinds_of(layers)
    loose = any(block_of(x) is None for x in layers)
    if blocks:
        slot = {block: i for i, block in enumerate(blocks)}
        slots = [str(b) for b in blocks] + (["no block"] if loose else [])
        places = [slot.get(b, len(blocks)) if (b := block_of(x)) is not None else len(blocks) for x in layers]
        x_label = "Block"
    else:
        slots, places, x_label = [str(i) for i in range(len(layers))], list(range(len(layers))), "Layer, in model order"
    plots = []
    for key, title in (("sparsity", "Sparsity of each layer"), ("error", "Output error of each layer")):
        series = {kind: charts.Series(kind) for kind in kinds}
        known: list[tuple[float, str]] = []
        for layer, kind, place in zip(layers, kinds, places, strict=True):
            y = layer_sparsity_of(layer) if key == "sparsity" else v.figure(layer, "error")
            if y is None:
                continue
            name = str(layer.get("name") or "layer")
            tip = f"{name.replace('|', '/')}|{_NAMES[key][0]} {v.percent(y) if key == 'sparsity' else v.small(y)}"
            series[kind].points.append(charts.Point(place, y, tip))
            known.append((y, name))
        for one in series.values():
            one.points = _thinned(one.points)
        if key == "sparsity" and blocks and len(known) > 1 and max(known)[0] - min(known)[0] < 5e-4:
            series = {"": _flat(series.values(), slots)}  # lines on one another would show nothing
        full = [one for one in series.values() if one.points]
        chart = _draw(full, key, slots, x_label, connect=bool(blocks))
        if chart is not None:
            plots.append({"id": key, "title": title, "chart": chart, "caption": _caption(known, key, len(layers))})
    return plots


def _thinned(points: list[charts.Point]) -> list[charts.Point]:
    """Least, middle and greatest of a slot that holds a crowd (the experts of a block)."""
    cells: dict[float, list[charts.Point]] = {}
    for point in points:
        cells.setdefault(point.x, []).append(point)
    kept = []
    for cell in cells.values():
        cell.sort(key=lambda p: p.y)
        kept += cell if len(cell) <= _CROWD else [cell[0], cell[len(cell) // 2], cell[-1]]
    return kept


def _flat(series: Iterable[charts.Series], slots: Sequence[str]) -> charts.Series:
    """One line for layers that all stand at the same sparsity."""
    cells: dict[float, list[charts.Point]] = {}
    for point in sorted((p for one in series for p in one.points), key=lambda p: p.x):
        cells.setdefault(point.x, []).append(point)
    points = [
        charts.Point(x, cell[0].y, f"Block {slots[int(x)]}, every layer|sparsity {v.percent(cell[0].y)}")
        for x, cell in cells.items()
    ]
    return charts.Series("every layer", points)


def _draw(
    series: Sequence[charts.Series],
    key: str,
    slots: Sequence[str],
    x_label: str,
    *,
    over: str = "",
    connect: bool = True,
) -> charts.Chart | None:
    values = [p.y for s in series for p in s.points]
    if not values:
        return None
    name = f"{over} {_NAMES[key][1].lower()}" if over else _NAMES[key][1]
    low, high = min(values), max(values)
    spoken = f"{name} by {x_label.lower()} for {', '.join(s.label for s in series)}."
    if key == "sparsity":
        pad = max(0.02, 0.08 * (high - low))
        wide = (0.0, 1.0) if high - low < 0.02 else (max(0.0, low - pad), min(1.0, high + pad))
        alt = f"{spoken} From {v.percent(low)} to {v.percent(high)}."
        return charts.lines(
            series, y_label=name, x_label=x_label, slots=slots, alt=alt, bounds=wide,
            text=lambda t: v.percent(t), connect=connect,
        )  # fmt: skip
    log = low > 0 and high / low > 8
    alt = f"{spoken} From {v.small(low)} to {v.small(high)}{', logarithmic axis' if log else ''}."
    label = f"{name}, ‖(W − W′)X‖² ÷ ‖WX‖²{' (logarithmic)' if log else ''}"
    bounds = (low, high) if log else (min(0.0, low), high)
    return charts.lines(
        series, y_label=label, x_label=x_label, slots=slots, alt=alt, log=log, bounds=bounds, connect=connect
    )


def _caption(known: Sequence[tuple[float, str]], key: str, total: int) -> str:
    """The plot in words."""
    show = v.percent if key == "sparsity" else v.small
    low, high = min(known), max(known)
    missing = f" {total - len(known)} of {total} layers have none recorded." if len(known) < total else ""
    if show(low[0]) == show(high[0]):
        return (
            f"Every layer stands at {show(low[0])}.{missing}"
            if len(known) > 1
            else f"{low[1]}: {show(low[0])}.{missing}"
        )
    middle = statistics.median(y for y, _ in known)
    said = f"Median {show(middle)}; least {show(low[0])} in {low[1]}, most {show(high[0])} in {high[1]}."
    if key == "error":
        said += " The share of a layer's output, on the calibration inputs, that pruning changed; lower is better."
    return said + missing
