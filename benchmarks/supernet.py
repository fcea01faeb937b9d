"""A sub-network that a search found, beside the same widths from scratch, and pruning with fine-tuning.

All have the same target and the same number of epochs: a dense run, one for all sub-networks, and a quarter of one for
fine-tuning what was found; three of these lengths together from scratch; and a dense run with fine-tuning for the rest.
A step of the supernet trains four sub-networks, so its epochs cost more: seconds are given beside the accuracy.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from common import RESULTS, environment, table, write_json


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--task", default="digits", help="a ready task (secateur tasks)")
    parser.add_argument("--option", nargs="*", default=["width=16"], help="sizes of the task, NAME=NUMBER")
    parser.add_argument("--target", default="flops 50%")
    parser.add_argument("--epochs", type=float, default=5.0, help="of the dense run")
    parser.add_argument("--budget", type=int, default=40, help="sub-networks that the search tries")
    parser.add_argument("--multiple", type=int, default=4, help="widths are multiples of it")
    parser.add_argument("--rate", type=float, default=1.0, help="of fine-tuning after pruning, against the dense run's")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS / "supernet.json")
    return parser.parse_args()


def one(args: argparse.Namespace, seed: int, dense: Path) -> dict[str, Any]:
    """Accuracies on the test data, and seconds, of one seed."""
    import torch

    import secateur

    options = {k: int(v) for k, v in (o.split("=") for o in args.option)}
    common: dict[str, Any] = {"options": options, "seed": seed, "dense": dense}
    rows: dict[str, Any] = {}

    def timed(name: str, made: Any, begun: float) -> None:
        rows[name] = {"accuracy": made.metric, "seconds": time.perf_counter() - begun}

    begun = time.perf_counter()
    timed("dense", secateur.train(args.task, epochs=args.epochs, **common), begun)
    first = rows["dense"]["seconds"]  # the others read the dense run, and have its seconds added
    begun = time.perf_counter() - first
    found = secateur.train(
        args.task, "supernet", target=args.target, epochs=args.epochs,
        knobs={"budget": args.budget, "multiple": args.multiple}, **common,
    )  # fmt: skip
    timed("supernet", found, begun)
    record = found.run["supernet"]
    fresh = copy.deepcopy(found.model)
    torch.manual_seed(1000 + seed)
    for module in fresh.modules():
        if callable(getattr(module, "reset_parameters", None)):
            module.reset_parameters()
    begun = time.perf_counter()
    scratch = secateur.train(args.task, model=fresh, epochs=2.25 * args.epochs, options=options, seed=seed)
    timed("same widths from scratch", scratch, begun)
    begun = time.perf_counter() - first
    pruned = secateur.train(
        args.task, "l1-norm", target=args.target, epochs=args.epochs, recovery="finetune", multiple=args.multiple,
        knobs={"recovery": {"length": 1.25, "rate": args.rate}}, **common,
    )  # fmt: skip
    timed("l1-norm, fine-tuned", pruned, begun)
    return {
        "seed": seed, "rows": rows, "share": record["reached"] / record["total"], "counts": record["counts"],
        "nodes": [n["name"] for n in record["nodes"]],
        "valid": {"uniform": record["trials"][0]["value"], "found": record["valid"]},
    }  # fmt: skip


def main() -> None:
    args = arguments()
    with tempfile.TemporaryDirectory() as folder:
        runs = [one(args, seed, Path(folder)) for seed in range(args.seeds)]
    names = list(runs[0]["rows"])
    write_json(args.out, {
        "environment": environment(), "arguments": {k: str(v) for k, v in vars(args).items()}, "runs": runs,
    })  # fmt: skip
    lines = []
    for name in names:
        values = [r["rows"][name]["accuracy"] for r in runs]
        seconds = statistics.mean(r["rows"][name]["seconds"] for r in runs)
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        lines.append([name, f"{100 * statistics.mean(values):.2f}", f"{100 * spread:.2f}", f"{seconds:.0f}"])
    print(table(["", "accuracy, %", "deviation", "seconds"], lines))
    share = 100 * statistics.mean(r["share"] for r in runs)
    print(f"{args.target} on {args.task}: {share:.1f}% are left; {args.seeds} seeds")


if __name__ == "__main__":
    main()
