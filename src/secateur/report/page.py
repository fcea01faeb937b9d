"""The page: what the record says, in the order in which a reader asks."""

from __future__ import annotations

import base64
import functools
import hashlib
import io
import json
import os
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup
from ruamel.yaml import YAML
from ruamel.yaml.scalarstring import DoubleQuotedScalarString

from secateur.report import charts
from secateur.report import values as v

Record = Mapping[str, Any]
_HERE = Path(__file__).parent
_SERIES = 14
_CROWD = 6


def render(run: Record, *, compare: Sequence[Record] = ()) -> str:
    """The report of one run as HTML text, beside further runs of the same model where given."""
    others = list(compare)
    runs = others if any(one == run for one in others) else [run, *others]
    script = Markup((_HERE / "report.js").read_text(encoding="utf-8"))
    style = Markup((_HERE / "report.css").read_text(encoding="utf-8"))
    labels = _labels(runs)
    main = next(i for i, one in enumerate(runs) if one is run or one == run)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return _template().render(
        title=f"{labels[main]} · secateur",
        policy=f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:",
        style=style,
        script=script,
        data=_embed({"run": _packed(run), "compare": [_packed(o) for i, o in enumerate(runs) if i != main]}),
        markers=charts.marker_defs(),
        headline=_headline(run),
        subtitle=_subtitle(run),
        tiles=_tiles(run),
        change=_before_after(run),
        checks=_checks(run),
        comparison=_comparison(runs, labels) if len(runs) > 1 else None,
        plots=_plots(run),
        timings=_timings(run),
        layers=_layers(run),
        skipped=v.maps(run.get("skipped")),
        skipped_total=sum(v.figure(s, "parameters") or 0 for s in v.maps(run.get("skipped"))),
        notes=[str(note) for note in v.items(run.get("notes"))],
        layer_notes=_layer_notes(run),
        reproduce=_reproduce(run),
        cite=[str(c) for c in v.items(run.get("cite"))],
        version=v.word(run.get("secateur")),
        created=_when(run.get("created")),
    )


@functools.cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        percent=v.percent, count=v.count, small=v.small, duration=v.duration, shape=v.shape, word=v.word
    )
    return environment.get_template("report.html.j2")


