"""What zeros and smaller models gained where that was measured: figures that ship, each with its machine.

``speed.json`` is made of committed benchmark results by ``python benchmarks/recommend.py --figures``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from itertools import pairwise
from typing import Any

from .candidate import Expected
from .hardware import Hardware

#: Which measured models speak for a kind.
SPEAKS = {
    "cnn": ("resnet50", "densenet121", "convnext_tiny"),
    "vit": ("vit_base_patch16_224", "bert-base"),
    "encoder": ("bert-base", "vit_base_patch16_224"),
    "decoder": ("smollm2", "llama-135m"),
    "moe": ("smollm2", "llama-135m"),
    "encoder-decoder": ("smollm2", "bert-base", "llama-135m"),
    "other": (),
}


@cache
def shipped() -> Mapping[str, Any]:
    """The figures that ship with the package."""
    text = resources.files("secateur").joinpath("recommend", "speed.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


def summarise(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The figures of benchmark results: whole models with zeros in sparse kernels, and models that were made smaller.

    Args:
        results: name of the file -> its contents, of ``benchmarks/sparse.py`` and ``benchmarks/structured.py``.
    """
    made: dict[str, Any] = {"zeros": [], "units": [], "int8": []}
    for name, data in results.items():
        machine = _machine(data.get("models_environment") or data["environment"])
        for case in data.get("models", ()):
            model, workload, values = (x.strip() for x in _split(case["case"]))
            ratio = case["seconds"]["dense"] / case["seconds"]["sparse"]
            size = case["bytes"][1] / case["bytes"][0] if case.get("bytes") else None
            made["zeros"].append(
                {"model": model, "workload": workload, "values": values, "zeros": case["zeros"],
                 "ratio": round(ratio, 3), "bytes": None if size is None else round(size, 4), "machine": machine,
                 "file": name}
            )  # fmt: skip
        ratios = [
            c["seconds"]["dense"] / c["seconds"]["torch.int8"]
            for c in data.get("linear", ())
            if "torch.int8" in c["seconds"]
        ]
        if ratios:
            made["int8"].append(
                {
                    "low": round(min(ratios), 3),
                    "high": round(max(ratios), 3),
                    "cases": len(ratios),
                    "machine": machine,
                    "file": name,
                }
            )
        for row in data.get("rows", ()):
            for batch in ("1", "8"):
                if f"speedup_{batch}" in row:
                    made["units"].append(
                        {"model": row["name"], "batch": int(batch), "flops": round(row["flops"], 4),
                         "ratio": round(row[f"speedup_{batch}"], 3), "machine": machine, "file": name}
                    )  # fmt: skip
    return made


def _split(case: str) -> tuple[str, str, str]:
    first, _, rest = case.partition(",")
    middle, _, last = rest.rpartition(",")
    return first, middle.replace("input", ""), last


def _machine(environment: Mapping[str, Any]) -> dict[str, Any]:
    return {key: environment[key] for key in ("cpu", "instructions", "threads") if key in environment}


def named(machine: Mapping[str, Any]) -> str:
    """A machine in a few words."""
    return f"{machine.get('cpu', 'a CPU')}, {machine.get('instructions', '?')}, {machine.get('threads', '?')} threads"


def _of_kind(figures: Sequence[Mapping[str, Any]], kind: str) -> list[Mapping[str, Any]]:
    chosen = [f for f in figures if f["model"] in SPEAKS[kind]]
    return chosen or list(figures)


def zeros(kind: str, hardware: Hardware, sparsity: float, figures: Mapping[str, Any] | None = None) -> Expected:
    """How many times as fast a model with zeros is in the sparse kernels, float32 against float32.

    Between the shares that were measured it is interpolated in the logarithm; beyond the largest it stays. The interval
    spans the workloads and machines that were measured: it is no statement about other models.
    """
    chosen = _lines(kind, hardware, figures)
    if not hardware.kernels or not chosen:
        return Expected(None, source="the sparse kernels of this package do not run there, and nothing is measured")
    ratios = [_interpolated(line, sparsity) for _, line in chosen]
    middle = math.exp(sum(map(math.log, ratios)) / len(ratios))
    models = sorted({f["model"] for f, _ in chosen})
    machines = sorted({named(f["machine"]) for f, _ in chosen})
    loads = f"{len(chosen)} workload{'s' * (len(chosen) > 1)}"
    source = f"{', '.join(models)} in the sparse kernels, {loads}, on {' and '.join(machines)}"
    if hardware.instructions and not any(f["machine"].get("instructions") == hardware.instructions for f, _ in chosen):
        source += f" (nothing is measured with {hardware.instructions})"
    return Expected(middle, min(ratios), max(ratios), source) if len(ratios) > 1 else Expected(middle, source=source)


