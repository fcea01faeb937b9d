"""Structured pruning: seconds to plan and cut beside torch-pruning, and real latency before and after.

Every model has random weights, since neither number depends on them. The peer is used as its README says, at the
channel ratio that its own documentation calls for; ours at a FLOPs target. Both sides run in one process, one after
the other, with as many threads as ``--threads`` says.
"""

from __future__ import annotations

import argparse
import copy
import os
import time
import warnings
from pathlib import Path
from typing import Any

from common import RESULTS, environment, table, write_json

MODELS = ["resnet50", "densenet121", "vit_base_patch16_224", "convnext_tiny", "llama-135m"]


def build(name: str) -> tuple[Any, Any]:
    """A model with random weights, and one input."""
    import torch

    if name == "llama-135m":
        from transformers import AutoModelForCausalLM, LlamaConfig

        config = LlamaConfig(
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            vocab_size=49152,
            tie_word_embeddings=True,
        )
        return AutoModelForCausalLM.from_config(config).eval(), {"input_ids": torch.arange(64)[None]}
    import timm

    model = timm.create_model(name).eval()
    return model, torch.randn(1, *model.pretrained_cfg["input_size"])


def ours(model: Any, example: Any, target: str, multiple: int) -> tuple[Any, dict[str, Any]]:
    """The smaller model, and what it took."""
    import secateur

    begun = time.perf_counter()
    plan = secateur.plan(model, "l1-norm", target=target, example=example, multiple=multiple)
    small = plan.shrink()
    seconds = time.perf_counter() - begun
    return small, {
        "seconds": seconds,
        "multiple": multiple,
        "params": plan.after["params"] / plan.before["params"],
        "flops": plan.after["flops"] / plan.before["flops"],
        "error": plan.proof.error,
        "left_alone": sorted({f.reason for f in plan.families if f.reason}),
    }


def peer(model: Any, example: Any) -> dict[str, Any]:
    """torch-pruning's dependency graph and one step, as in its README."""
    import torch_pruning as tp
    from torch import nn

    before = sum(p.numel() for p in model.parameters())
    last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    heads = {}
    for module in model.modules():
        if hasattr(module, "num_heads") and hasattr(module, "qkv"):
            heads[module.qkv] = module.num_heads
    begun = time.perf_counter()
    try:
        pruner = tp.pruner.MagnitudePruner(
            model,
            example,
            importance=tp.importance.MagnitudeImportance(p=1),
            pruning_ratio=0.3,
            ignored_layers=[last],
            num_heads=heads,
            prune_head_dims=False,
            prune_num_heads=True,
            head_pruning_ratio=0.3,
        )
        pruner.step()
        seconds = time.perf_counter() - begun
        model(**example) if isinstance(example, dict) else model(example)
    except Exception as error:
        return {"seconds": time.perf_counter() - begun, "failed": f"{type(error).__name__}: {str(error)[:80]}"}
    return {"seconds": seconds, "params": sum(p.numel() for p in model.parameters()) / before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--target", default="flops 50%")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--multiples", nargs="+", type=int, default=[8, 16], help="what sizes are rounded to")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS / "structured.json")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    import torch

    from secateur.measure.latency import latency

    torch.set_num_threads(args.threads)
    rows: list[dict[str, Any]] = []
    for name in args.models:
        model, example = build(name)
        made = [ours(model, example, args.target, n) for n in args.multiples]
        models = {"dense": model, **{str(row["multiple"]): small for small, row in made}}
        mine = [{"name": name, **row} for _, row in made]
        for batch in args.batches if not isinstance(example, dict) else args.batches[:1]:
            x = example if isinstance(example, dict) else example.expand(batch, *example.shape[1:]).contiguous()
            given = ((), x) if isinstance(x, dict) else ((x,), {})
            found = latency(models, *given, repeats=args.repeats)
            for row in mine:
                row[f"speedup_{batch}"] = found["dense"] / found[str(row["multiple"])]
                row[f"dense_{batch}"] = found["dense"]
                row["repeats"] = args.repeats
        del made, models
        if not args.no_peer:
            mine[0]["peer"] = peer(copy.deepcopy(model), example)
        rows += mine
        print(*mine, sep="\n", flush=True)
    write_json(args.out, {"environment": environment(args.threads), "target": args.target, "rows": rows})
    print(show(rows, args))


def show(rows: list[dict[str, Any]], args: argparse.Namespace) -> str:
    """The table."""
    head = [
        "",
        "multiple",
        "FLOPs left",
        "params left",
        "proof",
        "s",
        "peer s",
        *(f"faster at {b}" for b in args.batches),
    ]
    lines = []
    for r in rows:
        other = r.get("peer", {})
        taken = f"{other['seconds']:.1f}" + (" failed" if "failed" in other else "") if other else ""
        speeds = [f"{r[k]:.2f}x" if (k := f"speedup_{b}") in r else "" for b in args.batches]
        proof = "none" if r["error"] is None else f"{r['error']:.0e}"
        lines.append(
            [
                r["name"],
                str(r["multiple"]),
                f"{r['flops']:.3f}",
                f"{r['params']:.3f}",
                proof,
                f"{r['seconds']:.1f}",
                taken,
                *speeds,
            ]
        )
    return table(head, lines)


if __name__ == "__main__":
    main()
