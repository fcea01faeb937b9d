"""Sparse training on Fashion-MNIST through `secateur.attach`: accuracy by method, and what `session.step()` costs.

Every run trains the same network from the same initial weights on the same batches; what differs is the method. The
cost is measured apart, dense and masked steps in turns, averaged over the updates of a run: with ``--seeds 0`` that is
all that is done.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path
from typing import Any

from common import RESULTS, environment, table, write_json
from fashion import accuracy, network, read

METHODS = ["random-erk", "set", "rigl", "gmp", "granet"]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"), help="*-ubyte.gz files")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.95])
    parser.add_argument("--images", type=int, default=20000, help="of the training set")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--every", type=int, default=20, help="steps between two updates of the masks")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each method; 0 measures only what a step costs")
    parser.add_argument("--cost-steps", type=int, default=100, help="steps over which the cost is averaged")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=RESULTS / "training.json")
    return parser.parse_args()


def masked(net: Any, method: str, optimizer: Any, sparsity: float, steps: int, every: int, seed: int = 0) -> Any:
    import secateur

    # Methods that change masks in every step go on doing so.
    sparse = secateur.Recipe.of(method).knobs_of("driver").get("every", 1) > 1
    knobs = {"knobs": {"driver": {"every": every}}} if sparse else {}
    return secateur.attach(net, method, optimizer=optimizer, sparsity=sparsity, steps=steps, seed=seed, **knobs)


def one_step(net: Any, optimizer: Any, x: Any, y: Any) -> None:
    import torch

    loss = torch.nn.functional.cross_entropy(net(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def sgd(net: Any) -> Any:
    import torch

    return torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)


def trained(args: argparse.Namespace, method: str, sparsity: float, images: Any, labels: Any, seed: int) -> Any:
    import torch

    torch.manual_seed(seed)
    net = network()
    optimizer = sgd(net)
    steps = args.epochs * -(-len(images) // 128)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, steps)
    session = None if method == "dense" else masked(net, method, optimizer, sparsity, steps, args.every, seed)
    generator = torch.Generator().manual_seed(seed)
    net.train()
    for _ in range(args.epochs):
        for rows in torch.randperm(len(images), generator=generator).split(128):
            one_step(net, optimizer, images[rows], labels[rows])
            if session is not None:
                session.step()
            schedule.step()
    if session is not None:
        kept = session.finish()
        assert abs(kept.sparsity - sparsity) < 1e-3, kept.sparsity
    return net.eval()


def cost(args: argparse.Namespace, method: str, images: Any, labels: Any) -> dict[str, float]:
    """What a step with the session takes over one without: two networks take turns, step by step.

    Medians, of the steps that change masks and of the others apart, weighted by how many there are of each: what other
    work on the machine costs now and then is left out. ``ratio`` is of whole steps, with all that a session hooks into
    them; ``share`` is the time within ``session.step()`` over that of a dense step.
    """
    import torch

    torch.manual_seed(0)
    plain, other = network(), network()
    optimizers = sgd(plain), sgd(other)
    session = masked(other, method, optimizers[1], 0.95, args.cost_steps, args.every)
    for which in (0, 1) * 5:  # what only first steps do
        one_step((plain, other)[which], optimizers[which], images[:128], labels[:128])
    dense: list[float] = []
    whole: dict[bool, list[float]] = {False: [], True: []}
    within: dict[bool, list[float]] = {False: [], True: []}
    for k in range(args.cost_steps):
        start = 128 * k % (len(images) - 127)
        part = slice(start, start + 128)
        for which in (0, 1) if k % 2 else (1, 0):
            begun = time.perf_counter()
            one_step((plain, other)[which], optimizers[which], images[part], labels[part])
            middle = time.perf_counter()
            if not which:
                dense.append(middle - begun)
                continue
            session.step()
            changes = (k + 1) % args.every == 0
            within[changes].append(time.perf_counter() - middle)
            whole[changes].append(time.perf_counter() - begun)
    session.finish()

    def mean(times: dict[bool, list[float]]) -> float:
        return sum(statistics.median(x) * len(x) for x in times.values() if x) / args.cost_steps

    usual = statistics.median(dense)
    return {
        "ratio": mean(whole) / usual, "share": mean(within) / usual, "dense step, s": usual,
        "session.step(), s": statistics.median(within[False]),
        "session.step() that changes masks, s": statistics.median(within[True] or [0.0]),
    }  # fmt: skip


def main() -> None:
    args = arguments()
    import torch

    torch.set_num_threads(args.threads)
    images, labels = read(args.data, "train")
    images, labels = images[: args.images], labels[: args.images]
    result: dict[str, Any] = {
        "environment": environment(args.threads),
        "settings": {k: str(v) for k, v in vars(args).items()},
        "cost of a step": {m: cost(args, m, images, labels) for m in args.methods},
        "accuracy": {},
    }
    write_json(args.out, result)
    rows = [[m, f"{c['ratio']:.3f}x", f"{c['share']:.1%}"] for m, c in result["cost of a step"].items()]
    print(table(["method", "time of a step", "within session.step()"], rows), flush=True)
    if args.seeds == 0:
        return
    test_images, test_labels = read(args.data, "t10k")
    runs = [("dense", 0.0), *((m, s) for s in args.sparsity for m in args.methods)]
    for seed in range(args.seeds):
        for method, sparsity in runs:
            begun = time.perf_counter()
            value = accuracy(trained(args, method, sparsity, images, labels, seed), test_images, test_labels)
            result["accuracy"].setdefault(f"{method}|{sparsity:g}", []).append(value)
            print(
                f"seed {seed}: {method} at {sparsity:g}: {value:.2f} %, {time.perf_counter() - begun:.0f} s", flush=True
            )
        write_json(args.out, result)
    print(show(result, runs))


def show(result: dict[str, Any], runs: list[tuple[str, float]]) -> str:
    """Mean, and the smallest and largest of the seeds."""
    lines = []
    for method, sparsity in runs:
        values = result["accuracy"][f"{method}|{sparsity:g}"]
        spread = f"{min(values):.2f} to {max(values):.2f}"
        step = result["cost of a step"].get(method)
        cells = [method, f"{sparsity:.0%}", f"{statistics.mean(values):.2f}", spread]
        cells.append(f"{step['ratio']:.3f}x" if step else "")
        lines.append(cells)
    return table(["method", "zeros", "accuracy, %", "seeds", "time of a step"], lines)


if __name__ == "__main__":
    main()
