"""Rows of a study that nobody ran, in the shapes that real ones have: seeds that differ, failures, holes."""

from __future__ import annotations

import base64
import math
import random
import zlib
from collections.abc import Sequence
from typing import Any

from secateur.compare import Row
from secateur.recipe import Recipe

METHODS = ("random", "magnitude", "wanda", "ria", "sparsegpt", "owl-wanda", "dsnot", "lamp")
TARGETS = ("0.5", "0.7", "0.9", "2:4")
CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
TOKENS = ("word start", "word rest", "number", "punctuation", "line end")
#: How bad each method is: multiplies what its sparsity costs.
HARM = {"random": 9.0, "magnitude": 2.2, "wanda": 1.0, "ria": 0.95, "sparsegpt": 0.55, "owl-wanda": 0.8, "dsnot": 0.97}
SECONDS = {
    "random": 2.0,
    "magnitude": 2.1,
    "lamp": 2.4,
    "wanda": 9.0,
    "ria": 11.0,
    "owl-wanda": 14.0,
    "sparsegpt": 61.0,
}


def row(
    subject: str, kind: str, label: str, target: str, seed: int, *, layers: int = 21, status: str = "done", **given: Any
) -> Row:
    """One run, with a result of every kind of figure."""
    draw = random.Random(f"{subject}/{label}/{target}/{seed}")
    dense = label == "dense"
    asked = 0.0 if dense else 0.5 if ":" in target else float(target)
    recipe = None
    if not dense:
        where: dict[str, Any] = {"granularity": target} if ":" in target else {"sparsity": asked}
        recipe = Recipe.of(label, **where, seed=seed).to_dict()
    digest = f"{zlib.crc32(f'{subject}{label}{target}{seed}'.encode()):08x}"
    common = {"digest": digest, "subject": subject, "kind": kind, "label": label, "recipe": recipe, "target": target}
    if status == "failed":
        return Row(**common, seed=seed, status="failed", reason="the loss is not a finite number at step 12")
    harm = HARM.get(label, 1.1) * asked**3 * (1.35 if ":" in target else 1.0)
    names = [f"blocks.{k // 7}.part{k % 7}" for k in range(layers)]
    sizes = [1000 * (1 + k % 7) for k in range(layers)]
    total = sum(sizes)
    kept = [max(1, round(n * (1 - asked * (0.95 + 0.1 * draw.random())))) for n in sizes]
    kept = [min(n, round(k * total * (1 - asked) / sum(kept))) for n, k in zip(sizes, kept, strict=True)]
    groups: dict[str, float]
    if kind == "task":
        score = max(0.1, 0.914 - 0.09 * harm + 0.004 * draw.gauss(0, 1))
        groups = {
            c: max(0.0, min(1.0, score - 0.05 * harm * (k % 3) + 0.01 * draw.gauss(0, 1)))
            for k, c in enumerate(CLASSES)
        }
    else:
        score = math.exp(math.log(14.2) + 1.7 * harm + 0.01 * draw.gauss(0, 1))
        groups = {c: score * (0.6 + 0.3 * k) for k, c in enumerate(TOKENS)}
    if not dense and kind == "task" and label == "magnitude" and target == "0.9":
        kept[3] = 0
    bits = bytes(
        zlib.crc32(f"{label}{target}{k}".encode()) & 255 & (0xFF if draw.random() < 0.9 else 0x55) for k in range(64)
    )
    result = {
        "metric": "accuracy" if kind == "task" else "perplexity",
        "higher_is_better": kind == "task",
        "valid": score,
        "test": score,
        "test_count": 10000,
        "groups": groups,
        "parameters": total,
        "nonzero": sum(kept),
        "sparsity": asked,
        "flops": 4.1e7,
        "effective_flops": 4.1e7 * (1 - asked),
        "bytes": 4 * total,
        "sparse_bytes": int(total / 8 + 4 * sum(kept)),
        "latency": None
        if kind == "model"
        else {
            "seconds": 0.011 * (1 - 0.5 * asked), "dense_seconds": 0.011, "ratio": 1 / (1 - 0.5 * asked),
            "low": 0.95 / (1 - 0.5 * asked), "high": 1.05 / (1 - 0.5 * asked), "how": "cpu-sparse", "workers": 2,
        },
        "layers": [{"name": a, "parameters": b, "kept": c} for a, b, c in zip(names, sizes, kept, strict=True)],
        "sketch": None if dense else {"bits": base64.b64encode(bits).decode(), "counts": [32] * 16},
        "cost": {
            "seconds": 0.0 if dense else SECONDS.get(label, 12.0) * (0.9 + 0.2 * draw.random()),
            "peak_memory": 700_000_000 + 1000 * len(label), "samples": 0 if label in ("random", "magnitude") else 128,
            "labels": 0, "epochs": 5.0, "after_dense": 0.0,
        },
        "protocol": {"epochs": 5} if kind == "task" else {"windows": 64, "length": 512},
        "data": {"train": "a" * 64, "valid": "b" * 64, "test": "c" * 64},
        "environment": {
            "machine": {"cpu": "Example 2 GHz", "threads": 2, "memory": 8 << 30},
            "versions": {"python": "3.12.3", "torch": "2.8.0", "secateur": "0.1.0"}, "threads": 1,
        },
        "created": "2025-11-27T11:30:00Z",
        "recipe_digest": "" if recipe is None else Recipe.from_dict(recipe).digest,
    }  # fmt: skip
    return Row(**common, seed=seed, result={**result, **given})


def rows(
    subjects: Sequence[tuple[str, str]] = (("fashion-resnet", "task"), ("demo", "model")),
    methods: Sequence[str] = METHODS,
    targets: Sequence[str] = TARGETS,
    seeds: int = 3,
    *,
    layers: int = 21,
    holes: bool = True,
) -> list[Row]:
    """A whole study; with ``holes`` some runs failed, some are missing, some cells have one seed."""
    made = []
    for subject, kind in subjects:
        for seed in range(seeds):
            made.append(row(subject, kind, "dense", "", seed, layers=layers))
            for label in methods:
                for target in targets:
                    failed = holes and (
                        (label, target) == ("dsnot", "0.9") or (label, target, seed) == ("lamp", "0.7", 1)
                    )
                    if holes and (label, target) == ("lamp", "2:4"):
                        continue
                    if holes and (label, target) == ("ria", "0.9") and seed:
                        continue
                    status = "failed" if failed else "done"
                    made.append(row(subject, kind, label, target, seed, layers=layers, status=status))
    return made


def study(given: Sequence[Row]) -> dict[str, Any]:
    """What `Study.to_dict` says of these rows."""
    kinds = {r.subject: r.kind for r in given}
    return {
        "study": "Eight one-shot methods",
        "tasks": [{"task": s} for s, kind in kinds.items() if kind == "task"],
        "models": [s for s, kind in kinds.items() if kind == "model"],
        "methods": list(dict.fromkeys(r.label for r in given if not r.dense)),
        "targets": list(dict.fromkeys(r.target for r in given if not r.dense)),
        "seeds": sorted({r.seed for r in given}),
        "budget": {"samples": 8, "windows": 64},
        "data": "text:calibration",
        "evaluation": "text:evaluation",
    }