def write_report(path: Path, run: Record, *, compare: Sequence[Record] = ()) -> Path:
    """Write the report beside ``path`` first, then put it in place in one step; returns the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        beside.write_text(render(run, compare=compare), encoding="utf-8", errors="replace")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    return path


# What a run is called and how sparse it is


def _when(created: Any) -> str:
    """A time stamp as a person reads it; any other text as it stands."""
    text = "" if created is None else str(created)
    found = re.fullmatch(r"(\d{4}-\d\d-\d\d)T(\d\d:\d\d)(?::\d\d(?:\.\d+)?)?(?:Z|\+00:00)", text)
    return f"{found[1]}, {found[2]} UTC" if found else text


def _method(run: Record) -> str:
    return str(v.dig(run, "recipe", "method") or v.dig(run, "recipe", "criterion") or "pruning")


def _labels(runs: Sequence[Record]) -> list[str]:
    """A different short name for each run: the method, then its sparsity, then a number."""
    names = [_method(run) for run in runs]
    if len(set(names)) < len(names):
        twice = {name for name in names if names.count(name) > 1}
        names = [
            f"{name} {v.percent(_pruned(run))}" if name in twice else name
            for name, run in zip(names, runs, strict=True)
        ]
    if len(set(names)) < len(names):
        names = [
            f"{name} #{names[: i + 1].count(name)}" if names.count(name) > 1 else name for i, name in enumerate(names)
        ]
    return names


def _layer_sparsity(layer: Record) -> float | None:
    given = v.figure(layer, "sparsity")
    total, kept = v.figure(layer, "parameters"), v.figure(layer, "kept")
    if given is None and total and kept is not None:
        return 1 - kept / total
    return given


def _pruned(run: Record) -> float | None:
    """The sparsity over the pruned layers: recorded, else counted, else what the recipe asked for."""
    given = v.figure(run, "sparsity", "pruned_layers")
    if given is not None:
        return given
    pairs = [(v.figure(x, "parameters"), _layer_sparsity(x)) for x in v.maps(run.get("layers"))]
    known = [(n, s) for n, s in pairs if n and s is not None]
    if known:
        return sum(n * s for n, s in known) / sum(n for n, _ in known)
    return v.figure(run, "recipe", "sparsity")


def _perplexity(run: Record, when: str) -> float | None:
    return v.figure(run, when, "perplexity", "value")


def _same_text(*measured: Any) -> bool:
    """Whether perplexities were taken on the same tokens in the same way, as far as the records tell."""
    for key in ("sha256", "tokens", "windows", "length", "stride"):
        seen = {str(v.dig(m, key)) for m in measured if v.dig(m, "value") is not None and v.dig(m, key) is not None}
        if len(seen) > 1:
            return False
    return True


# The answer


def _headline(run: Record) -> str:
    """The answer in one sentence; it says so where perplexity was not measured."""
    at = _pruned(run)
    who = _method(run) + (f" at {v.percent(at)} sparsity" if at is not None else "")
    before, after = _perplexity(run, "before"), _perplexity(run, "after")
    raw = v.dig(run, "after", "perplexity", "value")
    if after is None:
        if raw is not None:
            return f"{who} leaves a model whose perplexity is not a finite number."
        return f"{who}: perplexity after pruning was not measured, so this run does not say what it costs in quality."
    now = v.measure(after)
    if before is None:
        return f"{who} leaves perplexity at {now}; the dense model was not measured, so the cost is unknown."
    then = v.measure(before)
    if not _same_text(v.dig(run, "before", "perplexity"), v.dig(run, "after", "perplexity")):
        return f"{who}: perplexity {then} before and {now} after, but measured on different text, so not comparable."
    if before > 0 and abs(after / before - 1) < 0.005:
        return f"{who} keeps perplexity where it was: {then} before, {now} after."
    if after < before:
        return f"{who} lowers perplexity from {then} to {now} ({v.ratio(before, after)})."
    return f"{who} raises perplexity from {then} to {now} ({v.ratio(before, after)})."


def _subtitle(run: Record) -> list[str]:
    parts = []
    model = run.get("model")
    if v.dig(model, "class") is not None:
        parts.append(str(v.dig(model, "class")))
    if v.dig(model, "source") is not None:
        parts.append(f"from {v.dig(model, 'source')}")
    if (n := v.figure(model, "parameters")) is not None:
        blocks = v.figure(model, "blocks")
        parts.append(f"{v.short(n)} parameters" + (f" in {v.count(blocks)} blocks" if blocks else ""))
    measured = v.dig(run, "after", "perplexity") or v.dig(run, "before", "perplexity")
    if (tokens := v.figure(measured, "tokens")) is not None:
        text = v.dig(measured, "text")
        parts.append(f"perplexity over {v.count(tokens)} tokens" + (f" of {text}" if text else ""))
    return parts


def _tiles(run: Record) -> list[dict[str, str]]:
    """The figures that most readers came for."""
    before, after = _perplexity(run, "before"), _perplexity(run, "after")
    pruned, whole = _pruned(run), v.figure(run, "sparsity", "model")
    tiles = [
        {
            "name": "Perplexity after pruning",
            "value": "not measured"
            if v.dig(run, "after", "perplexity", "value") is None
            else v.measure(v.dig(run, "after", "perplexity", "value")),
            "detail": f"{v.measure(before)} before; lower is better"
            if before is not None and after is not None
            else "",
        },
        {
            "name": "Zeros in pruned layers",
            "value": v.percent(pruned),
            "detail": f"{v.percent(whole)} of the whole model" if whole is not None else "",
        },
    ]
    total, solve = v.figure(run, "timings", "total"), v.figure(run, "timings", "solve")
    if total is not None:
        detail = f"{v.duration(solve)} of it choosing weights" if solve is not None else ""
        tiles.append({"name": "Time", "value": v.duration(total), "detail": detail})
    if (peak := v.figure(run, "peak_memory")) is not None:
        had = v.figure(run, "machine", "memory")
        detail = f"of {v.size(had)} on this machine" if had else ""
        tiles.append({"name": "Peak memory", "value": v.size(peak), "detail": detail})
    return tiles


def _before_after(run: Record) -> list[tuple[str, str, str, str]]:
    """Rows of the before and after table; a row that neither side measured is left out."""
    b, a = run.get("before"), run.get("after")
    first = v.dig(b, "perplexity", "value")
    last = v.dig(a, "perplexity", "value")
    rows = []
    if first is not None or last is not None:
        rows.append(("Perplexity", v.measure(first), v.measure(last), v.ratio(v.number(first), v.number(last))))
    for key, name, show in (
        ("nonzero", "Nonzero parameters", v.count),
        ("parameters", "Parameters", v.count),
        ("bytes", "Size of the weights", v.size),
        ("seconds", "Time to evaluate", v.duration),
        ("peak_memory", "Peak memory to evaluate", v.size),
    ):
        x, y = v.figure(b, key), v.figure(a, key)
        if x is not None or y is not None:
            rows.append((name, show(x), show(y), v.change(x, y)))
    return rows


def _checks(run: Record) -> list[str]:
    """What the figures themselves give reason to say."""
    said = []
    asked, got = v.figure(run, "recipe", "sparsity"), _pruned(run)
    if asked is not None and got is not None and abs(asked - got) > 0.005:
        said.append(f"The recipe asked for {v.percent(asked)} sparsity; the pruned layers reached {v.percent(got)}.")
    whole = v.figure(run, "sparsity", "model")
    if got is not None and whole is not None and got - whole > 0.02:
        said.append(
            f"{v.percent(got)} counts the pruned layers alone. Over the whole model, with the parameters that were"
            f" skipped, {v.percent(whole)} are zero."
        )
    x, y = v.figure(run, "before", "bytes"), v.figure(run, "after", "bytes")
    if got and x is not None and x == y:
        said.append("The zeros are stored like any other number, so the weights take as much room as before.")
    lost = [e for layer in v.maps(run.get("layers")) if (e := v.figure(layer, "error")) is not None and e > 0.5]
    if lost:
        many = "One layer has" if len(lost) == 1 else f"{len(lost)} layers have"
        said.append(f"{many} a relative output error above 0.5: more than half of the output's energy is gone.")
    return said


# Side by side


def _comparison(runs: Sequence[Record], labels: Sequence[str]) -> dict[str, Any]:
    """Dense and every run in one table, with what makes the comparison unfair said beside it."""
    dense = next((run for run in runs if _perplexity(run, "before") is not None), None)
    base = _perplexity(dense, "before") if dense is not None else None
    after = [_perplexity(run, "after") for run in runs]
    measured = [v.dig(run, "after", "perplexity") for run in runs]
    fair = _same_text(v.dig(dense, "before", "perplexity"), *measured)
    warnings = []
    if not fair:
        warnings.append("Perplexity was not measured on the same tokens in every run, so those figures do not compare.")
    levels = [s for run in runs if (s := _pruned(run)) is not None]
    even = not levels or max(levels) - min(levels) <= 0.01
    if not even:
        warnings.append("The runs differ in sparsity: a lower perplexity may only mean that less was removed.")
    models = {(str(v.dig(r, "model", "source")), str(v.dig(r, "model", "parameters"))) for r in runs}
    if len(models) > 1:
        warnings.append("The records name different models.")
    machines = {str(v.dig(r, "machine", "cpu")) + str(v.dig(r, "machine", "threads")) for r in runs}
    if len(machines) > 1:
        warnings.append("The runs were made on different machines: their times do not compare.")

    rows: list[dict[str, Any]] = []

    def row(name: str, first: str, cells: Sequence[str], best: int | None = None) -> None:
        if any(cell not in (v.NONE, "") for cell in (first, *cells)):
            rows.append({"name": name, "cells": [first, *cells], "best": best})

    finite = [(p, i) for i, p in enumerate(after) if p is not None]
    best = min(finite)[1] + 1 if fair and even and len(finite) > 1 else None
    row("Perplexity", v.measure(base), [v.measure(v.dig(m, "value")) for m in measured], best)
    if fair and base is not None:
        row("… against dense", "1×", [v.ratio(base, p) for p in after])
    row("Sparsity of pruned layers", v.percent(0), [v.percent(_pruned(r)) for r in runs])
    row("Sparsity of the model", v.percent(0), [v.percent(v.figure(r, "sparsity", "model")) for r in runs])
    nonzero = [v.figure(r, "after", "nonzero") for r in runs]
    row("Nonzero parameters", v.count(v.figure(dense, "before", "nonzero")), [v.count(n) for n in nonzero])
    row("Median layer error", v.NONE, [v.small(_median_error(r)) for r in runs])
    row("Time, whole run", v.NONE, [v.duration(v.figure(r, "timings", "total")) for r in runs])
    row("Time, choosing weights", v.NONE, [v.duration(v.figure(r, "timings", "solve")) for r in runs])
    row("Peak memory", v.NONE, [v.size(v.figure(r, "peak_memory")) for r in runs])
    calibration = [v.figure(r, "data", "tokens") for r in runs]
    row("Calibration tokens", v.NONE, [v.count(n) if n is not None else "none" for n in calibration])

    answer = ""
    if best is not None:
        winner = v.measure(after[best - 1])
        against = f", against {v.measure(base)} for the dense model" if base is not None else ""
        answer = f"Of these {len(runs)} runs, {labels[best - 1]} keeps the lowest perplexity: {winner}{against}."
    shown: list[tuple[str, float | None, str]] = [
        ("dense", base, v.measure(base) if base is not None else "not measured")
    ]
    for label, value, m in zip(labels, after, measured, strict=True):
        raw = v.dig(m, "value")
        shown.append((label, value, v.measure(raw) if raw is not None else "not measured"))
    spoken = "; ".join(f"{label} {text}" for label, _, text in shown)
    return {
        "heads": ["dense", *labels],
        "rows": rows,
        "answer": answer,
        "warnings": warnings,
        "perplexity": charts.bars(shown, x_label="Perplexity, lower is better", alt=f"Perplexity. {spoken}.")
        if any(p is not None for p in after)
        else None,
        "error": _overlay(runs, labels, "error"),
        "sparsity": _overlay(runs, labels, "sparsity"),
    }


def _median_error(run: Record) -> float | None:
    known = [e for layer in v.maps(run.get("layers")) if (e := v.figure(layer, "error")) is not None]
    return statistics.median(known) if known else None


def _overlay(runs: Sequence[Record], labels: Sequence[str], key: str) -> charts.Chart | None:
    """One line for each run, one value for each block: mean sparsity by parameters, or median error."""
    blocks = sorted({b for run in runs for x in v.maps(run.get("layers")) if (b := _block(x)) is not None})
    if not blocks:
        return None
    slot = {block: i for i, block in enumerate(blocks)}
    series = []
    for run, label in zip(runs, labels, strict=True):
        cells: dict[int, list[tuple[float, float]]] = {}
        for layer in v.maps(run.get("layers")):
            block, value = _block(layer), _layer_sparsity(layer) if key == "sparsity" else v.figure(layer, "error")
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


# Plots of one run

_NAMES = {"sparsity": ("sparsity", "Sparsity"), "error": ("error", "Relative output error")}


def _block(layer: Record) -> int | None:
    block = layer.get("block")
    return block if isinstance(block, int) and not isinstance(block, bool) else None


def _kinds(layers: Sequence[Record]) -> list[str]:
    """A short type for each layer (``q_proj``), longer only where two types would share a name."""
    tails = []
    for layer in layers:
        parts = str(layer.get("name") or "layer").split(".")
        block = str(_block(layer))
        if block in parts:
            parts = parts[parts.index(block) + 1 :] or parts
            tails.append(tuple("*" if part.isdigit() else part for part in parts))
        else:
            tails.append(tuple([part for part in parts if not part.isdigit()][-1:] or parts[-1:]))
    long: dict[str, set[tuple[str, ...]]] = {}
    for tail in tails:
        long.setdefault(tail[-1], set()).add(tail)
    kinds = [tail[-1] if len(long[tail[-1]]) == 1 and tail[-1] != "*" else ".".join(tail) for tail in tails]
    common = list(dict.fromkeys(kinds))
    if len(common) > _SERIES:
        common = sorted(common, key=lambda kind: -kinds.count(kind))[: _SERIES - 1]
        kinds = [kind if kind in common else "other layers" for kind in kinds]
    return kinds


def _plots(run: Record) -> list[dict[str, Any]]:
    layers = v.maps(run.get("layers"))
    blocks = sorted({b for x in layers if (b := _block(x)) is not None})
    kinds = _kinds(layers)
    loose = any(_block(x) is None for x in layers)
    if blocks:
        slot = {block: i for i, block in enumerate(blocks)}
        slots = [str(b) for b in blocks] + (["no block"] if loose else [])
        places = [slot.get(b, len(blocks)) if (b := _block(x)) is not None else len(blocks) for x in layers]
        x_label = "Block"
    else:
        slots, places, x_label = [str(i) for i in range(len(layers))], list(range(len(layers))), "Layer, in model order"
    plots = []
    for key, title in (("sparsity", "Sparsity of each layer"), ("error", "Output error of each layer")):
        series = {kind: charts.Series(kind) for kind in kinds}
        known: list[tuple[float, str]] = []
        for layer, kind, place in zip(layers, kinds, places, strict=True):
            y = _layer_sparsity(layer) if key == "sparsity" else v.figure(layer, "error")
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


# Tables


_PHASES = {
    "load": "Load the model",
    "calibrate": "Calibrate",
    "solve": "Choose weights",
    "save": "Save",
    "evaluate": "Evaluate",
    "measure": "Measure",
}


def _timings(run: Record) -> list[tuple[str, str, float]]:
    """Phases of the run, with the share of the longest for its bar."""
    given = run.get("timings")
    if not isinstance(given, Mapping):
        return []
    parts = [(str(k), x) for k, value in given.items() if k != "total" and (x := v.number(value)) is not None]
    total = v.figure(given, "total")
    rest = total - sum(x for _, x in parts) if total is not None else 0.0
    if total and parts and rest > 0.02 * total:
        parts.append(("everything else", rest))
    top = max((x for _, x in parts), default=0.0) or 1.0
    return [(_PHASES.get(k, k.capitalize()), v.duration(x), round(max(0.0, 100 * x / top), 1)) for k, x in parts]


def _layers(run: Record) -> list[dict[str, Any]]:
    layers = v.maps(run.get("layers"))
    rows = []
    for layer, kind in zip(layers, _kinds(layers), strict=True):
        rows.append(
            {
                "name": v.word(layer.get("name")),
                "block": _block(layer),
                "kind": kind,
                "shape": layer.get("shape"),
                "parameters": v.figure(layer, "parameters"),
                "kept": v.figure(layer, "kept"),
                "sparsity": (s := _layer_sparsity(layer)),
                "bar": round(100 * min(1.0, max(0.0, s or 0.0)), 1),
                "error": v.figure(layer, "error"),
                "seconds": v.figure(layer, "seconds"),
                "notes": "; ".join(str(note) for note in v.items(layer.get("notes"))),
            }
        )
    return rows


def _layer_notes(run: Record) -> list[tuple[str, list[str]]]:
    """Notes of layers, each said once with the layers that carry it."""
    said: dict[str, list[str]] = {}
    for layer in v.maps(run.get("layers")):
        for note in v.items(layer.get("notes")):
            said.setdefault(str(note), []).append(v.word(layer.get("name")))
    return list(said.items())


def _reproduce(run: Record) -> dict[str, Any]:
    """What somebody else needs to make the same run."""
    facts: list[tuple[str, str, bool]] = []

    def fact(name: str, value: Any, code: bool = False) -> None:
        if value is not None and value != "":
            facts.append((name, str(value), code))

    data = run.get("data")
    fact("Recipe digest", run.get("digest"), True)
    fact("Seed", run.get("seed"))
    fact("Model", v.dig(run, "model", "source"))
    if isinstance(data, Mapping):
        fact("Calibration data", data.get("source"))
        windows, length, tokens = (v.figure(data, key) for key in ("windows", "length", "tokens"))
        if windows is not None and length is not None:
            known = f" = {v.count(tokens)}" if tokens is not None else ""
            fact("Calibration size", f"{v.count(windows)} windows × {v.count(length)} tokens{known}")
        elif tokens is not None:
            fact("Calibration size", f"{v.count(tokens)} tokens")
        fact("Calibration SHA-256", data.get("sha256"), True)
        fact("Tokenizer", data.get("tokenizer"))
    elif "data" in run:
        fact("Calibration data", "none used")
    measured = v.dig(run, "after", "perplexity") or v.dig(run, "before", "perplexity")
    fact("Evaluation text", v.dig(measured, "text"))
    windows, length, stride = (v.figure(measured, key) for key in ("windows", "length", "stride"))
    if windows is not None and length is not None:
        step = f", stride {v.count(stride)}" if stride is not None else ""
        fact("Evaluation size", f"{v.count(windows)} windows × {v.count(length)} tokens{step}")
    fact("Evaluation SHA-256", v.dig(measured, "sha256"), True)
    machine = run.get("machine")
    for key, value in machine.items() if isinstance(machine, Mapping) else ():
        fact(_MACHINE.get(str(key), str(key)), v.size(v.number(value)) if key == "memory" else value)
    versions = run.get("versions")
    pairs = [f"{name} {value}" for name, value in versions.items()] if isinstance(versions, Mapping) else []
    if run.get("secateur") is not None:
        pairs.insert(0, f"secateur {run['secateur']}")
    fact("Versions", ", ".join(dict.fromkeys(pairs)))
    recipe = run.get("recipe")
    command = run.get("command")
    return {
        "command": " ".join(str(c) for c in v.items(command)) if command else "",
        "recipe": _yaml(recipe) if isinstance(recipe, Mapping) and recipe else "",
        "facts": facts,
    }


_MACHINE = {"cpu": "Processor", "threads": "Threads", "memory": "Memory", "gpu": "GPU", "device": "Device"}


def _yaml(value: Record) -> str:
    writer = YAML(typ="rt")
    writer.width = 100
    writer.allow_unicode = True
    text = io.StringIO()
    writer.dump(_quoted(v.plain(value)), text)
    return text.getvalue().rstrip()


def _quoted(value: Any) -> Any:
    """The same with ``2:4`` in quotes, which a YAML 1.1 reader would take for the number 124."""
    if isinstance(value, dict):
        return {key: _quoted(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_quoted(item) for item in value]
    return DoubleQuotedScalarString(value) if isinstance(value, str) and re.fullmatch(r"[\d:]+", value) else value


# The record inside the page


def _packed(run: Record) -> Any:
    """The record for JSON; layers that share their keys become rows, which the script turns back."""
    record = v.plain(run)
    layers = record.get("layers")
    if isinstance(layers, list) and layers and all(isinstance(x, dict) for x in layers):
        columns = list(layers[0])
        if all(list(x) == columns for x in layers):
            record["layers"] = {"columns": columns, "rows": [list(x.values()) for x in layers]}
    return record


def _embed(value: Any) -> Markup:
    """JSON that cannot leave its script element."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for sign in ("<", ">", "&", "\u2028", "\u2029"):
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Markup(text)
