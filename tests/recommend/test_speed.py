"""Figures of speed: those that ship are those that were measured, and what is read out of them is right."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur.recommend import Hardware, speed

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
AVX2 = Hardware.parse("cpu avx2")


def figures(**by_zeros: float) -> dict[str, Any]:
    zeros = [
        {"model": "resnet50", "workload": "x", "values": "float32", "zeros": float(z) / 10, "ratio": r,
         "machine": {"instructions": "AVX2"}}
        for z, r in ((k[1:], v) for k, v in by_zeros.items())
    ]  # fmt: skip
    units = [{"model": "resnet50", "flops": 0.5, "ratio": r, "machine": {}} for r in (2.0, 2.0**0.5)]
    return {"zeros": zeros, "units": units, "int8": []}


def test_what_ships_is_what_was_measured() -> None:
    names = ("sparse.json", "sparse_avx512.json", "structured.json")
    results = {name: json.loads((RESULTS / name).read_text(encoding="utf-8")) for name in names}
    assert speed.shipped() == speed.summarise(results), "run python benchmarks/recommend.py --figures"
    assert all(f["machine"]["cpu"] and f["file"] for shelf in speed.shipped().values() for f in shelf)


def test_zeros_by_hand() -> None:
    found = figures(z5=1.0, z8=2.0, z9=4.0)
    assert speed.zeros("cnn", AVX2, 0.8, found).value == pytest.approx(2.0)
    assert speed.zeros("cnn", AVX2, 0.85, found).value == pytest.approx(math.sqrt(8))
    assert speed.zeros("cnn", AVX2, 0.99, found).value == pytest.approx(4.0)  # nothing is promised beyond
    assert speed.sparsity_for("cnn", AVX2, 2.0, found) == 0.8
    assert speed.sparsity_for("cnn", AVX2, 4.1, found) is None
    assert speed.pays_from("cnn", AVX2, found) == 0.55
    assert speed.zeros("cnn", Hardware.parse("edge"), 0.8, found).value is None


def test_units_by_hand() -> None:
    found = speed.units("cnn", 0.25, figures())
    assert (found.value, found.low, found.high) == (pytest.approx(2**1.5), pytest.approx(2.0), pytest.approx(4.0))
    assert speed.flops_for("cnn", 2**1.5, figures()) == pytest.approx(0.25)


@given(st.sampled_from(sorted(speed.SPEAKS)), st.floats(0, 1), st.floats(1.01, 20))
def test_more_zeros_never_promise_less_and_the_source_is_said(kind: str, zeros: float, factor: float) -> None:
    found = speed.zeros(kind, AVX2, zeros)
    assert found.value is not None
    assert found.value > 0
    assert "AVX2" in found.source
    needed = speed.sparsity_for(kind, AVX2, factor)
    if needed is not None:
        assert (speed.zeros(kind, AVX2, needed).value or 0) >= factor
        assert (speed.zeros(kind, AVX2, needed - 0.01).value or 0) < factor
    assert speed.units(kind, speed.flops_for(kind, factor)).value == pytest.approx(factor)


def test_what_was_measured_elsewhere_says_so() -> None:
    assert "nothing is measured with NEON" in speed.zeros("cnn", Hardware.parse("cpu arm"), 0.7).source
