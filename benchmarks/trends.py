"""Methods of before, during and after training on one task: the test metric by method and sparsity, over seeds.

Every run is one line of JSON in ``--out``; a second start goes on with the runs that are missing, and one that was
stopped goes on at its last checkpoint (``--work``). Methods are named on the command line, with what belongs to them:

    trends.py fashion-resnet --methods dense random-erk snip rigl gmp lth "gmp:allocation=global,driver.every=20"

Behind a colon stand fields of the recipe (``allocation=global``) and knobs (``driver.every=20``). ``--set`` gives knobs
to every method that has the axis with that knob.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from pathlib import Path
from typing import Any

from common import RESULTS, environment, table

#: Two-sided 95 % quantiles of Student's t by degrees of freedom.
_T = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", help="a ready task or FILE.py:NAME")
    parser.add_argument("--methods", nargs="+", required=True, help="NAME or NAME:field=value,axis.knob=value")
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.9, 0.95, 0.98, 0.99])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=float)
    parser.add_argument("--task-set", nargs="*", default=[], help="sizes of the task: images=20000")
    parser.add_argument("--set", nargs="*", default=[], help="axis.knob=value, for methods that have it")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, help="JSON lines (default: results/trends-TASK.jsonl)")
    parser.add_argument("--work", type=Path, default=Path("trends-work"), help="checkpoints of the run under way")
    parser.add_argument("--show", action="store_true", help="only print the table of what there is")
    return parser.parse_args()


def value(text: str) -> Any:
    """A number, a truth value or a word."""
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def parsed(text: str) -> tuple[str, dict[str, Any]]:
    """A method as it is written on the command line: its name, and fields of its recipe."""
    name, _, rest = text.partition(":")
    fields: dict[str, Any] = {}
    for item in rest.split(",") if rest else ():
        key, _, given = item.partition("=")
        axis, dot, knob = key.partition(".")
        if dot:
            fields.setdefault("knobs", {}).setdefault(axis, {})[knob] = value(given)
        else:
            fields[key] = value(given)
    return name, fields


def with_knobs(recipe: Any, items: list[str]) -> Any:
    """The recipe with the knobs that its parts have."""
    for item in items:
        key, _, given = item.partition("=")
        axis, _, knob = key.partition(".")
        part = recipe.parts().get(axis)
        if part is not None and knob in part.knobs:
            recipe = recipe.override(knobs={axis: {knob: value(given)}})
    return recipe


def key_of(method: str, sparsity: float, seed: int, args: argparse.Namespace) -> str:
    settings = [args.task, *args.task_set, args.epochs, *args.set, args.threads]
    return json.dumps([method, sparsity, seed, settings])


def one(args: argparse.Namespace, method: str, sparsity: float, seed: int) -> dict[str, Any]:
    """One run; what it takes to draw it into the table."""
    import secateur

    options = {k: value(v) for k, _, v in (x.partition("=") for x in args.task_set)}
    name, fields = parsed(method)
    given: dict[str, Any] = {"seed": seed}
    chosen: Any = None
    if name != "dense":
        base = secateur.Recipe.of(name, **fields)
        chosen, given = name, {**fields, "sparsity": sparsity, "seed": seed}
        knobs = with_knobs(base, args.set).knobs
        if knobs:
            given["knobs"] = {axis: dict(own) for axis, own in knobs.items()}
    safe = "".join(c if c.isalnum() else "-" for c in f"{args.task}-{method}-{sparsity:g}-{seed}")
    out = args.work / safe
    begun = time.perf_counter()
    # The dense run of a seed is trained once for all methods that begin with it.
    made = secateur.train(
        args.task, chosen, epochs=args.epochs, out=out, dense=args.work / "dense", options=options, **given
    )
    import shutil

    shutil.rmtree(out)
    run = made.run
    return {
        "metric": made.metric, "name": run["task"]["metric"], "higher": run["task"]["higher_is_better"],
        "valid": run["curves"][-1]["metric"], "reached": run["sparsity"]["pruned_layers"],
        "nonzero": run["after"]["nonzero"], "parameters": run["after"]["parameters"],
        "dense": (run["before"] or {}).get("metric", {}).get("value"), "epochs": sum_epochs(run),
        "seconds": round(time.perf_counter() - begun, 1), "digest": run["digest"],
    }  # fmt: skip


def sum_epochs(run: dict[str, Any]) -> float:
    """Epochs that were trained in all legs: the price of a method."""
    total, legs = 0.0, {}
    for row in run["curves"]:
        legs.setdefault(row["leg"], []).append(row["epoch"])
    for rows in legs.values():
        step = rows[1] - rows[0] if len(rows) > 1 else min(1.0, rows[0])
        total += rows[-1] - rows[0] + step
    return round(total, 2)


def read(file: Path) -> dict[str, dict[str, Any]]:
    """Runs that are done, by key."""
    if not file.exists():
        return {}
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    return {row["key"]: row for row in rows}


def cell(values: list[float]) -> str:
    """The mean, and half of its 95 % interval by Student's t, where there are seeds enough."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return f"{mean:.4f}"
    t = _T[min(len(values) - 2, len(_T) - 1)]
    return f"{mean:.4f} ± {t * statistics.stdev(values) / math.sqrt(len(values)):.4f}"


def show(args: argparse.Namespace, done: dict[str, dict[str, Any]]) -> str:
    rows = []
    metric = ""
    for method in args.methods:
        cells = [method]
        dense = parsed(method)[0] == "dense"
        cost: list[float] = []
        for sparsity in args.sparsity:
            keys = [key_of(method, 0.0 if dense else sparsity, s, args) for s in range(args.seeds)]
            found = [done[k] for k in keys if k in done]
            cells.append(cell([r["metric"] for r in found]) if found else "–")
            cost += [r["epochs"] for r in found]
            metric = found[0]["name"] if found else metric
        rows.append([*cells, f"{statistics.mean(cost):.1f}" if cost else "–"])
    return table([f"{metric}, test", *(f"{s:.4g}" for s in args.sparsity), "epochs"], rows)


def main() -> None:
    args = arguments()
    import torch

    torch.set_num_threads(args.threads)
    file = args.out or RESULTS / f"trends-{Path(args.task.partition(':')[0]).stem}.jsonl"
    done = read(file)
    plan = [
        (method, 0.0 if parsed(method)[0] == "dense" else sparsity, seed)
        for seed in range(args.seeds)
        for method in args.methods
        for sparsity in args.sparsity
    ]
    for method, sparsity, seed in [] if args.show else dict.fromkeys(plan):
        key = key_of(method, sparsity, seed, args)
        if key in done:
            continue
        result = one(args, method, sparsity, seed)
        row = {
            "key": key, "method": method, "sparsity": sparsity, "seed": seed, **result,
            "settings": {"task": args.task, "task_set": args.task_set, "epochs": args.epochs, "set": args.set},
            "environment": environment(args.threads),
        }  # fmt: skip
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
        done[key] = row
        print(f"seed {seed}: {method} at {sparsity:g}: {row['metric']:.4f}, {row['seconds']:.0f} s", flush=True)
    print(show(args, done))


if __name__ == "__main__":
    main()
