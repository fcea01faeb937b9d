"""The published definitions, written down naively, against what secateur does to a real model.

The inputs of every layer are gathered here by plain forward hooks on the dense model, in float64, with no help from
secateur, which runs with ``propagate="off"`` so that both see the same inputs.

- wanda: the mask by sorting ``|w| ||x||`` in each row (in each run of M) must be the mask that secateur made. A
  difference counts as rounding only where the two weights' scores agree to 1e-6, and is listed.
- sparsegpt: algorithm 1 of arXiv 2301.00774 as a plain loop over columns in float64; secateur's output error
  ``||(W - W') X||^2`` on each layer may be at most 1 % higher.
- both: exact counts in every pool, removed weights exactly zero, nothing outside the pruned layers touched.

Exit code 1 when anything fails.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, axes, environment, table, write_json
from torch import Tensor, nn

TIE = 1e-6
LIMIT = 1.01


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--blocks", type=int, default=30, help="first blocks on which wanda is compared")
    parser.add_argument("--sparsegpt-blocks", type=int, default=2, help="first blocks on which sparsegpt is compared")
    parser.add_argument("--targets", nargs="+", default=["0.5", "2:4"])
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=RESULTS / "correctness.json")
    return parser.parse_args()


# -- the reference: hooks, sorting, and a loop over columns ------------------------------------------------------------


def linears(model: Any, blocks: int) -> dict[str, nn.Linear]:
    """The linear layers of the first blocks, by name."""
    parts = [(f"model.layers.{k}", block) for k, block in enumerate(model.model.layers[:blocks])]
    return {f"{p}.{n}": m for p, block in parts for n, m in block.named_modules() if isinstance(m, nn.Linear)}


@torch.no_grad()
def gather(model: Any, ids: Tensor, blocks: int, gram_blocks: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Sums of squares of each input feature and, of the first blocks, ``X X^T``; float64, on the dense model."""
    squares: dict[str, Tensor] = {}
    grams: dict[str, Tensor] = {}
    with_gram = set(linears(model, gram_blocks))

    def hook(name: str) -> Any:
        def seen(_: nn.Module, inputs: tuple[Tensor, ...], __: Tensor) -> None:
            x = inputs[0].double().reshape(-1, inputs[0].shape[-1])
            squares[name] = squares.get(name, 0) + (x * x).sum(0)
            if name in with_gram:
                grams[name] = grams.get(name, 0) + x.t() @ x

        return seen

    wanted = linears(model, max(blocks, gram_blocks))
    handles = [m.register_forward_hook(hook(n)) for n, m in wanted.items()]
    for row in ids.split(1):
        model(input_ids=row, use_cache=False)
    for handle in handles:
        handle.remove()
    return squares, grams


def runs_of(target: str, columns: int) -> tuple[int, int]:
    """``(pool, kept)``: the neighbors along a row that compete, and how many of them stay."""
    if ":" in target:
        n, m = (int(x) for x in target.split(":"))
        return m, n
    return columns, columns - int(columns * float(target))


def wanda_mask(weight: Tensor, squares: Tensor, target: str) -> tuple[Tensor, Tensor]:
    """The mask by definition, and the float64 scores."""
    score = weight.double().abs() * squares.sqrt()
    pool, kept = runs_of(target, weight.shape[1])
    pools = score.reshape(-1, pool)
    order = pools.argsort(dim=1, descending=True, stable=True)
    mask = torch.zeros_like(pools, dtype=torch.bool)
    mask.scatter_(1, order[:, :kept], True)
    return mask.reshape(weight.shape), score


def gaps(mine: Tensor, reference: Tensor, score: Tensor, target: str) -> Tensor:
    """Of each weight on which the masks differ: how far its score is from the lowest that stays, relatively."""
    pool, _ = runs_of(target, score.shape[1])
    score, mine, reference = (x.reshape(-1, pool) for x in (score, mine, reference))
    edge = torch.where(reference, score, torch.inf).min(1, keepdim=True).values
    return ((score - edge).abs() / edge)[mine != reference]


