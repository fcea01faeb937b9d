"""Decoders at run time: bytes of the cache, tokens a second and perplexity under budgets, the dense model in turns.

python benchmarks/decoder.py --out benchmarks/results/decoder.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from math import exp
from pathlib import Path
from typing import Any

import torch
import transformers
from common import RESULTS, environment, table, write_json
from torch import Tensor
from torch.nn.functional import cross_entropy

import secateur
from secateur.coupled import load_module
from secateur.data import CALIBRATION, EVALUATION, windows
from secateur.models import load_tokenizer, resolve
from secateur.runtime.cache import nbytes
from secateur.runtime.decoder import dense_cache


def text(source: str, count: int, length: int) -> Tensor:
    return windows(source, load_tokenizer(resolve("demo")), count=count, length=length).ids


def under_budget(model: Any, ids: Tensor, chunk: int | None = None) -> float:
    """Perplexity of all tokens but the first 32, of a text that goes through in chunks."""
    total = 0.0
    with torch.inference_mode():
        for one in ids.split(1):
            cache = model.cache() if chunk else None
            pieces = one.split(chunk, 1) if chunk else (one,)
            given = {"cache": cache, "use_cache": True} if chunk else {"use_cache": False}
            logits = torch.cat([model(p, **given).logits for p in pieces], 1)
            total += float(cross_entropy(logits[0, 31:-1].float(), one[0, 32:], reduction="mean"))
    return exp(total / len(ids))


def second_half(model: Any, ids: Tensor) -> float:
    """Perplexity of the second half of each text behind the first, which is computed in full."""
    total, middle = 0.0, ids.shape[1] // 2
    sparse = hasattr(model, "prompt")
    with torch.inference_mode():
        for one in ids.split(1):
            cache = model.cache() if sparse else dense_cache(model)
            model(one[:, :middle], cache=cache, use_cache=True)
            if sparse:
                model.prompt = True  # zeros in place of what single tokens would not read
            logits = model(one[:, middle:], cache=cache, use_cache=True).logits[0, :-1]
            if sparse:
                model.prompt = False
            total += float(cross_entropy(logits.float(), one[0, middle + 1 :]))
    return exp(total / len(ids))


def speed(models: dict[str, Any], ids: Tensor, steps: int) -> dict[str, dict[str, float]]:
    """Seconds of a token behind a prompt (median), and bytes of the cache then; all models in turns at each token."""
    found: dict[str, list[float]] = {name: [] for name in models}
    caches = {name: m.cache() if hasattr(m, "cache") else dense_cache(m) for name, m in models.items()}
    prompt = ids.shape[1] - steps
    with torch.inference_mode():
        for name, model in models.items():
            model(ids[:, :prompt], cache=caches[name], use_cache=True)
        for at in range(prompt, ids.shape[1]):
            for name in models if at % 2 else reversed(models):
                begun = time.perf_counter()
                models[name](ids[:, at : at + 1], cache=caches[name], use_cache=True)
                if at >= prompt + 2:
                    found[name].append(time.perf_counter() - begun)
    return {
        name: {"seconds": statistics.median(took), "tokens_per_second": 1 / statistics.median(took),
               "bytes": nbytes(caches[name])}
        for name, took in found.items()
    }  # fmt: skip


def wide(hidden: int, layers: int) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=1024, hidden_size=hidden, intermediate_size=11 * hidden // 4 // 64 * 64, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 256, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=RESULTS / "decoder.json")
    parser.add_argument("--length", type=int, default=1024, help="of the long texts")
    parser.add_argument("--texts", type=int, default=1)
    parser.add_argument("--budgets", type=int, nargs="*", default=[64, 128, 256, 512])
    parser.add_argument(
        "--chunk", type=int, default=16, help="tokens at once where perplexity under a budget is measured"
    )
    parser.add_argument("--steps", type=int, default=24, help="tokens that are timed")
    parser.add_argument("--calibration", type=int, default=4, help="windows of 512 tokens, for teal and cats")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--part", choices=("quality", "speed", "all"), default="all")
    args = parser.parse_args()

    found: dict[str, Any] = {}
    if args.out.exists():
        found = json.loads(args.out.read_text())
    rows: dict[str, Any] = found.setdefault("rows", {})
    net = load_module("demo").eval()
    long = text(EVALUATION, args.texts, args.length)
    example, data = long[:, :64], text(CALIBRATION, args.calibration, 512)
    models: dict[str, Any] = {"dense": net}
    for budget in args.budgets:
        for method in ("streaming", "h2o"):
            models[f"{method} {budget}"] = secateur.prune(net, method, example=example, budget=budget)
    sparse: dict[str, Any] = {}
    for method in ("teal", "cats"):
        begun = time.perf_counter()
        sparse[f"{method} 0.5"] = secateur.prune(net, method, example=example, data=list(data.split(1)), sparsity=0.5)
        found.setdefault("calibration", {})[method] = time.perf_counter() - begun
    if args.part != "speed":
        rows.setdefault("dense", {})["perplexity"] = under_budget(net, long)
        print("dense", rows["dense"], flush=True)
        for name, model in models.items():
            if name != "dense":
                rows.setdefault(name, {})["perplexity"] = under_budget(model, long, args.chunk)
                print(name, rows[name], flush=True)
        for name, model in {"dense": net, **sparse}.items():
            rows.setdefault(name, {})["perplexity_second_half"] = second_half(model, long)
            print(name, rows[name], flush=True)
    if args.part != "quality":
        for name, row in speed(models, long[:1], args.steps).items():
            rows.setdefault(name, {}).update(row)
            print(name, rows[name], flush=True)
        beside = speed({"dense": net, **sparse}, long[:1, : 128 + args.steps], args.steps)
        found["sparse"] = {"prompt": 128, **beside}
        print(found["sparse"], flush=True)
        large = wide(args.hidden, args.layers)
        ids = torch.randint(0, 1024, (2, 64 + args.steps), generator=torch.Generator().manual_seed(1))
        made = {m: secateur.prune(large, m, example=ids, data=[ids], sparsity=0.5) for m in ("teal", "cats")}
        found["wide"] = {
            "hidden": args.hidden,
            "layers": args.layers,
            **speed({"dense": large, **made}, ids[:1], args.steps),
        }
        print(found["wide"], flush=True)
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "part")}
    found |= {"settings": settings, "environment": environment()}
    write_json(args.out, found)
    print(text_of(found))


def text_of(found: dict[str, Any]) -> str:
    head = ("model", "perplexity", "second half", "tokens/s", "MiB of the cache")
    rows = []
    for name, row in found["rows"].items():
        numbers = (row.get("perplexity"), row.get("perplexity_second_half"), row.get("tokens_per_second"))
        held = row.get("bytes")
        cells = ["" if x is None else f"{x:.2f}" for x in (*numbers, None if held is None else held / 2**20)]
        rows.append((name, *cells))
    for part in ("sparse", "wide"):
        for name, row in found.get(part, {}).items():
            if isinstance(row, dict):
                rows.append(
                    (f"{part}: {name}", "", "", f"{row['tokens_per_second']:.2f}", f"{row['bytes'] / 2**20:.2f}")
                )
    return table(head, rows)


if __name__ == "__main__":
    main()
