"""Held-out perplexity of methods at targets, on the demo model. Resumable: each cell is stored as soon as it is done.

``gap closed`` is how much of the perplexity that sparsegpt loses a method wins back:
``(sparsegpt - method) / (sparsegpt - dense)``; 0 is sparsegpt, 1 would be the dense model.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from common import PEER_SCRIPT, RESULTS, axes, child, environment, peer_axes, table, write_json

METHODS = ["magnitude", "wanda", "ria", "dsnot", "sparsegpt", "owl-sparsegpt", "admm", "sparsegpt-blockwise"]
TARGETS = ["0.3", "0.5", "0.6", "0.7", "2:4", "4:8"]
PEER = ["wanda", "sparsegpt"]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--targets", nargs="+", default=TARGETS)
    parser.add_argument("--windows", type=int, default=64, help="of calibration")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--data", default="text:calibration")
    parser.add_argument("--eval-data", default="text:evaluation")
    parser.add_argument("--eval-windows", type=int, help="default: the whole text")
    parser.add_argument("--peer-python", help="interpreter that has llmcompressor: adds its rows")
    parser.add_argument("--peer-targets", nargs="+", default=["0.5"])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--work", type=Path, help="for pruned models, deleted when measured (default: temporary)")
    parser.add_argument("--out", type=Path, default=RESULTS / "quality.json")
    parser.add_argument("--redo", action="store_true", help="measure also what is stored")
    parser.add_argument("--print", action="store_true", help="only print the tables of what is stored")
    return parser.parse_args()


class Bench:
    """The stored cells, and how a missing one is made."""

    def __init__(self, args: argparse.Namespace) -> None:
        import torch

        from secateur.data import windows
        from secateur.models import load_tokenizer, resolve

        torch.set_num_threads(args.threads)
        self.args = args
        self.path = resolve(args.model)
        tokenizer = load_tokenizer(self.path)
        self.tokens = windows(args.data, tokenizer, count=args.windows, length=args.length)
        self.text = windows(args.eval_data, tokenizer, count=args.eval_windows, length=args.length)
        self.result: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {"cells": {}}
        self.work = args.work or Path(tempfile.gettempdir()) / "secateur-quality"

    def group(self, calibration: bool) -> dict[str, Any]:
        """What a cell was measured with; part of its key."""
        data = self.tokens
        return {
            "model": self.args.model,
            "calibration": f"{len(data)}x{data.length}:{data.sha256[:12]}" if calibration else "",
            "evaluation": f"{len(self.text)}x{self.text.length}:{self.text.sha256[:12]}",
        }

    def cell(self, method: str, target: str, digest: str, make: Any, calibration: bool = True) -> None:
        """Make, measure and store one cell unless it is there."""
        group = self.group(calibration)
        key = "|".join([method, target, digest, *group.values()])
        if key in self.result["cells"] and not self.args.redo:
            return
        print(f"{method} {target} ...", flush=True)
        directory, facts = make()
        try:
            from secateur import measure

            found = measure(directory, self.text)
        finally:
            if directory != self.path:
                shutil.rmtree(directory, ignore_errors=True)
        cell = {"method": method, "target": target, "digest": digest, **group, **facts}
        cell.update(perplexity=found["perplexity"]["value"], tokens=found["perplexity"]["tokens"])
        cell.update(nonzero=found["nonzero"], parameters=found["parameters"])
        self.result["cells"][key] = {**cell, "environment": environment(self.args.threads)}
        write_json(self.args.out, self.result)
        print(f"{method} {target}: perplexity {cell['perplexity']:.2f}", flush=True)

    def ours(self, method: str, target: str) -> None:
        from secateur import Recipe, prune_directory

        recipe = Recipe.of(method, **axes(target))

        def make() -> tuple[Path, dict[str, Any]]:
            out = self.work / f"{method}-{target.replace(':', 'of')}-{recipe.digest}"
            shutil.rmtree(out, ignore_errors=True)  # whole, but its measurement was cut off
            self.work.mkdir(parents=True, exist_ok=True)
            run = prune_directory(self.args.model, recipe, out, data=self.tokens)
            facts = {"sparsity": run["sparsity"]["pruned_layers"], "seconds": run["timings"]["prune"]}
            errors = [x["error"] for x in run["layers"] if x["error"] is not None]
            facts["mean_error"] = sum(errors) / len(errors) if errors else None
            return out, {**facts, "peak_memory": run["peak_memory"], "notes": run["notes"]}

        self.cell(method, target, recipe.digest, make, calibration=recipe.needs_data)

    def peer(self, method: str, target: str, version: str) -> None:
        from safetensors.torch import save_file

        def make() -> tuple[Path, dict[str, Any]]:
            self.work.mkdir(parents=True, exist_ok=True)
            out = self.work / f"llm-compressor-{method}-{target.replace(':', 'of')}"
            file = self.work / "windows.safetensors"
            save_file({"ids": self.tokens.ids.contiguous()}, file)
            command = [self.args.peer_python, PEER_SCRIPT, "--model", self.path, "--windows", file, "--out", out]
            command += ["--method", method, *peer_axes(target), "--threads", self.args.threads]
            found = child(command, self.args.threads)
            file.unlink()
            if found["changed_outside"]:
                raise SystemExit(f"llm-compressor changed {found['changed_outside'][0]}, which it must not")
            facts = {k: found[k] for k in ("sparsity", "seconds", "peak_memory", "versions")}
            return out, facts

        self.cell(f"llm-compressor {method}", target, version, make)


def peer_version(python: str) -> str:
    code = "from importlib.metadata import version as v; print(v('llmcompressor'))"
    done = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True)
    return f"llmcompressor {done.stdout.strip()}"


def main() -> None:
    args = arguments()
    if not args.print:
        bench = Bench(args)
        bench.cell("dense", "", "", lambda: (bench.path, {"sparsity": 0.0}), calibration=False)
        version = peer_version(args.peer_python) if args.peer_python else ""
        for target in args.targets:
            for method in args.methods:
                bench.ours(method, target)
            if args.peer_python and target in args.peer_targets:
                for method in PEER:
                    bench.peer(method, target, version)
        if bench.work.exists() and not any(bench.work.iterdir()):
            bench.work.rmdir()
    if not args.out.exists():
        raise SystemExit(f"there is no {args.out} yet: run without --print first")
    print(show(json.loads(args.out.read_text())))


def show(result: dict[str, Any]) -> str:
    """One pair of tables for each setting that was measured."""
    cells = list(result["cells"].values())
    settings = dict.fromkeys((c["model"], c["calibration"], c["evaluation"]) for c in cells if c["calibration"])
    if not settings:
        settings = dict.fromkeys((c["model"], "", c["evaluation"]) for c in cells)
    parts = []
    for model, calibration, evaluation in settings:
        # Methods without data, and the dense model, belong to every calibration.
        here = [
            c
            for c in cells
            if (c["model"], c["evaluation"]) == (model, evaluation) and c["calibration"] in (calibration, "")
        ]
        parts.append(_tables(here, f"{model}; calibration {calibration or 'none'}; evaluation {evaluation}"))
    return "\n\n".join(parts)


def _tables(cells: list[dict[str, Any]], title: str) -> str:
    value = {(c["method"], c["target"]): c["perplexity"] for c in cells}
    dense = value.get(("dense", ""))
    order = {t: k for k, t in enumerate(TARGETS)}
    targets = sorted({c["target"] for c in cells} - {""}, key=lambda t: (order.get(t, len(order)), t))
    rank = {m: k for k, m in enumerate(METHODS)}
    methods = sorted({c["method"] for c in cells} - {"dense"}, key=lambda m: (rank.get(m, len(rank)), m))

    def closed(method: str, target: str) -> str:
        ours, base = value.get((method, target)), value.get(("sparsegpt", target))
        if ours is None or base is None or dense is None or base == dense:
            return ""
        return f"{(base - ours) / (base - dense):+.0%}"

    def number(method: str, target: str) -> str:
        found = value.get((method, target))
        return "" if found is None else f"{found:.2f}" if found < 1000 else f"{found:.3g}"

    head = "" if dense is None else f"dense {dense:.2f}"
    perplexities = table([head, *targets], [[m, *(number(m, t) for t in targets)] for m in methods])
    gaps = table(["gap closed", *targets], [[m, *(closed(m, t) for t in targets)] for m in methods])
    seconds = {(c["method"], c["target"]): c.get("seconds") for c in cells}
    times = [[m, *(f"{s:.0f}" if (s := seconds.get((m, t))) is not None else "" for t in targets)] for m in methods]
    return f"### {title}\n\nPerplexity:\n\n{perplexities}\n\n{gaps}\n\n{table(['seconds', *targets], times)}"


if __name__ == "__main__":
    main()
