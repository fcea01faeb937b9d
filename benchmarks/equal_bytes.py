"""SmolLM2-135M at equal bytes on disk: pruned, quantized, decomposed, and combinations of these.

    python benchmarks/equal_bytes.py                 # perplexity of every row and draw of calibration text
    python benchmarks/equal_bytes.py --speed         # then, on a quiet machine: tokens/s of each row beside dense
    python benchmarks/equal_bytes.py --table         # print what is there
    python benchmarks/equal_bytes.py --evidence src/secateur/recommend/evidence/bytes.jsonl.gz   # for the recommender

The budget is that of the linear layers of all blocks, in which 79 % of the model lies: 25, 40 or 50 % of what they
take in bfloat16. Embeddings and norms are the same bfloat16 everywhere, so that equal layers are equal files. What a
row fills of its budget is counted in bits, scales, masks and words included, and never above it. Every row is written
as it is done; a row that is there is not made again.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, environment, write_json
from torch import nn

import secateur
from secateur.data import CALIBRATION, EVALUATION, Windows, windows
from secateur.measure import perplexity
from secateur.measure.speed import Forward, Generation, speeds
from secateur.models import load_model, load_tokenizer, resolve
from secateur.recipe import Recipe

BUDGETS = (0.25, 0.4, 0.5)
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # two-sided, by the number of draws
GROUP = 64


@dataclass(frozen=True)
class Row:
    """One way of filling a budget.

    Attributes:
        kind: pruning, quantization, low-rank or fusion.
        make: ``make(model, budget, text)`` changes the model in place; returns what was done, in words.
        bits: ``bits(model, budget)`` of all linear layers, counted after it was made.
        values: how ``compress`` may store what is left, for the speed.
    """

    name: str
    kind: str
    make: Callable[[nn.Module, float, Windows], str]
    bits: Callable[[nn.Module, float], float]
    values: tuple[str, ...] = ("float32",)


def linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Linear layers of the blocks; of decomposed ones their factors."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".layers." in name:
            yield name, module


def density(budget: float, bits: float, scales: float) -> float:
    """The share of the weights that stays where each takes ``bits``, and a bit of mask and the scales are paid for."""
    return min(1.0, (16 * budget - 1 - scales) / bits)


def scale_bits(bits: int) -> float:
    """Bits of scales for a weight: of a group of 64 below 8 bits, of a row at 8 (bounded by the narrowest layer)."""
    return 16 / GROUP if bits < 8 else 16 / 576


def pruned(model: nn.Module, budget: float, text: Windows) -> str:
    keep = density(budget, 16, 0)
    secateur.prune(model, "sparsegpt", sparsity=1 - keep, data=text)
    return f"{1 - keep:.1%} gone, bfloat16"


def quantized(model: nn.Module, budget: float, text: Windows) -> str:
    bits = {0.25: 4, 0.4: 6, 0.5: 7}[budget]
    gate = ("*gate_proj",) if budget == 0.25 else ()  # a quarter of the weights of a block, with a bit less
    secateur.prune(model, Recipe.of("gptq", skip=gate).quantized(f"int{bits}:{GROUP}"), data=text)
    if gate:
        secateur.prune(model, Recipe.of("gptq", only=gate).quantized(f"int{bits - 1}:{GROUP}"), data=text)
        return "int4, gate_proj int3"
    return f"int{bits}"


def joint(bits: int) -> Callable[[nn.Module, float, Windows], str]:
    def make(model: nn.Module, budget: float, text: Windows) -> str:
        keep = density(budget, bits, scale_bits(bits))
        name = f"int{bits}:{GROUP}" if bits < 8 else "int8"
        secateur.prune(model, Recipe.of("sparsegpt", sparsity=1 - keep).quantized(name), data=text)
        return f"{1 - keep:.1%} gone, int{bits}"

    return make


def low_rank(model: nn.Module, budget: float, text: Windows) -> str:
    secateur.decompose(model, "low-rank", sparsity=1 - budget, data=text)
    return f"{1 - budget:.0%} of the values gone, bfloat16"


def low_rank_sparse(model: nn.Module, budget: float, text: Windows) -> str:
    secateur.decompose(model, "low-rank+sparse", sparsity=1 - budget + 1 / 16, data=text)
    return "factors and a sparse term, bfloat16"


def low_rank_int8(model: nn.Module, budget: float, text: Windows) -> str:
    gone = 1 - budget * 16 / (8 + 16 / 192)  # factors are narrower: more scales
    secateur.decompose(model, "low-rank", sparsity=gone, data=text)
    factors = tuple(name for name, _ in linears(model))
    secateur.prune(model, Recipe.of("gptq", only=factors).quantized("int8"), data=text)
    return f"{gone:.0%} of the values gone, int8"


def mask_bits(value_bits: Callable[[float], float]) -> Callable[[nn.Module, float], float]:
    """A bit for each weight, and the values that are not zero."""

    def count(model: nn.Module, budget: float) -> float:
        total = sum(m.weight.numel() for _, m in linears(model))
        kept = sum(int(m.weight.count_nonzero()) for _, m in linears(model))
        return total + value_bits(budget) * kept

    return count


def joint_bits(bits: int) -> Callable[[nn.Module, float], float]:
    def count(model: nn.Module, budget: float) -> float:
        found = 0.0
        for _, m in linears(model):
            kept = round(density(budget, bits, scale_bits(bits)) * m.weight.numel())
            scales = m.weight.numel() / GROUP if bits < 8 else m.out_features
            found += m.weight.numel() + bits * kept + 16 * scales
        return found

    return count


def grid_bits(model: nn.Module, budget: float) -> float:
    bits = {0.25: 4, 0.4: 6, 0.5: 7}[budget]
    less = budget == 0.25
    return sum(
        m.weight.numel() * (bits - (1 if less and n.endswith("gate_proj") else 0) + 16 / GROUP)
        for n, m in linears(model)
    )


def factor_bits(model: nn.Module, budget: float) -> float:
    """Factors at 16 bits; of a sparse term its values and a bit for each weight."""
    found = 0.0
    for _, m in linears(model):
        kept, size = int(m.weight.count_nonzero()), m.weight.numel()
        found += 16 * size if kept > 0.95 * size else size + 16 * kept
    return found


def factor_int8_bits(model: nn.Module, budget: float) -> float:
    return sum(8 * m.weight.numel() + 16 * m.out_features for _, m in linears(model))


ROWS = (
    Row("sparsegpt", "pruning", pruned, mask_bits(lambda budget: 16)),
    Row("gptq", "quantization", quantized, grid_bits, ("float32", "int8", "int8-dynamic", "int4")),
    Row("low-rank", "low-rank", low_rank, factor_bits),
    Row("sparsegpt+int8", "fusion", joint(8), joint_bits(8), ("float32", "int8", "int8-dynamic")),
    Row("sparsegpt+int6", "fusion", joint(6), joint_bits(6), ("float32", "int8", "int8-dynamic")),
    Row("sparsegpt+int4", "fusion", joint(4), joint_bits(4), ("float32", "int8", "int8-dynamic", "int4")),
    Row("low-rank+int8", "fusion", low_rank_int8, factor_int8_bits, ("float32", "int8", "int8-dynamic")),
    Row("low-rank+sparse", "fusion", low_rank_sparse, factor_bits),
)


def fits(row: Row, budget: float) -> bool:
    """Whether a row has something to leave out at a budget: int4 is below 40 % already, int6 below 50."""
    limits = {"sparsegpt+int4": 0.3, "sparsegpt+int6": 0.45, "low-rank+int8": 0.45}
    return budget < limits.get(row.name, 1.0)


def draw(tokenizer: Any, given: argparse.Namespace, seed: int) -> Windows:
    return windows(CALIBRATION, tokenizer, count=given.windows, length=given.length, seed=seed)


def main() -> None:
    """Measure the rows that are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "equal_bytes.json")
    parser.add_argument("--seeds", type=int, default=3, help="draws of calibration text")
    parser.add_argument("--windows", type=int, default=16, help="of calibration")
    parser.add_argument("--eval-windows", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--speed", action="store_true", help="measure tokens/s of the first draw instead")
    parser.add_argument("--table", action="store_true", help="print only")
    parser.add_argument("--evidence", type=Path, help="write the rows that are recipes as evidence, and nothing else")
    parser.add_argument("--models", type=Path, help="where decomposed models are kept as they are made, for the speed")
    parser.add_argument("--budgets", type=float, nargs="+", default=[*BUDGETS])
    parser.add_argument("--only", default="", help="rows by name, by commas")
    given = parser.parse_args()
    record: dict[str, Any] = {"rows": [], "speed": []}
    if given.out.exists():
        record |= json.loads(given.out.read_text(encoding="utf-8"))
    if given.table:
        print(table(record))
        return
    if given.evidence is not None:
        export(record, given.evidence)
        return
    path = resolve("demo")
    tokenizer = load_tokenizer(path)
    held_out = windows(EVALUATION, tokenizer, count=given.eval_windows, length=given.length)
    record |= {"held_out": held_out.describe(), "windows": given.windows, "length": given.length}
    record["environment"] = environment()
    dense = load_model(path, torch.float32)
    if "dense" not in record:
        record["dense"] = perplexity(dense, held_out.ids).to_dict()
        print(f"dense {record['dense']['value']:.2f}", flush=True)
    chosen = [r for r in ROWS if not given.only or r.name in given.only.split(",")]
    for seed in range(given.seeds):
        for budget in given.budgets:
            for row in chosen:
                if not fits(row, budget):
                    continue
                key = {"row": row.name, "kind": row.kind, "budget": budget, "seed": seed}
                done = any({k: r[k] for k in key} == key for r in record["rows"])
                if done and not (given.speed and seed == 0):
                    continue
                if given.speed and any(r["row"] == row.name and r["budget"] == budget for r in record["speed"]):
                    continue
                model, begun = copy.deepcopy(dense), time.perf_counter()
                kept = None if given.models is None or seed else given.models / f"{row.name} {budget:g}"
                if given.speed and kept is not None and kept.is_dir():
                    model = secateur.load(kept)
                else:
                    what = row.make(model, budget, draw(tokenizer, given, seed))
                    if kept is not None and not kept.is_dir() and hasattr(model, "secateur_surgery"):
                        secateur.save(model, kept)
                took = round(time.perf_counter() - begun, 1)
                if given.speed:
                    record["speed"].append({**key, **speed(model, dense, row)})
                    print(row.name, budget, record["speed"][-1]["ratio"], flush=True)
                else:
                    size = sum(m.weight.numel() for _, m in linears(dense)) * 16
                    used = row.bits(model, budget) / size
                    value = perplexity(model, held_out.ids).to_dict()
                    record["rows"].append({**key, "what": what, "used": used, "seconds": took, "perplexity": value})
                    print(f"{row.name:16} {budget:4} {seed} {used:.4f} {value['value']:10.2f} {took:6.1f}", flush=True)
                write_json(given.out, record)
    print(table(record))


def recipe_of(row: Row, budget: float) -> Recipe | None:
    """What the row did, where it is one recipe."""
    if row.name == "sparsegpt":
        return Recipe.of("sparsegpt", sparsity=1 - density(budget, 16, 0))
    if row.name == "gptq":
        return Recipe.of("gptq").quantized(f"int{ {0.25: 4, 0.4: 6, 0.5: 7}[budget] }:{GROUP}")
    if not row.name.startswith("sparsegpt+int"):
        return None
    bits = int(row.name[-1])
    name = f"int{bits}:{GROUP}" if bits < 8 else "int8"
    return Recipe.of("sparsegpt", sparsity=1 - density(budget, bits, scale_bits(bits))).quantized(name)


def export(record: dict[str, Any], target: Path) -> None:
    """Rows as the recommender reads them; the target is what goes, of the bytes of the layers in bfloat16."""
    import gzip
    import hashlib

    from secateur.compare import Row as Run
    from secateur.recommend.evidence import FORMAT

    machine = {k: record["environment"][k] for k in ("cpu", "instructions", "memory", "system")}
    whole = 134515008  # parameters
    subject = {"demo": {"kind": "decoder", "parameters": whole}}
    lines = [json.dumps({"format": FORMAT, "study": "bytes", "subjects": subject})]
    rows = {row.name: row for row in ROWS}

    def line(label: str, recipe: Recipe | None, budget: float, seed: int, value: float, seconds: float) -> str:
        target = "" if recipe is None else f"bytes {100 * (1 - budget):g}%"
        name = hashlib.sha256(f"{label} {budget} {seed}".encode()).hexdigest()[:20]
        result = {
            "metric": "perplexity", "higher_is_better": False, "test": value, "parameters": whole,
            "cost": {"seconds": seconds, "samples": record["windows"], "labels": 0, "epochs": 0.0},
            "protocol": {"windows": record["windows"], "length": record["length"]},
            "environment": {"machine": machine, "threads": 1},
            "recipe_digest": None if recipe is None else recipe.digest,
        }  # fmt: skip
        plain = None if recipe is None else recipe.to_dict()
        run = Run(name, "demo", "model", label, plain, target, seed, result=result)
        return json.dumps(run.to_dict(), sort_keys=True)

    seeds = sorted({r["seed"] for r in record["rows"]})
    lines += [line("dense", None, 0.0, seed, record["dense"]["value"], 0.0) for seed in seeds]
    for r in record["rows"]:
        if (recipe := recipe_of(rows[r["row"]], r["budget"])) is not None:
            lines.append(line(r["row"], recipe, r["budget"], r["seed"], r["perplexity"]["value"], r["seconds"]))
    target.write_bytes(gzip.compress(("\n".join(lines) + "\n").encode(), mtime=0))
    print(f"{len(lines) - 1} rows in {target}")


def speed(model: nn.Module, dense: nn.Module, row: Row) -> dict[str, Any]:
    """Tokens a second of generation and of a prompt, by the fastest kernels there are for it, dense in turns."""
    ids = torch.arange(128)[None]
    loads = [{"input_ids": ids}, {"input_ids": ids[:, :1]}]
    fast = secateur.compress(model, loads, kinds=row.values)
    work = [Generation(ids, ids[:, :32]), Forward("prompt of 128", kwargs={"input_ids": ids}, count=128)]
    found = speeds({row.name: fast, "dense": dense}, work, repeats=7)
    return {
        "tokens_per_second": {name: parts["per token"]["rate"] for name, parts in found.items()},
        "ratio": found[row.name]["per token"]["ratio"],
        "prompt": {name: parts["prompt of 128"]["rate"] for name, parts in found.items()},
        "prompt_ratio": found[row.name]["prompt of 128"]["ratio"],
        "compressed": fast is not model,
    }


def table(record: dict[str, Any]) -> str:
    """Perplexity by row and budget, with a t interval of its logarithm over draws, and tokens/s beside dense."""
    lines = [
        f"dense {record['dense']['value']:.2f}",
        f"{'row':16}{'budget':>8}{'filled':>8}{'perplexity':>12}{'95 %':>26}{'n':>3}{'tokens/s':>10}{'ratio':>7}  what",
    ]
    for budget in BUDGETS:
        for row in ROWS:
            own = [r for r in record["rows"] if r["row"] == row.name and r["budget"] == budget]
            if not own:
                continue
            values = [r["perplexity"]["value"] for r in own]
            logs, n = [math.log(v) for v in values], len(values)
            mean, half = statistics.mean(logs), T_95[n] * statistics.stdev(logs) / n**0.5 if n > 1 else 0.0
            timed = [s for s in record["speed"] if s["row"] == row.name and s["budget"] == budget]
            rate = f"{'':17}"
            if timed:
                rate = f"{timed[0]['tokens_per_second'][row.name]:>10.1f}{timed[0]['ratio']['median']:>7.2f}"
            low, middle, high = (math.exp(x) for x in (mean - half, mean, mean + half))
            spread, used = f"{low:.2f} to {high:.2f}" if n > 1 else "", own[0]["used"]
            lines.append(
                f"{row.name:16}{budget:>8.0%}{used:>8.1%}{middle:>12.2f}{spread:>26}{n:>3}{rate}  {own[0]['what']}"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
