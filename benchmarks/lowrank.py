"""Perplexity of SmolLM2-135M with low-rank layers: plain, scaled and whitened, ranks spread or the same everywhere.

    python benchmarks/lowrank.py --out lowrank.json

Every row is written as it is done; a row that is there is not made again.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import torch

import secateur
from secateur.data import CALIBRATION, EVALUATION, windows
from secateur.measure import machine, perplexity, versions
from secateur.models import load_model, load_tokenizer, resolve

ROWS = (
    ("dense", 0.0, ""),
    ("low-rank", 0.2, "greedy"),
    ("svd", 0.2, "greedy"),
    ("low-rank", 0.4, "greedy"),
    ("svd", 0.4, "greedy"),
    ("low-rank", 0.2, "uniform"),
    ("asvd", 0.2, "greedy"),
    ("svd", 0.2, "uniform"),
    ("low-rank", 0.4, "uniform"),
    ("low-rank+sparse", 0.4, "uniform"),
)


def main() -> None:
    """Measure the rows that are missing."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/lowrank.json"))
    parser.add_argument("--windows", type=int, default=16, help="of calibration")
    parser.add_argument("--eval-windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    given = parser.parse_args()
    path = resolve("demo")
    tokenizer = load_tokenizer(path)
    seen = windows(CALIBRATION, tokenizer, count=given.windows, length=given.length)
    held_out = windows(EVALUATION, tokenizer, count=given.eval_windows, length=given.length)
    record: dict[str, Any] = {"rows": []}
    if given.out.exists():
        record = json.loads(given.out.read_text(encoding="utf-8"))
    record |= {"data": seen.describe(), "held_out": held_out.describe(), "machine": machine(), "versions": versions()}
    done = {(r["method"], r["sparsity"], r["allocation"]) for r in record["rows"]}
    dense = load_model(path, torch.float32)
    for method, sparsity, allocation in ROWS:
        if (method, sparsity, allocation) in done:
            continue
        model, started = dense, time.perf_counter()
        row: dict[str, Any] = {"method": method, "sparsity": sparsity, "allocation": allocation}
        if method != "dense":
            model = copy.deepcopy(dense)
            made = secateur.decompose(model, method, sparsity=sparsity, allocation=allocation, data=seen)
            row |= {k: made.run[k] for k in ("before", "after", "peak_memory")}
            row["decomposed"] = sum(r.kind != "dense" for r in made.records)
            row["layers"] = len(made.records)
            row["mean_error"] = sum(r.error for r in made.records) / len(made.records)
        row["seconds"] = round(time.perf_counter() - started, 1)
        row["perplexity"] = perplexity(model, held_out.ids).to_dict()
        record["rows"].append(row)
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(f"{method:16} {sparsity:4} {allocation:8} {row['perplexity']['value']:9.2f}", row["seconds"], flush=True)


if __name__ == "__main__":
    main()
