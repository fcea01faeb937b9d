"""A model of 7 billion parameters (random, bfloat16), pruned from disk to disk: seconds and peak memory.

The model has the shape of Llama 2 7B; it is written shard by shard and never held in memory. Every step runs in a
process of its own, whose peak resident memory is what the operating system reports when it ends.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import RESULTS, child, table, write_json  # imports no torch: a child's peak never starts below its parent's

HIDDEN, INNER, HEADS, VOCABULARY = 4096, 11008, 32, 32000
SETTINGS = ("layers", "hidden", "inner", "vocabulary", "windows", "length", "threads")
RUNS = {"magnitude": "magnitude, all blocks", "sparsegpt": "sparsegpt, first two blocks"}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()) / "secateur-7b")
    parser.add_argument("--layers", type=int, default=32, help="blocks of the model")
    parser.add_argument("--hidden", type=int, default=HIDDEN, help=argparse.SUPPRESS)
    parser.add_argument("--inner", type=int, default=INNER, help=argparse.SUPPRESS)
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY, help=argparse.SUPPRESS)
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--windows", type=int, default=16, help="of random tokens, for sparsegpt")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--keep", action="store_true", help="leave the directories")
    parser.add_argument("--out", type=Path, default=RESULTS / "stream7b.json")
    parser.add_argument("--child", choices=["write", *RUNS], help=argparse.SUPPRESS)
    return parser.parse_args()


def shapes(args: argparse.Namespace) -> list[dict[str, tuple[int, ...]]]:
    """The tensors of each shard: one for each block, and one for the rest."""
    h, i, v = args.hidden, args.inner, args.vocabulary
    shards: list[dict[str, tuple[int, ...]]] = []
    for k in range(args.layers):
        p = f"model.layers.{k}"
        shard: dict[str, tuple[int, ...]] = {f"{p}.self_attn.{n}_proj.weight": (h, h) for n in "qkvo"}
        shard |= {f"{p}.mlp.gate_proj.weight": (i, h), f"{p}.mlp.up_proj.weight": (i, h)}
        shard |= {f"{p}.mlp.down_proj.weight": (h, i)}
        shard |= {f"{p}.{n}_layernorm.weight": (h,) for n in ("input", "post_attention")}
        shards.append(shard)
    rest: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (v, h), "model.norm.weight": (h,)}
    return [*shards, {**rest, "lm_head.weight": (v, h)}]


def count(shard: dict[str, tuple[int, ...]]) -> int:
    total = 0
    for shape in shard.values():
        size = 1
        for n in shape:
            size *= n
        total += size
    return total


def write_model(args: argparse.Namespace) -> dict[str, Any]:
    """Write the model's directory; a shard that is there already is left as it is."""
    import torch
    from safetensors.torch import save_file

    target = args.dir / "dense"
    target.mkdir(parents=True, exist_ok=True)
    shards = shapes(args)
    weight_map = {}
    for k, shard in enumerate(shards):
        file = target / f"model-{k + 1:05d}-of-{len(shards):05d}.safetensors"
        weight_map.update(dict.fromkeys(shard, file.name))
        if file.exists():
            continue
        generator = torch.Generator().manual_seed(k)
        tensors = {}
        for name, shape in shard.items():
            if len(shape) == 1:
                tensors[name] = torch.ones(shape, dtype=torch.bfloat16)
            else:
                tensors[name] = torch.randn(shape, generator=generator).mul_(0.02).to(torch.bfloat16)
        temporary = file.with_suffix(".tmp")
        save_file(tensors, temporary, metadata={"format": "pt"})
        os.replace(temporary, file)
    total = sum(map(count, shards))
    index = {"metadata": {"total_size": 2 * total}, "weight_map": weight_map}
    write_json(target / "model.safetensors.index.json", index)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": args.vocabulary,
        "hidden_size": args.hidden,
        "intermediate_size": args.inner,
        "num_hidden_layers": args.layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }
    write_json(target / "config.json", config)
    return {"parameters": total, "bytes": 2 * total}


