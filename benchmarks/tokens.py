"""A vision transformer trained here on Fashion-MNIST, then made cheaper: fewer tokens, fewer heads and neurons, both.

The network has patches of 2 x 2 points, 196 tokens. Each seed is trained once (coarse patches first: a quarter of the
tokens), and stored; but for dynamicvit nothing is trained afterwards. Every setting is timed in turns with the dense
model, batch by batch. What to keep is not chosen by the test set: all settings are shown. Intervals are over seeds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import RESULTS, environment, table, write_json

#: Name of a setting -> (what heads and neurons lose in FLOPs, method of run time, its options). Targets of run time are
#: of the FLOPs of the model that it is put into.
SETTINGS: dict[str, tuple[str | None, str | None, dict[str, Any]]] = {
    "tome, every block, 20%": (None, "tome", {"target": "flops 20%"}),
    "tome, every block, 35%": (None, "tome", {"target": "flops 35%"}),
    "tome, every block, 50%": (None, "tome", {"target": "flops 50%"}),
    "tome, first block, 20%": (None, "tome", {"target": "flops 20%", "at": (0,)}),
    "tome, first block, 35%": (None, "tome", {"target": "flops 35%", "at": (0,)}),
    "tome, first block, all it can": (None, "tome", {"keep": 0.5, "at": (0,)}),
    "tome, first two blocks, 50%": (None, "tome", {"target": "flops 50%", "at": (0, 1)}),
    "evit, 20%": (None, "evit", {"target": "flops 20%"}),
    "evit, 35%": (None, "evit", {"target": "flops 35%"}),
    "evit, first block, 35%": (None, "evit", {"target": "flops 35%", "at": (0,)}),
    "heads and neurons, 20%": ("flops 20%", None, {}),
    "heads and neurons, 35%": ("flops 35%", None, {}),
    "both, 20% and 20%": ("flops 20%", "tome", {"target": "flops 20%", "at": (0,)}),
    "both, 20% and 35%": ("flops 20%", "tome", {"target": "flops 35%", "at": (0,)}),
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "--weights", type=Path, default=Path("tokens"), help="a directory: what is missing is trained and written"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--coarse", type=int, default=60000, help="images with patches of 4 x 4")
    parser.add_argument("--fine", type=int, default=9600, help="images with patches of 2 x 2")
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--dynamic-images", type=int, default=3000, help="that dynamicvit is trained on")
    parser.add_argument("--calibration", type=int, default=256, help="images for heads and neurons")
    parser.add_argument("--test", type=int, default=2000, help="images for the accuracy")
    parser.add_argument("--timed", type=int, default=600, help="of them, for the throughput")
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--train-only", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS / "tokens.json")
    return parser.parse_args()


def trained(args: argparse.Namespace, images: Any, labels: Any, seed: int) -> Any:
    """The dense network, trained with coarse patches, then with fine ones; or what was stored of it."""
    import torch
    from safetensors.torch import load_file, save_file

    from secateur.tasks.nets import VisionTransformer

    torch.manual_seed(seed)
    file = args.weights / f"dense-{seed}.safetensors"
    net = VisionTransformer(args.width, args.depth)
    fine = VisionTransformer(args.width, args.depth, patch=2)
    if not file.is_file():
        fit(net, images, labels, args.coarse, 2e-3, 2 * seed)
        state = net.state_dict()
        side = int(state["position"].shape[1] ** 0.5)
        grid = state["position"].view(1, side, side, -1).permute(0, 3, 1, 2)
        grid = torch.nn.functional.interpolate(grid, scale_factor=2, mode="bilinear")
        state["position"] = grid.flatten(2).transpose(1, 2).contiguous()
        state["patch.weight"] = 4 * torch.nn.functional.avg_pool2d(state["patch.weight"], 2)  # of a patch drawn larger
        fine.load_state_dict(state)
        fit(fine, images, labels, args.fine, 8e-4, 2 * seed + 1)
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(fine.state_dict(), file)
    fine.load_state_dict(load_file(file))
    return fine.eval()


def fit(net: Any, images: Any, labels: Any, count: int, rate: float, seed: int) -> None:
    import torch

    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(net.parameters(), rate, betas=(0.9, 0.98), weight_decay=0.02)
    steps, done = count // 64, 0
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.15)
    net.train()
    while done < steps:
        for rows in torch.randperm(len(images), generator=generator).split(64):
            if done == steps:
                break
            x = images[rows]
            x = torch.where(torch.rand(len(x), 1, 1, 1, generator=generator) < 0.5, x, x.flip(3))
            loss = torch.nn.functional.cross_entropy(net(x), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            done += 1
            if done % 50 == 0:
                print(f"step {done} of {steps}, loss {float(loss.detach()):.3f}", flush=True)
    net.eval()


def dynamic(args: argparse.Namespace, net: Any, images: Any, labels: Any, seed: int) -> Any:
    """DynamicViT at 35 % fewer FLOPs, trained from the dense network; or what was stored of it."""
    import secateur
    from secateur.tasks import Task
    from secateur.tasks.arrays import batched
    from secateur.tasks.base import adamw
    from secateur.tasks.nets import VisionTransformer

    target = args.weights / f"dynamicvit-{seed}"
    if not target.is_dir():
        data = (images[: args.dynamic_images], labels[: args.dynamic_images])
        held = (images[-200:], labels[-200:])
        task = Task(lambda seed: net, batched(data, held, 32), optimizer=adamw, epochs=1, name="fashion-vit, patch 2")
        made = secateur.train(
            task, "dynamicvit", model=net, seed=seed, target="flops 35%", length=1.0, rate=0.3, knobs={"at": (1, 2)},
            progress=lambda what, done, of: print(what, done, of, flush=True) if done % 10 == 0 else None,
        )  # fmt: skip
        made.save(target)
    return secateur.load(target, VisionTransformer(args.width, args.depth, patch=2))


def answers(net: Any, batches: list[Any]) -> Any:
    import torch

    return torch.cat([net(x).argmax(1) for x in batches])


def seconds(run: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


def measure(dense: Any, other: Any, batches: list[Any], labels: Any, right: Any, timed: int) -> dict[str, Any]:
    """Accuracy beside the dense model's, with an interval over the images; seconds of a batch, in turns."""
    import torch

    from secateur.measure.flops import flops

    took: dict[str, list[float]] = {"dense": [], "other": []}
    for net in (dense, other):
        net(batches[0])
    for number, x in enumerate(batches[:timed]):
        for name, net in [("dense", dense), ("other", other)][:: 1 if number % 2 else -1]:
            took[name].append(seconds(lambda net=net, x=x: net(x)))  # type: ignore[misc]
    difference = ((answers(other, batches) == labels).float() - right.float()).double()
    ratio = torch.tensor(took["dense"]) / torch.tensor(took["other"])
    low, middle, high = ratio.quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()
    return {
        "flops": flops(other, batches[0]).total / flops(dense, batches[0]).total,
        "accuracy": float((right.float() + difference).mean()),
        "points": 100 * float(difference.mean()),
        "points_95": 196 * float(difference.std() / len(difference) ** 0.5),
        "seconds": {name: float(torch.tensor(v).median()) for name, v in took.items()},
        "ratio": middle, "ratio_10_90": [low, high],
    }  # fmt: skip


