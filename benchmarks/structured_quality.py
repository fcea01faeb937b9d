"""Held-out perplexity of a language model made smaller, without training: methods, healed and not, at targets.

Every cell sees the same calibration windows and the same evaluation text. Resumable: a cell is stored when it is done.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

from common import RESULTS, environment, table, write_json

METHODS = ["llm-pruner", "wanda-sp", "flap", "slicegpt", "shortgpt", "sleb", "l1-norm", "angular-depth"]
WIDTH = {"l1-norm", "llm-pruner", "wanda-sp", "flap", "slicegpt"}
TARGETS = ["10%", "20%", "30%"]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--targets", nargs="+", default=TARGETS, help="of the parameters, what goes")
    parser.add_argument("--recoveries", nargs="+", default=["none", "refit"])
    parser.add_argument("--windows", type=int, default=32, help="of calibration")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--eval-windows", type=int, default=16)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=RESULTS / "structured_quality.json")
    parser.add_argument("--print", action="store_true", help="only print the table of what is stored")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    result: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {"cells": {}}
    if not args.print:
        measure(args, result)
    print(show(result))


def measure(args: argparse.Namespace, result: dict[str, Any]) -> None:
    import torch

    import secateur
    from secateur.data import windows
    from secateur.measure import perplexity
    from secateur.models import load_model, load_tokenizer, next_token_loss, resolve

    torch.set_num_threads(args.threads)
    path = resolve(args.model)
    tokenizer = load_tokenizer(path)
    data = windows("text:calibration", tokenizer, count=args.windows, length=args.length)
    text = windows("text:evaluation", tokenizer, count=args.eval_windows, length=args.length)
    group = f"{args.model}|{data.sha256[:12]}|{text.sha256[:12]}"

    def store(key: str, cell: dict[str, Any]) -> None:
        result["cells"][key] = {**cell, "group": group, "environment": environment(args.threads)}
        write_json(args.out, result)
        print(key, f"{cell['perplexity']:.2f}", flush=True)

    def value(model: torch.nn.Module) -> float:
        return float(perplexity(model, text.ids).to_dict()["value"])

    dense = load_model(path, torch.float32)
    if (key := f"dense||{group}") not in result["cells"]:
        parameters = sum(p.numel() for p in dense.parameters())
        store(key, {"method": "dense", "target": "", "recovery": "", "perplexity": value(dense), "params": parameters})
    example = {"input_ids": data.ids[:1, :16]}
    for target in args.targets:
        for method in args.methods:
            for recovery in args.recoveries if method in WIDTH else ["none"]:
                axes: dict[str, Any] = {"recovery": recovery}
                if method == "slicegpt":  # without its projection it would be another method
                    axes = {"knobs": {"recovery": {"refit": recovery == "refit"}}}
                elif method in WIDTH:
                    axes["skip"] = ["@residual"]
                recipe = secateur.Recipe.of(method, **axes)
                key = f"{method}|{target}|{recovery}|{recipe.digest}|{group}"
                if key in result["cells"]:
                    continue
                begun = time.perf_counter()
                batches = list(data.ids.split(1))
                if method == "sleb":  # its many passes look at a quarter of the windows
                    batches = batches[:: max(1, len(batches) // 8)]
                plan = secateur.plan(
                    dense, recipe, target=f"params {target}", example=example, data=batches, loss=next_token_loss
                )
                small = plan.shrink()  # type: ignore[union-attr]
                seconds = time.perf_counter() - begun
                described = plan.to_dict()
                cell = {"method": method, "target": target, "recovery": recovery, "perplexity": value(small.eval())}
                cell.update(params=described["after"]["params"], flops=described["after"]["flops"], seconds=seconds)
                store(key, {**cell, "proof": described["proof"], "notes": plan.notes})  # type: ignore[union-attr]


def show(result: dict[str, Any]) -> str:
    cells = list(result["cells"].values())
    targets = sorted({c["target"] for c in cells if c["target"]})
    rows = []
    for method, recovery in dict.fromkeys((c["method"], c["recovery"]) for c in cells):
        mine = {c["target"]: c for c in cells if (c["method"], c["recovery"]) == (method, recovery)}
        if method == "dense":
            rows.append(["dense", *[f"{mine['']['perplexity']:.2f}"] * len(targets)])
            continue
        name = f"{method}, refit" if recovery == "refit" else method
        rows.append([name, *(f"{mine[t]['perplexity']:.2f}" if t in mine else "-" for t in targets)])
    return table(["method", *(f"params {t}" for t in targets)], rows)


if __name__ == "__main__":
    main()
