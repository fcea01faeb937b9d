"""A realistic record of 210 layers, made from a seed."""

from __future__ import annotations

import math
import random
from typing import Any

SHAPES = {
    "self_attn.q_proj": (576, 576),
    "self_attn.k_proj": (192, 576),
    "self_attn.v_proj": (192, 576),
    "self_attn.o_proj": (576, 576),
    "mlp.gate_proj": (1536, 576),
    "mlp.up_proj": (1536, 576),
    "mlp.down_proj": (576, 1536),
}
METHODS = {"magnitude": (214.6, 0.061, 3.1), "wanda": (45.1, 0.021, 48.7), "sparsegpt": (38.4, 0.0134, 171.2)}
TOTAL = 134515008


def measured(perplexity: float | None, nonzero: int) -> dict[str, Any]:
    """What ``before`` and ``after`` hold."""
    text = {
        "value": perplexity,
        "tokens": 8176,
        "windows": 16,
        "length": 512,
        "stride": 512,
        "text": "evaluation text",
        "sha256": "5e" * 32,
    }
    return {
        "perplexity": text if perplexity is not None else None,
        "parameters": TOTAL,
        "nonzero": nonzero,
        "bytes": 2 * TOTAL,
        "seconds": 21.4 if nonzero == TOTAL else 21.9,
        "peak_memory": 1_150_000_000,
    }


def sample(method: str = "wanda", *, blocks: int = 30, uniform: bool = False) -> dict[str, Any]:
    """The record of a run of one method at 50 % over a small Llama."""
    rng = random.Random(f"{method}{blocks}")
    perplexity, level, seconds = METHODS[method]
    layers: list[dict[str, Any]] = []
    for block in range(blocks):
        for k, (name, shape) in enumerate(SHAPES.items()):
            size = shape[0] * shape[1]
            drift = 0.0 if uniform else 0.07 * math.sin(0.35 * block + 0.5 * k) * (0.4 + 0.1 * k)
            kept = round(size * (0.5 - drift))
            error = level * math.exp(0.06 * block - 0.3 * k + rng.gauss(0, 0.22)) * (0.3 if k == 6 and block > 2 else 1)
            layers.append(
                {
                    "name": f"model.layers.{block}.{name}",
                    "block": block,
                    "shape": list(shape),
                    "parameters": size,
                    "kept": kept,
                    "sparsity": 1 - kept / size,
                    "error": round(error, 7),
                    "seconds": round(seconds * size / 4e8 * rng.uniform(0.8, 1.3) * 3, 4),
                    "notes": ["damping raised to 0.02: the Gram matrix was singular"] if block == 0 and k < 2 else [],
                }
            )
    zeros = sum(layer["parameters"] - layer["kept"] for layer in layers)
    count = sum(layer["parameters"] for layer in layers)
    calibrated = method != "magnitude"
    return {
        "secateur": "0.1.0",
        "created": "2026-11-23T08:00:00Z",
        "command": f"secateur prune demo --method {method} --sparsity 0.5 --data text:corpus.txt --out pruned/{method}",
        "recipe": {
            "method": method,
            "criterion": method,
            "granularity": "row",
            "allocation": "uniform" if uniform else "owl",
            "schedule": "one-shot",
            "solver": "sparsegpt" if method == "sparsegpt" else "rank",
            "sparsity": 0.5,
            "options": {"damping": 0.01, "pattern": "2:4"},
        },
        "digest": "ab12" * 16,
        "cite": [
            "Sun et al., A Simple and Effective Pruning Approach for Large Language Models. ICLR 2024. arXiv 2306.11695"
        ],
        "model": {"source": "demo", "class": "LlamaForCausalLM", "parameters": TOTAL, "blocks": blocks},
        "data": {
            "source": "text:corpus.txt",
            "sha256": "c0ffee" * 10 + "abcd",
            "windows": 64,
            "length": 512,
            "tokens": 32768,
            "tokenizer": "demo (49,152 pieces)",
        }
        if calibrated
        else None,
        "seed": 0,
        "versions": {"python": "3.11.7", "torch": "2.9.1", "transformers": "4.57.3"},
        "machine": {"cpu": "AMD EPYC 7763", "threads": 2, "memory": 8_321_000_000},
        "layers": layers,
        "skipped": [
            {"name": "model.embed_tokens", "parameters": 28311552, "reason": "an embedding, tied to lm_head"},
            {"name": "lm_head", "parameters": 0, "reason": "tied to model.embed_tokens"},
            {
                "name": "*.input_layernorm, *.post_attention_layernorm, model.norm",
                "parameters": 35136,
                "reason": "not a matrix",
            },
        ],
        "sparsity": {"pruned_layers": zeros / count, "model": zeros / TOTAL},
        "timings": {
            "load": 1.3,
            "calibrate": 24.2 if calibrated else 0.0,
            "solve": seconds,
            "save": 1.6,
            "evaluate": 43.3,
            "total": seconds + (72.1 if calibrated else 47.0),
        },
        "peak_memory": {"magnitude": 640_000_000, "wanda": 1_310_000_000, "sparsegpt": 1_620_000_000}[method],
        "before": measured(27.9, TOTAL),
        "after": measured(perplexity, TOTAL - zeros),
        "notes": [
            "The corpus holds 31,904 distinct tokens in its first 64 windows.",
            "float32 on the CPU: bfloat16 has no fast path here.",
        ],
    }
