"""A convolutional network trained here on Fashion-MNIST, then cut to half of its FLOPs in one shot: accuracy.

Every method is shown without and with its healing, from the same trained network, on the same calibration images,
which come from the training set. No labels of the test set are used before the last line.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path
from typing import Any

from common import RESULTS, environment, table, write_json

METHODS = ["l1-norm", "group-norm", "fpgm", "network-slimming", "apoz", "wanda-sp", "flap", "taylor"]
RECOVERIES = ["none", "batch-norm", "refit"]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"), help="*-ubyte.gz files")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--target", default="flops 50%")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--calibration", type=int, default=1024, help="images of the training set")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=RESULTS / "fashion.json")
    return parser.parse_args()


def read(folder: Path, part: str) -> tuple[Any, Any]:
    """Images ``(n, 1, 28, 28)`` in [-1, 1], and labels."""
    from secateur.tasks.images import fashion_mnist

    return fashion_mnist(part, folder)


def network() -> Any:
    """A small residual network: 0.17 million parameters."""
    from torch import nn

    from secateur.tasks.nets import Residual

    return nn.Sequential(
        nn.Conv2d(1, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        Residual(16, 16, 1), Residual(16, 32, 2), Residual(32, 32, 1), Residual(32, 64, 2), Residual(64, 64, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


def train(net: Any, images: Any, labels: Any, epochs: int, seed: int) -> None:
    import torch

    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    steps = epochs * -(-len(images) // 128)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, steps)
    net.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(images), generator=generator).split(128):
            loss = torch.nn.functional.cross_entropy(net(images[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    net.eval()


def accuracy(net: Any, images: Any, labels: Any) -> float:
    import torch

    with torch.no_grad():
        right = sum(
            int((net(x).argmax(1) == y).sum()) for x, y in zip(images.split(500), labels.split(500), strict=True)
        )
    return 100 * right / len(labels)


def main() -> None:
    args = arguments()
    import torch

    import secateur

    torch.set_num_threads(args.threads)
    images, labels = read(args.data, "train")
    test_images, test_labels = read(args.data, "t10k")
    found: dict[tuple[str, str], list[float]] = {}
    sizes: dict[str, float] = {}
    begun = time.perf_counter()
    for seed in range(args.seeds):
        torch.manual_seed(seed)
        net = network()
        train(net, images, labels, args.epochs, seed)
        found.setdefault(("dense", ""), []).append(accuracy(net, test_images, test_labels))
        print(f"seed {seed}: dense {found['dense', ''][-1]:.2f} %, {time.perf_counter() - begun:.0f} s", flush=True)
        chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[: args.calibration]
        batches = list(zip(images[chosen].split(128), labels[chosen].split(128), strict=True))
        for method in args.methods:
            for recovery in RECOVERIES:
                plan: Any = secateur.plan(
                    net, method, target=args.target, example=images[:1], data=batches, recovery=recovery, skip=[],
                    loss=lambda m, b: torch.nn.functional.cross_entropy(m(b[0]), b[1]),
                )  # fmt: skip
                value = accuracy(plan.shrink().eval(), test_images, test_labels)
                found.setdefault((method, recovery), []).append(value)
                sizes[method] = plan.after["flops"] / plan.before["flops"]
        result = {
            "environment": environment(args.threads),
            "settings": {k: str(v) for k, v in vars(args).items()},
            "accuracy": {f"{m}|{r}" if r else m: values for (m, r), values in found.items()},
            "flops": sizes,
        }
        write_json(args.out, result)
    print(show(found, args.methods))


def show(found: dict[tuple[str, str], list[float]], methods: list[str]) -> str:
    def cell(values: list[float]) -> str:
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.2f}{spread}"

    rows = [["dense", *[cell(found["dense", ""])] * len(RECOVERIES)]]
    rows += [[m, *(cell(found[m, r]) for r in RECOVERIES)] for m in methods]
    return table(["accuracy in %", *RECOVERIES], rows)


if __name__ == "__main__":
    main()