def sparsegpt_reference(weight: Tensor, gram: Tensor, target: str, block: int = 128, damp: float = 0.01) -> Tensor:
    """Algorithm 1, column after column, everything to the right updated at once, in float64."""
    w, h = weight.double().clone(), gram.clone()
    columns = w.shape[1]
    dead = h.diagonal() == 0
    h[dead, dead] = 1.0
    w[:, dead] = 0.0
    h += damp * h.diagonal().mean() * torch.eye(columns, dtype=h.dtype)
    upper = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    keep = torch.ones_like(w, dtype=torch.bool)
    for j in range(columns):
        if ":" in target:
            n, m = (int(x) for x in target.split(":"))
            if j % m == 0:
                score = (w[:, j : j + m] / upper.diagonal()[j : j + m]).square()
                gone = score.argsort(dim=1)[:, : m - n]
                keep[:, j : j + m] = keep[:, j : j + m].scatter(1, gone, False)
        elif j % block == 0:
            end = min(j + block, columns)
            score = (w[:, j:end] / upper.diagonal()[j:end]).square().reshape(-1)
            gone = score.argsort()[: round(score.numel() * float(target))]
            keep[:, j:end] = torch.ones_like(score, dtype=torch.bool).scatter(0, gone, False).reshape(-1, end - j)
        lost = torch.where(keep[:, j], 0.0, w[:, j]) / upper[j, j]
        w[:, j:] -= lost[:, None] * upper[j, j:]
        w[~keep[:, j], j] = 0.0
    return w


def output_error(before: Tensor, after: Tensor, gram: Tensor) -> float:
    """``||(W - W') X||^2 / ||W X||^2``, float64."""
    change, whole = before.double() - after.double(), before.double()
    return float(((change @ gram) * change).sum() / ((whole @ gram) * whole).sum())


# -- the comparison ----------------------------------------------------------------------------------------------------


def exact(mask: Tensor, target: str, by_row: bool) -> bool:
    """Whether every pool keeps exactly its count: each run of M, each row, or the layer."""
    pool, kept = runs_of(target, mask.shape[1])
    if by_row or ":" in target:
        return bool((mask.reshape(-1, pool).sum(1) == kept).all())
    return int((~mask).sum()) == round(mask.numel() * float(target))


def prune(path: Path, method: str, target: str, ids: Tensor, blocks: int) -> tuple[Any, dict[str, Tensor]]:
    """What secateur makes of a fresh copy: the pruned model and its masks."""
    import secateur
    from secateur.models import load_model

    model = load_model(path, torch.float32)
    only = tuple(f"model.layers.{k}.*" for k in range(blocks))
    pruned = secateur.prune(model, method, data=ids, propagate="off", only=only, **axes(target))
    return model, {n: pruned.masks[n] for n in pruned.masks}


def untouched(dense: Any, model: Any, names: set[str]) -> list[str]:
    """Parameters outside the pruned layers that are not bit for bit what they were."""
    was = dict(dense.named_parameters())
    return [n for n, p in model.named_parameters() if n not in names and not torch.equal(p, was[n])]


