"""Tables and progress for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
    """Bytes as people read them.

    >>> size(3 * 2**30), size(5 * 2**20), size(1500), size(None)
    ('3.00 GiB', '5 MiB', '1 KiB', '–')
    """
    if value is None:
        return "–"
    if value < 2**20:
        return f"{value / 2**10:.0f} KiB"
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"


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


def _scaled(value: float, unit: str) -> str:
    """A quantity with a prefix that leaves one to three digits before the point.

    >>> _scaled(0.01234, "s"), _scaled(2.5e9, "FLOP"), _scaled(12, "J")
    ('12.34 ms', '2.50 GFLOP', '12.00 J')
    """
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""), (1e-3, "m"), (1e-6, "µ")):
        if value >= factor or prefix == "µ":
            return f"{value / factor:.2f} {prefix}{unit}"
    raise AssertionError


def _spread(found: dict[str, Any], unit: str) -> str:
    """A median and its interval, in one unit."""
    word = _scaled(found["median"], unit)
    number, _, prefixed = word.partition(" ")
    factor = float(number) / found["median"] if found["median"] else 1.0
    return f"{number} {prefixed} ({found['low'] * factor:.2f} to {found['high'] * factor:.2f})"


def measured(found: dict[str, Any]) -> Table:
    """What `figures.figures` found: a column for the model, and one for its baseline."""
    rows = [found, *([found["baseline"]] if found["baseline"] else [])]
    table = Table(box=None, pad_edge=False, header_style="bold", caption_justify="left")
    table.add_column("", style="dim")
    for row in rows:
        table.add_column(row["model"], justify="right", max_width=34, overflow="fold")

    def add(title: str, of: Callable[[dict[str, Any]], str | None]) -> None:
        cells = [of(row) for row in rows]
        if any(cells):
            table.add_row(title, *[cell or "–" for cell in cells])

    add("perplexity", lambda r: r["perplexity"] and f"{r['perplexity']['value']:,.4f}")
    add("parameters stored", lambda r: f"{r['parameters']:,}")
    add("parameters non-zero", lambda r: f"{r['nonzero']:,}")
    add("zeros of stored parameters", lambda r: f"{1 - r['nonzero'] / max(1, r['parameters']):.4f}")
    add("weights in memory", lambda r: size(r["memory"]))
    add("on disk", lambda r: r["bytes"] and size(r["bytes"]))
    add("peak memory, host", lambda r: r["peak_memory"] and size(r["peak_memory"]))
    add("peak memory, GPU", lambda r: r["peak_memory_gpu"] and size(r["peak_memory_gpu"]))
    of = found["setup"]["flops_of"]
    add(f"operations, {of}", lambda r: _scaled(r["flops"], "FLOP"))
    add("  without zero weights", lambda r: _scaled(r["effective_flops"], "FLOP"))

    def add_speed(part: str) -> None:
        items = "tokens/s" if "token" in part else "items/s"
        add(part, lambda r: _spread(r["latency"][part], "s"))
        add("  throughput", lambda r: f"{r['latency'][part]['rate']:,.1f} {items}")
        add("  times as fast", lambda r: _times(r["latency"][part]["ratio"]))
        add("  energy", lambda r: _joules(r["energy"], part))

    for part in found["latency"]:
        add_speed(part)
    table.caption = "\n".join(_notes(found))
    return table


def _times(ratio: dict[str, float] | None) -> str | None:
    return f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})" if ratio else None


def _joules(energy: dict[str, Any] | None, part: str) -> str | None:
    return _spread(energy[part], "J") if energy and part in energy else None


def _notes(found: dict[str, Any]) -> Iterator[str]:
    """How it was measured, and what was not."""
    setup, first = found["setup"], next(iter(found["latency"].values()))
    threads = f"{setup['threads']} thread{'s' if setup['threads'] > 1 else ''}"
    yield (
        f"medians of {setup['turns']} turns after {setup['warmup']} to warm up, {threads}, {setup['device']}; "
        f"{first['coverage']:.0%} intervals"
    )
    if given := setup["generation"]:
        yield f"first token of a prompt of {given['prompt']}; per token of the {given['answer'] - 1} that follow it"
    if p := found["perplexity"]:
        yield f"{p['tokens']} tokens of {p['text']}: {p['windows']} windows of {p['length']}, stride {p['stride']}"
    for row in (found, found["baseline"] or {"missing": {}}):
        for name, reason in row["missing"].items():
            if row is found or reason != found["missing"].get(name):
                yield f"no {name.replace('_', ' ')}: {reason}"


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
