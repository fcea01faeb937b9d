"""A vision transformer trained here on Fashion-MNIST, then with fewer tokens, without training: accuracy, throughput.

Every setting is measured in turns with the dense model, on the same batches of the test set. What to keep is not
chosen by the test set: all settings are shown.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from common import RESULTS, environment, table, write_json

TARGETS = ["flops 20%", "flops 30%", "flops 40%", "flops 50%"]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--images", type=int, default=6000, help="of the training set")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--patch", type=int, default=4, help="points on a side; 2 gives 196 tokens")
    parser.add_argument("--targets", nargs="+", default=TARGETS)
    parser.add_argument("--methods", nargs="+", default=["tome", "evit"])
    parser.add_argument("--test", type=int, default=2000, help="images that are measured on")
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=RESULTS / "tokens.json")
    return parser.parse_args()


def network(width: int, depth: int, patch: int) -> Any:
    """The network of the task fashion-vit, with patches of another size."""
    import torch
    from torch import nn

    from secateur.tasks.nets import VisionTransformer

    net = VisionTransformer(width, depth)
    if patch != 4:
        net.patch = nn.Conv2d(1, width, patch, patch)
        net.position = nn.Parameter(0.02 * torch.randn(1, (28 // patch) ** 2, width))
    return net


def train(net: Any, images: Any, labels: Any, epochs: int, seed: int) -> None:
    import torch

    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, epochs * -(-len(images) // 128))
    net.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(images), generator=generator).split(128):
            loss = torch.nn.functional.cross_entropy(net(images[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    net.eval()


def main() -> None:
    args = arguments()
    import torch

    import secateur
    from secateur.runtime.measured import measured
    from secateur.tasks.images import fashion_mnist

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    images, labels = fashion_mnist("train")
    test_images, test_labels = (x[: args.test] for x in fashion_mnist("t10k"))
    batches = list(zip(test_images.split(args.batch), test_labels.split(args.batch), strict=True))
    net = network(args.width, args.depth, args.patch)
    train(net, images[: args.images], labels[: args.images], args.epochs, args.seed)
    rows, results = [], []
    for method in args.methods:
        for target in args.targets:
            gates: Any = secateur.prune(net, method, target=target, example=batches[0][0])
            found = measured(gates, batches)
            results.append({"target": target, **gates.record, "measured": found})
            per = {m: args.batch / found[m]["seconds"]["p50"] for m in ("dense", "gated")}
            rows.append(
                [
                    method, target, " ".join(map(str, gates.record["tokens"])),
                    f"{100 * found['dense']['accuracy']:.2f}", f"{100 * found['gated']['accuracy']:.2f}",
                    f"{per['dense']:,.0f}", f"{per['gated']:,.0f}", f"{found['ratio']:.2f}",
                ]
            )  # fmt: skip
            print(" | ".join(rows[-1]), flush=True)
    write_json(
        args.out,
        {
            "environment": environment(args.threads),
            "settings": {k: str(v) for k, v in vars(args).items()},
            "results": results,
        },
    )
    head = ["method", "target", "tokens", "dense %", "gated %", "dense images/s", "gated images/s", "times as fast"]
    print(table(head, rows))


if __name__ == "__main__":
    main()