def check(dense: Any, path: Path, method: str, target: str, ids: Tensor, blocks: int, facts: Any) -> dict[str, Any]:
    """One line of the table."""
    begun = time.perf_counter()
    squares, grams = facts
    layers = linears(dense, blocks)
    model, masks = prune(path, method, target, ids, blocks)
    after = linears(model, blocks)
    problems = [f"{n} changed" for n in untouched(dense, model, {f"{n}.weight" for n in layers})]
    if set(masks) != set(layers):
        problems.append(f"pruned {len(masks)} layers where {len(layers)} were due")
    differ = beyond = weights = 0
    widest = 0.0
    ratios: dict[str, float] = {}
    for name in sorted(set(masks) & set(layers)):
        before, now, mask = layers[name].weight.detach(), after[name].weight.detach(), masks[name]
        weights += mask.numel()
        if not exact(mask, target, method == "wanda"):
            problems.append(f"{name}: the count of a pool is off")
        if bool(now[~mask].any()):
            problems.append(f"{name}: a removed weight is not zero")
        if method == "wanda":
            reference, score = wanda_mask(before, squares[name], target)
            gap = gaps(mask, reference, score, target)
            differ += gap.numel()
            wrong = int((gap > TIE).sum())
            beyond += wrong
            widest = max(widest, float(gap.max()) if gap.numel() else 0.0)
            if wrong:
                problems.append(f"{name}: the mask differs from the definition in {wrong} weights")
            if not torch.equal(now[mask], before[mask]):
                problems.append(f"{name}: wanda moved a weight that stays")
        else:
            reference = sparsegpt_reference(before, grams[name], target)
            mine, theirs = output_error(before, now, grams[name]), output_error(before, reference, grams[name])
            ratios[name] = mine / theirs
            if not ratios[name] <= LIMIT:
                problems.append(f"{name}: output error is {ratios[name]:.4f} of the reference's")
    return {
        "method": method,
        "target": target,
        "blocks": blocks,
        "layers": len(masks),
        "weights": weights,
        "kept": sum(int(m.sum()) for m in masks.values()),
        "differ": differ if method == "wanda" else None,
        "differ_beyond_rounding": beyond if method == "wanda" else None,
        "differ_widest": widest if method == "wanda" else None,
        "error_ratio_max": max(ratios.values()) if ratios else None,
        "error_ratio_mean": sum(ratios.values()) / len(ratios) if ratios else None,
        "error_ratios": ratios,
        "seconds": round(time.perf_counter() - begun, 1),
        "problems": problems,
    }


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    from secateur.data import windows
    from secateur.models import load_model, load_tokenizer, resolve

    path = resolve(args.model)
    tokens = windows("text:calibration", load_tokenizer(path), count=args.windows, length=args.length)
    dense = load_model(path, torch.float32)
    total = len(dense.model.layers)
    blocks, few = min(args.blocks, total), min(args.sparsegpt_blocks, total)
    facts = gather(dense, tokens.ids, blocks, few)
    rows = []
    for method, count in (("wanda", blocks), ("sparsegpt", few)):
        for target in args.targets if count else ():
            rows.append(check(dense, path, method, target, tokens.ids, count, facts))
            print(f"{method} {target}: {rows[-1]['problems'][:3] or 'ok'}", file=sys.stderr, flush=True)
    described = tokens.describe()
    result = {
        "environment": environment(args.threads),
        "model": args.model,
        "data": {k: described[k] for k in ("source", "sha256", "windows", "length", "tokens")},
        "rows": rows,
        "passed": not any(r["problems"] for r in rows),
    }
    write_json(args.out, result)
    print(show(result))
    for r in rows:
        for problem in r["problems"][:20]:
            print(f"FAILED {r['method']} {r['target']}: {problem}")
    raise SystemExit(0 if result["passed"] else 1)


def show(result: dict[str, Any]) -> str:
    """The table."""
    head = ["", "blocks", "layers", "weights", "kept", "mask differs", "by at most", "error / reference", "verdict"]
    lines = []
    for r in result["rows"]:
        masks = [f"{r['differ']:,}", f"{r['differ_widest']:.0e}"] if r["differ"] is not None else ["", ""]
        ratio = f"{r['error_ratio_mean']:.5f} (max {r['error_ratio_max']:.5f})" if r["error_ratios"] else ""
        verdict = "FAILED" if r["problems"] else "ok"
        counts = [str(r["blocks"]), str(r["layers"]), f"{r['weights']:,}", f"{r['kept']:,}"]
        lines.append([f"{r['method']} {r['target']}", *counts, *masks, ratio, verdict])
    return table(head, lines)


if __name__ == "__main__":
    main()
