"""The demonstration: one real model, three methods, one table."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from .data import EVALUATION
from .directory import prune_directory
from .errors import OutputError
from .quality import measure
from .recipe import Recipe
from .report import write_report

METHODS = ("magnitude", "wanda", "sparsegpt")


def run_demo(
    out: Path,
    sparsity: float,
    windows: int,
    eval_windows: int,
    length: int,
    force: bool,
    step: Callable[[int, int, str], None],
    command: str = "",
) -> dict[str, Any]:
    """Prune the demo model with each method and measure it on the evaluation text that ships with the package.

    Returns:
        The rows of the table (dense first), and where the best model and the report are.
    """
    report = out / "report.html"
    if report.exists() and not force:
        raise OutputError(f"{out} holds an earlier demo: choose another --out, or overwrite it with --force")
    steps = 1 + 2 * len(METHODS)
    step(0, steps, "dense")

    def evaluate(model: str | Path) -> dict[str, Any]:
        return measure(model, EVALUATION, windows_count=eval_windows, length=length)

    dense = evaluate("demo")
    rows = [_row("dense", dense, 0.0, None, dense["peak_memory"])]
    runs = []
    for k, method in enumerate(METHODS):
        step(1 + 2 * k, steps, method)
        target = out / method
        out.mkdir(parents=True, exist_ok=True)
        run = prune_directory(
            "demo",
            Recipe.of(method, sparsity=sparsity),
            target,
            windows_count=windows,
            length=length,
            force=True,
            command=command,
        )
        step(2 + 2 * k, steps, method)
        after = evaluate(target)
        run.update(before=dense, after=after)
        runs.append(run)
        rows.append(_row(method, after, run["sparsity"]["pruned_layers"], run["timings"]["total"], run["peak_memory"]))
    step(steps, steps, "report")
    best = min(range(len(runs)), key=lambda i: runs[i]["after"]["perplexity"]["value"])
    write_report(report, runs[best], compare=[r for i, r in enumerate(runs) if i != best])
    text = dense["perplexity"]
    return {
        "rows": rows,
        "model": out / METHODS[best],
        "report": report,
        "text": f"{text['tokens']} tokens of {text['text']}",
    }


def _row(name: str, found: dict[str, Any], sparsity: float, seconds: float | None, memory: int) -> dict[str, Any]:
    return {
        "name": name,
        "perplexity": found["perplexity"]["value"],
        "sparsity": sparsity,
        "seconds": seconds,
        "peak_memory": memory,
    }