def _lines(
    kind: str, hardware: Hardware, figures: Mapping[str, Any] | None
) -> list[tuple[Mapping[str, Any], list[tuple[float, float]]]]:
    """For each workload and machine that speaks for a kind: what was measured, by the share of zeros."""
    given = [f for f in (figures or shipped())["zeros"] if f["values"] == "float32"]
    same = [f for f in given if f["machine"].get("instructions") == hardware.instructions]
    lines: dict[tuple[Any, ...], tuple[Mapping[str, Any], list[tuple[float, float]]]] = {}
    for f in _of_kind(same or given, kind):
        key = (f["model"], f["workload"], named(f["machine"]))
        lines.setdefault(key, (f, []))[1].append((f["zeros"], f["ratio"]))
    return [(f, sorted(line)) for f, line in lines.values()]


def _interpolated(line: Sequence[tuple[float, float]], x: float) -> float:
    """Piecewise in the logarithm, from 1 at no zeros; flat behind the last point.

    >>> round(_interpolated([(0.5, 2.0)], 0.25), 3), _interpolated([(0.5, 2.0)], 0.9)
    (1.414, 2.0)
    """
    points = [(0.0, 0.0), *((z, math.log(r)) for z, r in line)]
    for (a, low), (b, high) in pairwise(points):
        if a <= x <= b:
            return math.exp(low + (high - low) * (x - a) / (b - a))
    return math.exp(points[-1][1])


def sparsity_for(
    kind: str, hardware: Hardware, factor: float, figures: Mapping[str, Any] | None = None
) -> float | None:
    """The smallest share of zeros, in hundredths, that is expected to be so many times as fast; None where none is.

    Nothing is promised beyond the largest share that was measured.
    """
    measured = [z for _, line in _lines(kind, hardware, figures) for z, _ in line]
    for percent in range(1, round(100 * max(measured, default=0.0)) + 1):
        value = zeros(kind, hardware, percent / 100, figures).value
        if value is not None and value >= factor:
            return percent / 100
    return None


def pays_from(kind: str, hardware: Hardware, figures: Mapping[str, Any] | None = None) -> float | None:
    """The smallest share of zeros at which every workload that was measured is at least a tenth faster."""
    for percent in range(5, 100, 5):
        found = zeros(kind, hardware, percent / 100, figures)
        low = found.low if found.low is not None else found.value
        if low is not None and low >= 1.1:
            return percent / 100
    return None


def units(kind: str, keep: float, figures: Mapping[str, Any] | None = None) -> Expected:
    """How many times as fast a smaller model is that keeps this share of its operations, on a CPU.

    Every measured model gives an exponent: speed = keep ** -exponent.
    """
    chosen = _of_kind((figures or shipped())["units"], kind)
    if not chosen:
        return Expected(None)
    exponents = [math.log(f["ratio"]) / -math.log(f["flops"]) for f in chosen]
    middle = sum(exponents) / len(exponents)
    low, high = keep ** -min(exponents), keep ** -max(exponents)
    models = ", ".join(sorted({f["model"] for f in chosen}))
    machines = sorted({named(f["machine"]) for f in chosen})
    return Expected(
        keep**-middle, low, high, f"{models} made smaller, {len(chosen)} timings, on {' and '.join(machines)}"
    )


def flops_for(kind: str, factor: float, figures: Mapping[str, Any] | None = None) -> float:
    """The share of the operations that a smaller model may keep to be so many times as fast."""
    chosen = _of_kind((figures or shipped())["units"], kind)
    exponents = [math.log(f["ratio"]) / -math.log(f["flops"]) for f in chosen] or [1.0]
    return float(factor ** (-len(exponents) / sum(exponents)))
