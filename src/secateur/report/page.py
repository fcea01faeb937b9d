"""The page: what the record says, in the order in which a reader asks."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Template

from secateur.report import charts, training
from secateur.report import values as v
from secateur.report.plots import overlay, plots_of
from secateur.report.read import (
    Record,
    block_of,
    kinds_of,
    labels_of,
    layer_sparsity_of,
    median_error_of,
    method_of,
    perplexity_of,
    pruned_of,
    same_text,
    when_of,
)
from secateur.report.reproduce import embed, packed, reproduce
from secateur.report.shell import environment, put, shell

_HERE = Path(__file__).parent


def render(run: Record, *, compare: Sequence[Record] = ()) -> str:
    """The report of one run as HTML text, beside further runs of the same model where given."""
    others = list(compare)
    runs = others if any(one == run for one in others) else [run, *others]
    labels = labels_of(runs)
    main = next(i for i, one in enumerate(runs) if one is run or one == run)
    return _template().render(
        title=f"{labels[main]} · secateur",
        **shell(script=(_HERE / "report.js").read_text(encoding="utf-8")),
        data=embed({"run": packed(run), "compare": [packed(o) for i, o in enumerate(runs) if i != main]}),
        headline=_headline(run),
        subtitle=_subtitle(run),
        tiles=_tiles(run),
        change=_before_after(run),
        checks=_checks(run),
        comparison=_comparison(runs, labels) if len(runs) > 1 else None,
        plots=[*training.plots(run), *plots_of(run)],
        timings=_timings(run),
        layers=_layers(run),
        skipped=v.maps(run.get("skipped")),
        skipped_total=sum(v.figure(s, "parameters") or 0 for s in v.maps(run.get("skipped"))),
        notes=[str(note) for note in v.items(run.get("notes"))],
        layer_notes=_layer_notes(run),
        reproduce=reproduce(run),
        cite=[str(c) for c in v.items(run.get("cite"))],
        version=v.word(run.get("secateur")),
        created=when_of(run.get("created")),
    )


@functools.cache
def _template() -> Template:
    return environment(_HERE).get_template("report.html.j2")


def write_report(path: Path, run: Record, *, compare: Sequence[Record] = ()) -> Path:
    """Write the report beside ``path`` first, then put it in place in one step; returns the path."""
    return put(path, render(run, compare=compare))


# The answer


def _headline(run: Record) -> str:
    """The answer in one sentence; it says so where perplexity was not measured."""
    at = pruned_of(run)
    who = method_of(run) + (f" at {v.percent(at)} sparsity" if at is not None else "")
    if (trained := training.headline(run, who)) is not None:
        return trained
    before, after = perplexity_of(run, "before"), perplexity_of(run, "after")
    raw = v.dig(run, "after", "perplexity", "value")
    if after is None:
        if raw is not None:
            return f"{who} leaves a model whose perplexity is not a finite number."
        return f"{who}: perplexity after pruning was not measured, so this run does not say what it costs in quality."
    now = v.measure(after)
    if before is None:
        return f"{who} leaves perplexity at {now}; the dense model was not measured, so the cost is unknown."
    then = v.measure(before)
    if not same_text(v.dig(run, "before", "perplexity"), v.dig(run, "after", "perplexity")):
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
    before, after = perplexity_of(run, "before"), perplexity_of(run, "after")
    pruned, whole = pruned_of(run), v.figure(run, "sparsity", "model")
    tiles = [
        training.tile(run)
        or {
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
    rows = training.rows(run)
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
            # A masked model does the same work: two single timings differ by chance, and no change is claimed.
            claimed = key not in ("seconds", "peak_memory") or v.figure(b, "parameters") != v.figure(a, "parameters")
            rows.append((name, show(x), show(y), v.change(x, y) if claimed else ""))
    return rows


def _checks(run: Record) -> list[str]:
    """What the figures themselves give reason to say."""
    said = []
    asked, got = v.figure(run, "recipe", "sparsity"), pruned_of(run)
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
    dense = next((run for run in runs if perplexity_of(run, "before") is not None), None)
    base = perplexity_of(dense, "before") if dense is not None else None
    after = [perplexity_of(run, "after") for run in runs]
    measured = [v.dig(run, "after", "perplexity") for run in runs]
    fair = same_text(v.dig(dense, "before", "perplexity"), *measured)
    warnings = []
    if not fair:
        warnings.append("Perplexity was not measured on the same tokens in every run, so those figures do not compare.")
    levels = [s for run in runs if (s := pruned_of(run)) is not None]
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
    row("Sparsity of pruned layers", v.percent(0), [v.percent(pruned_of(r)) for r in runs])
    row("Sparsity of the model", v.percent(0), [v.percent(v.figure(r, "sparsity", "model")) for r in runs])
    nonzero = [v.figure(r, "after", "nonzero") for r in runs]
    row("Nonzero parameters", v.count(v.figure(dense, "before", "nonzero")), [v.count(n) for n in nonzero])
    row("Median layer error", v.NONE, [v.small(median_error_of(r)) for r in runs])
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
        "error": overlay(runs, labels, "error"),
        "sparsity": overlay(runs, labels, "sparsity"),
    }


# Plots of one run


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
    for layer, kind in zip(layers, kinds_of(layers), strict=True):
        rows.append(
            {
                "name": v.word(layer.get("name")),
                "block": block_of(layer),
                "kind": kind,
                "shape": layer.get("shape"),
                "parameters": v.figure(layer, "parameters"),
                "kept": v.figure(layer, "kept"),
                "sparsity": (s := layer_sparsity_of(layer)),
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


# The record inside the page
