"""Ratios found by search against the uniform allocation, at the same target and without fine-tuning.

A small convolutional network is trained on a part of Fashion-MNIST. Every strategy has the same number of evaluations
on images that were held out of the training set; what it found is then measured once on the test set. Before each
evaluation, and on the test set, the statistics of batch norms are measured anew on training images.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

from common import RESULTS, environment, table, write_json
from fashion import accuracy, read, train

STRATEGIES = ["random-search", "evolution", "bayesian", "amc", "graph"]

#: Name -> method, and what is asked of it.
CASES: dict[str, dict[str, Any]] = {
    "weights 90%": {"method": "magnitude", "sparsity": 0.9},
    "FLOPs 50%": {"method": "l1-norm", "target": "flops 50%", "multiple": 4},
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"), help="*-ubyte.gz files")
    parser.add_argument("--strategies", nargs="+", default=STRATEGIES)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--images", type=int, default=10000, help="of the training set")
    parser.add_argument("--held-out", type=int, default=500, help="images of the training set that searches look at")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--budget", type=int, default=30, help="evaluations of each search")
    parser.add_argument("--calibration", type=int, default=256, help="training images for batch norms")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "search.json")
    return parser.parse_args()


def network() -> Any:
    """Five convolutions with batch norm: 80 thousand parameters."""
    from torch import nn

    sizes = [(1, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1)]
    layers = [
        m for i, o, s in sizes for m in (nn.Conv2d(i, o, 3, s, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU())
    ]  # fmt: skip
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def main() -> None:
    args = arguments()
    import torch

    import secateur

    torch.set_num_threads(args.threads)
    images, labels = read(args.data, "train")
    test = read(args.data, "t10k")
    held = images[-args.held_out :], labels[-args.held_out :]
    images, labels = images[: args.images], labels[: args.images]
    common = {"data": [images[: args.calibration]], "example": images[:1]}
    result: dict[str, Any] = {
        "environment": environment(args.threads),
        "settings": {k: str(v) for k, v in vars(args).items() if k != "out"},
        "test": {},
        "held out": {},
        "seconds": {},
        "keeps": {},
    }

    def note(kind: str, key: str, value: Any) -> None:
        result[kind].setdefault(key, []).append(value)

    for seed in range(args.seeds):
        torch.manual_seed(seed)
        net = network()
        train(net, images, labels, args.epochs, seed)
        note("test", "dense", accuracy(net, *test))
        for name in args.cases:
            case = dict(CASES[name])
            for strategy in args.strategies:
                begun = time.perf_counter()
                found = secateur.search(
                    net, evaluate=lambda m: accuracy(m, *held), strategy=strategy, budget=args.budget, seed=seed,
                    recalibrated=True, **case, **common,
                )  # fmt: skip
                note("seconds", f"{name}|{strategy}", round(time.perf_counter() - begun, 1))
                tries = [(strategy, found.best)]
                tries += [("uniform", found.uniform)] if strategy == args.strategies[0] else []
                for label, trial in tries:
                    key = f"{name}|{label}"
                    note("held out", key, trial.value)
                    note("keeps", key, [round(k, 4) for k in trial.keeps])
                    note("test", key, on_test(net, found, trial, case, common, test))
                    print(f"seed {seed}: {key}: {result['test'][key][-1]:.2f} %", flush=True)
        write_json(args.out, result)
    print(show(result, args))


def on_test(net: Any, found: Any, trial: Any, case: dict[str, Any], common: Any, test: Any) -> float:
    """Accuracy of a copy that is pruned by the recipe with a trial's keeps."""
    import copy

    import secateur
    from secateur.calibrate import recalibrate

    table = {n: round(1 - k, 10) for n, k in zip(found.names, trial.keeps, strict=True)}
    recipe = found.recipe.override(knobs={"allocation": {"table": table}})
    twin = copy.deepcopy(net)
    if "target" in case:
        twin = secateur.prune(twin, recipe, example=common["example"], multiple=case["multiple"]).shrink()
    else:
        secateur.prune(twin, recipe)
    recalibrate(twin, common["data"])
    return accuracy(twin.eval(), *test)


def show(result: dict[str, Any], args: argparse.Namespace) -> str:
    """Mean accuracy on the test set; the mean gain over uniform and its 95 % interval (Student's t over the seeds)."""
    rows = [["dense", "", f"{statistics.mean(result['test']['dense']):.2f}", "", ""]]
    for name in args.cases:
        base = result["test"][f"{name}|uniform"]
        for strategy in ["uniform", *args.strategies]:
            values = result["test"][f"{name}|{strategy}"]
            gain = [a - b for a, b in zip(values, base, strict=True)]
            seconds = result["seconds"].get(f"{name}|{strategy}")
            took = f"{statistics.mean(seconds):.0f}" if seconds else ""
            rows.append([strategy, name, f"{statistics.mean(values):.2f}", spread(gain) if seconds else "", took])
    return table(["allocation", "goes", "accuracy, %", "gain over uniform", "seconds"], rows)


#: Student's t at 97.5 %, by degrees of freedom.
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def spread(gain: list[float]) -> str:
    """A mean and its interval."""
    mean = statistics.mean(gain)
    if len(gain) - 1 not in STUDENT:
        return f"{mean:+.2f}"
    half = STUDENT[len(gain) - 1] * statistics.stdev(gain) / len(gain) ** 0.5
    return f"{mean:+.2f} ({mean - half:+.2f} to {mean + half:+.2f})"


if __name__ == "__main__":
    main()
