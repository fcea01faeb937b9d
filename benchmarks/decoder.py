"""Decoders at run time: bytes of the cache, tokens a second and perplexity under budgets, the dense model in turns.

python benchmarks/decoder.py --out benchmarks/results/decoder.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
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
        name: {"seconds": statistics.median(took), "tokens_per_second": len(ids) / statistics.median(took),
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


def merge(rows: dict[str, Any], more: dict[str, dict[str, float]]) -> None:
    for name, row in more.items():
        rows.setdefault(name, {}).update(row)


def cache_rows(net: Any, args: argparse.Namespace, rows: dict[str, Any]) -> Iterator[None]:
    """Budgets of the cache, behind a long prompt; then the perplexity of the whole text under each."""
    long = text(EVALUATION, args.texts, args.length)
    models: dict[str, Any] = {"dense": net}
    for budget in args.budgets:
        for method in ("streaming", "h2o"):
            models[f"{method} {budget}"] = secateur.prune(net, method, example=long[:, :64], budget=budget)
    if args.speed:
        merge(rows, speed(models, long[:1].repeat(args.batch, 1), args.steps))
        yield
    if not args.perplexity:
        return
    for name, model in models.items():
        rows.setdefault(name, {})["perplexity"] = under_budget(model, long, None if name == "dense" else args.chunk)
        yield


def weight_rows(net: Any, args: argparse.Namespace, rows: dict[str, Any]) -> Iterator[None]:
    """Features that are not read: the time of a token, and the perplexity of the second half of a text."""
    long = text(EVALUATION, args.texts, args.length)
    data = list(text(CALIBRATION, args.calibration, 512).split(1))
    models: dict[str, Any] = {"dense": net}
    for method in SPARSE:
        models[method] = secateur.prune(net, method, example=long[:, :64], data=data, sparsity=args.sparsity)
    if args.speed:
        merge(rows, speed(models, long[:1, : 128 + args.steps], args.steps))
    for name, model in models.items():
        rows.setdefault(name, {})["left_out"] = getattr(model, "left_out", 0.0)
        if args.perplexity:
            rows[name]["perplexity"] = second_half(model, long)
        if "recall" in getattr(model, "record", {}):
            rows[name] |= {k: statistics.mean(v) for k, v in model.record["recall"].items()}
    yield


def wide_rows(net: Any, args: argparse.Namespace, rows: dict[str, Any]) -> Iterator[None]:
    """The same on a wider model, of random weights."""
    large = wide(args.hidden, args.layers)
    ids = torch.randint(0, 1024, (2, 64 + args.steps), generator=torch.Generator().manual_seed(1))
    made = {
        f"{m} {share}": secateur.prune(large, m, example=ids, data=[ids], sparsity=share)
        for share in args.shares
        for m in SPARSE
    }
    merge(rows, speed({"dense": large, **made}, ids[:1], args.steps))
    yield


SPARSE = ("teal", "cats", "deja-vu")
PARTS = {"cache": cache_rows, "batch": cache_rows, "weights": weight_rows, "wide": wide_rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "decoder.json")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--batch", type=int, default=1, help="texts decoded at once, for the cache")
    parser.add_argument("--perplexity", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--speed", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--length", type=int, default=1024, help="of the texts")
    parser.add_argument("--texts", type=int, default=1)
    parser.add_argument("--budgets", type=int, nargs="+", default=[128, 256, 512])
    parser.add_argument("--chunk", type=int, default=16, help="tokens at once, under a budget")
    parser.add_argument("--steps", type=int, default=24, help="tokens that are timed")
    parser.add_argument("--sparsity", type=float, default=0.5, help="of teal, cats and deja-vu")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.8], help="the same, of the wide model")
    parser.add_argument("--calibration", type=int, default=4, help="windows of 512 tokens, for these")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found = json.loads(args.out.read_text()) if args.out.exists() else {}
    net = load_module("demo").eval()
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "parts", "perplexity", "speed")}
    for part in args.parts:
        rows = found.get(part, {}).get("rows", {})  # what is not measured now stays
        for _ in PARTS[part](net, args, rows):
            old = found.get(part, {})
            of = environment() if args.speed else old.get("environment", environment())
            found[part] = {"settings": settings, "environment": of, "rows": rows}
            write_json(args.out, found)  # what is there, should it be stopped
    print(text_of(found))


def text_of(found: dict[str, Any]) -> str:
    lines = []
    for part, content in found.items():
        for name, row in content["rows"].items():
            held = f"{row.get('bytes', 0) / 2**20:.2f}"
            perplexity = f"{row['perplexity']:.2f}" if "perplexity" in row else ""
            lines.append((f"{part}: {name}", f"{row.get('tokens_per_second', 0):.2f}", held, perplexity))
    return table(("model", "tokens/s", "MiB of the cache", "perplexity"), lines)


if __name__ == "__main__":
    main()