def settings(args: argparse.Namespace, net: Any, images: Any, labels: Any, example: Any, seed: int) -> dict[str, Any]:
    """The models of one seed by the name of their setting."""
    import secateur
    from secateur.tasks.base import cross_entropy

    made = {"dynamicvit, trained, 35%": dynamic(args, net, images, labels, seed)}
    calibration = list(zip(images[: args.calibration].split(8), labels[: args.calibration].split(8), strict=True))
    smaller: dict[str, Any] = {}
    for name, (units, method, options) in SETTINGS.items():
        if units is not None and units not in smaller:
            plan = secateur.plan(
                net, "kwon", target=units, example=example, data=calibration, loss=cross_entropy, recovery="refit"
            )
            smaller[units] = plan.shrink().eval()
        base = net if units is None else smaller[units]
        made[name] = base if method is None else secateur.prune(base, method, example=example, **options)
    return made


def main() -> None:
    args = arguments()
    import torch

    from secateur.tasks.images import fashion_mnist

    torch.set_num_threads(args.threads)
    images, labels = fashion_mnist("train")
    test, wanted = (x[: args.test] for x in fashion_mnist("t10k"))
    batches = list(test.split(args.batch))
    results: dict[str, list[dict[str, Any]]] = {}
    dense: list[float] = []
    for seed in range(args.seeds):
        net = trained(args, images, labels, seed)
        models = settings(args, net, images, labels, test[:1], seed)
        if args.train_only:
            continue
        with torch.inference_mode():
            right = answers(net, batches) == wanted
            dense.append(float(right.float().mean()))
            for name, other in models.items():
                found = measure(net, other.eval(), batches, wanted, right, args.timed // args.batch)
                record = getattr(other, "record", {})
                found["record"] = {k: v for k, v in record.items() if k in ("r", "keep", "at", "tokens")}
                results.setdefault(name, []).append(found)
                print(f"{seed} {name}: {found['points']:+.2f} points, {found['ratio']:.2f} times as fast", flush=True)
    if args.train_only:
        return
    write_json(
        args.out,
        {
            "environment": environment(args.threads),
            "settings": {k: str(v) for k, v in vars(args).items() if k not in ("out", "weights")},
            "dense": dense,
            "results": results,
        },
    )
    print(f"dense: {', '.join(f'{100 * x:.2f}' for x in dense)} % of {args.test}")
    print(show(results, args.batch))


def over(values: list[float]) -> tuple[float, float]:
    """The mean over seeds and half of its 95 % t interval."""
    from scipy.stats import t

    n = len(values)
    half = t.ppf(0.975, n - 1) * statistics.stdev(values) / n**0.5 if n > 1 else float("nan")
    return statistics.mean(values), float(half)


def show(results: dict[str, list[dict[str, Any]]], batch: int) -> str:
    rows = []
    for name, runs in results.items():
        points, half = over([r["points"] for r in runs])
        rows.append([
            name, f"{100 * statistics.mean(r['flops'] for r in runs):.0f}",
            " ".join(map(str, runs[0]["record"].get("tokens", ""))),
            f"{100 * statistics.mean(r['accuracy'] for r in runs):.2f}", f"{points:+.2f} ± {half:.2f}",
            f"{batch / statistics.mean(r['seconds']['other'] for r in runs):,.0f}",
            " ".join(f"{r['ratio']:.2f}" for r in runs),
        ])  # fmt: skip
    return str(table(["setting", "FLOPs %", "tokens", "accuracy %", "points", "images/s", "times as fast"], rows))


if __name__ == "__main__":
    main()