def prune(args: argparse.Namespace) -> dict[str, Any]:
    """Prune the directory; runs in a child."""
    import torch
    from common import environment

    from secateur import Recipe, prune_directory

    torch.set_num_threads(args.threads)
    out = args.dir / args.child
    shutil.rmtree(out, ignore_errors=True)
    recipe = Recipe.of(args.child, sparsity=0.5)
    ids = torch.randint(args.vocabulary, (args.windows, args.length), generator=torch.Generator().manual_seed(0))
    stop = 2 if args.child == "sparsegpt" else None
    run = prune_directory(
        args.dir / "dense", recipe, out, data=ids if recipe.needs_data else None, windows_count=args.windows, stop=stop
    )
    return {
        "timings": run["timings"],
        "sparsity": run["sparsity"]["pruned_layers"],
        "layers": len(run["layers"]),
        "weights": sum(x["parameters"] for x in run["layers"]),
        "reported_peak": run["peak_memory"],
        "notes": run["notes"],
        "environment": environment(args.threads),
    }


def check_disk(args: argparse.Namespace) -> None:
    """Say before any work that the disk is too small."""
    size = 2 * sum(map(count, shapes(args)))
    copies = 1 + (len(args.runs) if args.keep else 1)
    there = next(p for p in (args.dir.resolve(), *args.dir.resolve().parents) if p.exists())
    written = sum(f.stat().st_size for f in args.dir.glob("dense/*.safetensors"))
    need = int(copies * size * 1.04) + (1 << 28) - written
    free = shutil.disk_usage(there).free
    if free < need:
        raise SystemExit(
            f"{args.dir} has {free / 1e9:.1f} GB free, and {need / 1e9:.1f} GB are needed ({copies} copies of a model "
            f"of {size / 1e9:.1f} GB): choose another --dir, or fewer --layers"
        )


def main() -> None:
    args = arguments()
    if args.child:
        print(json.dumps(write_model(args) if args.child == "write" else prune(args)), flush=True)
        return
    check_disk(args)
    options = [x for n in ("dir", *SETTINGS) for x in (f"--{n}", getattr(args, n))]
    command = [sys.executable, Path(__file__).resolve(), *options, "--child"]
    try:
        print(f"writing the model to {args.dir} ...", flush=True)
        model = child([*command, "write"], args.threads)
        rows = []
        for name in args.runs:
            print(f"{RUNS[name]} ...", flush=True)
            rows.append({"run": name, **child([*command, name], args.threads)})
            if not args.keep:
                shutil.rmtree(args.dir / name)
    finally:
        if not args.keep:
            shutil.rmtree(args.dir / "dense", ignore_errors=True)
            for name in args.runs:
                shutil.rmtree(args.dir / name, ignore_errors=True)
                shutil.rmtree(args.dir / f"{name}.partial", ignore_errors=True)
            if args.dir.exists() and not any(args.dir.iterdir()):
                args.dir.rmdir()
    env = [r.pop("environment") for r in rows][-1]
    settings = {n: getattr(args, n) for n in SETTINGS}
    result = {"environment": env, "settings": settings, "model": model, "rows": rows}
    write_json(args.out, result)
    print(show(result))


def show(result: dict[str, Any]) -> str:
    """The table."""
    settings, model = result["settings"], result["model"]
    lines = [
        [
            RUNS[r["run"]],
            f"{r['weights'] / 1e9:.2f}",
            f"{r['sparsity']:.6f}",
            f"{r['timings']['prune']:.0f}",
            f"{r['wall']:.0f}",
            f"{r['max_rss'] / 2**30:.2f}",
        ]
        for r in result["rows"]
    ]
    head = ["", "billion weights pruned", "sparsity", "s pruning and writing blocks", "s in all", "peak GiB"]
    note = (
        f"random Llama, {settings['layers']} blocks of {settings['hidden']} x {settings['inner']}, "
        f"{model['parameters'] / 1e9:.2f} billion parameters, {model['bytes'] / 2**30:.1f} GiB in bfloat16; sparsegpt "
        f"with {settings['windows']} windows of {settings['length']} random tokens; {settings['threads']} threads, "
        f"{result['environment']['cpu']}"
    )
    return f"{table(head, lines)}\n\n{note}"


if __name__ == "__main__":
    main()
