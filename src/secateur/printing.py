"""Tables and progress for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table


@contextmanager
def bar(console: Console, title: str, total: int | None, show: bool) -> Iterator[Callable[[int, int], None]]:
    """A progress bar, updated by ``(done, of)``; silent when the console is not a terminal."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not (show and console.is_terminal), transient=True) as progress:
        task = progress.add_task(title, total=total)
        yield lambda done, count: progress.update(task, completed=done, total=count)


def size(value: float | None) -> str:
    """Bytes as people read them."""
    return "–" if value is None else f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"


def _pairs() -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim")
    table.add_column()
    return table


def summary(run: dict[str, Any]) -> Table:
    """What a run did."""
    table = _pairs()
    pruned = run["layers"]
    table.add_row("layers", f"{len(pruned)} pruned, {len(run['skipped'])} parameters left alone")
    rate = run["sparsity"]
    table.add_row("sparsity", f"{rate['pruned_layers']:.6f} of these layers, {rate['model']:.4f} of the model")
    errors = [r["error"] for r in pruned if r["error"] is not None]
    if errors:
        table.add_row(
            "output error", f"mean {sum(errors) / len(errors):.4f}, largest {max(errors):.4f} (relative, squared)"
        )
    if run["before"] and run["before"].get("perplexity"):
        b, a = run["before"]["perplexity"], run["after"]["perplexity"]
        table.add_row("perplexity", f"{b['value']:.3f} -> {a['value']:.3f} on {b['tokens']} tokens of {b['text']}")
    table.add_row("time", f"{run['timings']['total']:.1f} s")
    table.add_row("peak memory", size(run["peak_memory"]))
    return table


def _side_by_side(names: Iterable[str]) -> Table:
    """An empty table with a column for each model."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("", style="dim")
    for name in names:
        table.add_column(name, justify="right")
    return table


def measured(found: dict[str, dict[str, Any]]) -> Table:
    """What `secateur.measure` found, a column for each model."""
    table = _side_by_side(found)
    every = list(found.values())
    p = every[0]["perplexity"]
    table.add_row("perplexity", *[f"{m['perplexity']['value']:.4f}" for m in every])
    table.add_row("parameters stored", *[f"{m['parameters']:,}" for m in every])
    table.add_row("parameters non-zero", *[f"{m['nonzero']:,}" for m in every])
    table.add_row("zeros of all parameters", *[f"{1 - m['nonzero'] / m['parameters']:.4f}" for m in every])
    table.add_row("on disk", *[size(m["bytes"]) for m in every])
    table.add_row("time", *[f"{m['seconds']:.1f} s" for m in every])
    table.add_row("peak memory", *[size(m["peak_memory"]) for m in every])
    table.caption = (
        f"{p['tokens']} tokens of {p['text']}: {p['windows']} windows of {p['length']}, stride {p['stride']}"
    )
    table.caption_justify = "left"
    return table


def structured(found: dict[str, dict[str, Any]]) -> Table:
    """A smaller model beside the original, a column for each."""
    table = _side_by_side(found)
    rows = list(found.values())
    if all(m.get("perplexity") for m in rows):
        first = rows[0]["perplexity"]
        table.add_row(f"perplexity ({first['tokens']} tokens)", *[f"{m['perplexity']['value']:.2f}" for m in rows])
    table.add_row("parameters", *[f"{m['parameters']:,}" for m in rows])
    table.add_row("FLOPs of a forward pass", *[f"{m['flops']:,}" for m in rows])
    table.add_row("on disk", *[size(m["bytes"]) if m["bytes"] else "" for m in rows])
    table.add_row("latency", *[f"{1e3 * m['latency']:.2f} ms" for m in rows])
    return table


def packed(found: dict[str, dict[str, Any]]) -> Table:
    """A compressed model beside the dense one, a column for each."""
    table = _side_by_side(found)
    rows = list(found.values())
    if all(m["perplexity"] for m in rows):
        first = rows[0]["perplexity"]
        table.add_row(f"perplexity ({first['tokens']} tokens)", *[f"{m['perplexity']['value']:.4f}" for m in rows])
    table.add_row("parameters stored", *[f"{m['parameters']:,}" for m in rows])
    table.add_row("weights in memory", *[size(m["memory"]) for m in rows])
    table.add_row("on disk", *[size(m["bytes"]) for m in rows])
    for name in rows[0]["latency"]:
        times = [m["latency"][name] for m in rows]
        spread = [f"{1e3 * t['median']:.2f} ms ({1e3 * t['low']:.2f} to {1e3 * t['high']:.2f})" for t in times]
        table.add_row(name, *spread)
        table.add_row("  a second", *[f"{t['rate']:,.1f}" for t in times])
    table.caption = f"medians and quartiles of interleaved runs, {rows[0]['threads']} threads"
    table.caption_justify = "left"
    return table


def compared(result: dict[str, Any], sparsity: float) -> Table:
    """The demonstration's table."""
    table = Table(title=f"SmolLM2-135M at {sparsity:.0%}, held out: {result['text']}", title_justify="left")
    table.add_column("")
    for row in result["rows"]:
        table.add_column(row["name"], justify="right")
    rows = result["rows"]
    table.add_row("perplexity", *[f"{r['perplexity']:.2f}" for r in rows])
    table.add_row("sparsity of pruned layers", *[f"{r['sparsity']:.6f}" for r in rows])
    table.add_row("seconds to prune", *[f"{r['seconds']:.1f}" if r["seconds"] else "–" for r in rows])
    table.add_row("peak memory", *[size(r["peak_memory"]) for r in rows])
    return table
