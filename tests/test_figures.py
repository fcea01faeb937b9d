"""All figures of a model beside its baseline: where they come from, and what is printed of them."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

import secateur
from secateur import figures as of_figures
from secateur import peak as of_peak
from secateur.errors import ModelError
from secateur.figures import count_kept
from secateur.measure import energy as of_energy
from secateur.measure.flops import effective_flops, flops
from secateur.peak import measure_here, peak
from secateur.printing import measured
from secateur.sources import Source, sources, workloads
from tests.conftest import Run

NET = """
import os
import torch
from torch import nn

print("a file may print")

def large():
    net = nn.Sequential(nn.Linear(2048, 4096, bias=False), nn.ReLU(), nn.Linear(4096, 2048, bias=False))
    return net.eval()

def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 24, 3), nn.ReLU(), nn.Conv2d(24, 32, 3), nn.Flatten(), nn.Linear(32 * 36, 10))

def half():
    net = small()
    net[0].weight.data[::2] = 0
    return net

def killed():
    os.kill(os.getpid(), 9)

def broken():
    raise RuntimeError("no such weights")
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    found = tmp_path / "given.py"
    found.write_text(NET)
    return found


def test_peak_memory_is_of_this_model_alone(file: Path) -> None:
    weights = 2 * 2048 * 4096 * 4
    ballast = torch.ones(6 * weights // 4)  # a process that forks starts with its parent's peak in ru_maxrss
    found = peak(Source(f"{file}:large"), "4x2048", (128, 1))
    assert found.reason == "" and found.gpu is None and ballast.numel()
    assert found.host is not None and weights <= found.host < 2 * weights


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("killed", "it was ended by signal 9"),
        ("broken", "RuntimeError: no such weights"),
        ("none", "no callable 'none'"),
    ],
)
def test_a_process_that_fails_is_a_reason(file: Path, name: str, reason: str) -> None:
    found = peak(Source(f"{file}:{name}"), "4x2048", (128, 1))
    assert (found.host, found.gpu) == (None, None)
    assert found.reason.startswith("the process that measures memory failed: ") and reason in found.reason
    assert "\n" not in found.reason


def test_a_process_that_does_not_start_or_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def late(*_: Any, **given: Any) -> None:
        raise subprocess.TimeoutExpired("python", given["timeout"])

    monkeypatch.setattr(of_peak.subprocess, "run", late)
    assert "timed out after 3" in peak(Source("x"), None, (1,), timeout=3).reason
    monkeypatch.undo()
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    assert "did not end well" in peak(Source("x"), None, (1,)).reason


def test_on_a_gpu_torch_counts(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Source(f"{file}:small", device="cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelError, match="torch sees no GPU"):
        source.load()
    moved: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: moved.append("waited"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 12345)
    monkeypatch.setattr(nn.Module, "to", lambda self, device: (moved.append(device), self)[1])
    asked = {"source": asdict(source), "example": "1x3x10x10", "tokens": [1], "threads": torch.get_num_threads()}
    assert measure_here(asked).gpu == 12345
    assert moved == ["cuda", "waited"]


def test_what_belongs_together(tmp_path: Path, file: Path) -> None:
    def directory(name: str, record: str, **facts: Any) -> str:
        (tmp_path / name).mkdir()
        (tmp_path / name / record).write_text(json.dumps(facts))
        return str(tmp_path / name)

    def of(*given: Any, **named: Any) -> list[tuple[str, str, str]]:
        return [(s.name, s.kind, s.factory) for s in sources(*given, **named)]

    dense = directory("dense", "config.json")
    masked = directory("masked", "run.json", model={"source": dense})
    fast = directory("fast", "compressed.json", format="transformers", source=masked)
    packed = directory("packed", "compressed.json", format="module", source="timm:resnet18")
    shape = [{"shape": [1, 3, 8, 8]}]
    small = directory("small", "surgery.json", format="secateur", source=f"{file}:small", example=shape)
    net = f"{file}:small"
    plain = (dense, "plain", "")
    assert of(dense) == [plain] and of(dense, net) == [plain, (net, "plain", "")]
    assert of(masked) == [(masked, "plain", ""), plain] and of(masked, alone=True) == [(masked, "plain", "")]
    assert of(fast) == [(fast, "compressed", ""), (masked, "plain", "")]
    assert of(fast, dense) == [(fast, "compressed", ""), plain]
    assert of(packed) == [(packed, "compressed", "timm:resnet18"), ("timm:resnet18", "plain", "")]
    assert of(small, net) == [(small, "structured", net), (net, "plain", "")]
    assert of(small, net, alone=True) == [(small, "structured", net)]
    assert of(packed, fast) == [(packed, "compressed", "timm:resnet18"), (fast, "compressed", "")]
    with pytest.raises(ModelError, match=r"was made of .*given\.py:small: name it with --against"):
        sources(small)  # a file that only a record names does not run
    other = directory("other", "compressed.json", format="module", source="timm:resnet34")
    assert of(packed, other)[1] == (other, "compressed", "timm:resnet34")
    assert of(packed, small)[1] == (small, "structured", "timm:resnet18")  # the only one that may be made
    with pytest.raises(ModelError, match="a module in memory"):
        sources(directory("memory", "compressed.json", format="module", source=""))
    assert [s.dtype for s in sources(fast)] == ["", "float32"] and [s.dtype for s in sources(masked)] == ["", ""]
    assert sources(small, net)[0].example == "1x3x8x8"


def test_what_was_compressed_for_gpus_is_measured_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = {"format": "transformers", "source": "dense", "dtype": "bfloat16", "layers": {"a": {"form": "bits"}}}
    (tmp_path / "compressed.json").write_text(json.dumps(record))
    found = sources(str(tmp_path), device="cuda")
    assert [(s.dtype, s.device) for s in found] == [("", "cuda"), ("bfloat16", "cuda")]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ModelError, match="--device cuda"):
        sources(str(tmp_path))
    (tmp_path / "compressed.json").write_text(json.dumps({**record, "dtype": "__import__"}))
    assert sources(str(tmp_path), device="cuda")[1].dtype == "float32"


def test_workloads_of_language_models(model: Path) -> None:
    net = Source(str(model)).load()
    loads = workloads([net, net], None, (9, 1))
    assert [(w.name, dict(w.items)) for w in loads] == [
        ("9 tokens", {"9 tokens": 9}), ("1 tokens", {"1 tokens": 1}),
        ("generation", {"first token": 9, "per token": 1}),
    ]  # fmt: skip
    assert [w.name for w in workloads([net], "2x5", (9, 1))] == ["2x5 tokens"]
    assert [w.name for w in workloads([net], None, (9,), own="1x3")] == ["9 tokens", "generation"]


def test_figures_of_files(no_process: None, run: Run, file: Path) -> None:
    words = [f"{file}:half", "--against", f"{file}:small", "--example", "2x3x10x10"]
    status, printed, err = run("measure", *words, "--json")
    assert status == 0, err
    found = json.loads(printed.splitlines()[-1])  # the file prints
    namespace: dict[str, Any] = {}
    exec(NET, namespace)
    x = torch.randn(2, 3, 10, 10)
    for row, net in ((found, namespace["half"]()), (found["baseline"], namespace["small"]())):
        assert (row["parameters"], row["nonzero"]) == count_kept(net)
        assert row["flops"] == flops(net, x).total and row["effective_flops"] == effective_flops(net, x).total
        assert row["memory"] == 4 * row["parameters"] and row["bytes"] is None and row["perplexity"] is None
        assert row["peak_memory"] == 7 * 2**20 and row["peak_memory_gpu"] is None and row["flops_unknown"] == {}
        assert row["missing"]["perplexity"] == "only language models have a perplexity"
        (time,) = row["latency"].values()
        assert time["low"] <= time["median"] <= time["high"] and time["rate"] == 2 / time["median"]
    assert found["flops"] == found["baseline"]["flops"] and found["effective_flops"] < found["flops"]
    assert found["latency"]["2x3x10x10"]["ratio"]["coverage"] > 0.95
    assert found["baseline"]["latency"]["2x3x10x10"]["ratio"] is None
    setup = found["setup"]
    assert (setup["turns"], setup["warmup"], setup["threads"]) == (15, 2, torch.get_num_threads())
    assert (setup["generation"], setup["flops_of"], setup["device"]) == (None, "2x3x10x10", "cpu")


def test_energy_where_there_is_a_counter(
    no_process: None, run: Run, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(of_figures, "rapl", lambda: ([lambda: 6.0], ""))
    monkeypatch.setattr(of_energy, "SPAN", 0.0)
    words = ["measure", f"{file}:small", "--example", "2x3x10x10"]
    found = json.loads(run(*words, "--json")[1].splitlines()[-1])
    assert found["energy"]["2x3x10x10"]["median"] == 6.0 and "energy" not in found["missing"]
    assert "6.00 J (6.00 to 6.00)" in run(*words)[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--example", "2x3x4x4x4"], "does not run on the workload '2x3x4x4x4'"),
        (["--example", "2y3"], "write a shape, e.g. 1x3x224x224"),
        ([], "give a shape, e.g. --example 1x3x224x224"),
        (["--device", "tpu"], "--device tpu is not known: write cpu or cuda"),
        (["--tokens", "0"], "write positive numbers separated by commas"),
        (["--against", "/nowhere", "--example", "2x3x10x10"], "there is no model at /nowhere"),
    ],
)
def test_bad_input_is_one_sentence(no_process: None, run: Run, file: Path, words: list[str], message: str) -> None:
    status, _, err = run("measure", f"{file}:small", *words)
    assert status not in (0, 1) and message in " ".join(err.split()) and "Traceback" not in err


def test_the_table_fits_in_eighty_columns() -> None:
    times = {"median": 0.01234, "low": 0.0099, "high": 0.0151, "coverage": 0.9648, "rate": 10373.6, "ratio": None}
    ratio = {"median": 1.62, "low": 1.5, "high": 1.79, "coverage": 0.9648}
    baseline: dict[str, Any] = {
        "model": "a/long/way/to/the/directory/of/the/dense/model", "perplexity": None, "parameters": 134_515_008,
        "nonzero": 134_515_008, "memory": 538_000_000, "bytes": None, "flops": 34_000_000_000,
        "effective_flops": 34_000_000_000, "peak_memory": None, "peak_memory_gpu": None, "energy": None,
        "latency": {"128 tokens": times}, "missing": {"peak_memory": "it was ended by signal 9"},
    }  # fmt: skip
    found = {
        **baseline, "model": "fast", "effective_flops": 17_000_000_000, "baseline": baseline, "peak_memory": 2**30,
        "latency": {"128 tokens": {**times, "ratio": ratio}}, "missing": {},
        "setup": {"turns": 15, "warmup": 2, "threads": 2, "device": "cpu", "flops_of": "128 tokens",
                  "generation": None},
    }  # fmt: skip
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(measured(found))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 80
    flat = " ".join(" ".join(lines).split())
    for words in (
        "12.34 ms (9.90 to 15.10)", "10,373.6 tokens/s", "1.62 (1.50 to 1.79)", "34.00 GFLOP", "17.00 GFLOP",
        "medians of 15 turns after 2 to warm up, 2 threads, cpu; 96% intervals", "1.00 GiB –",
        "no peak memory: it was ended by signal 9",
    ):  # fmt: skip
        assert words in flat, words
    assert not re.search(r"GPU|energy|perplexity", flat)


def test_packed_parameters_are_those_that_are_left() -> None:
    from secateur.compression.candidates import Site

    net = nn.Sequential(nn.Linear(70, 40), nn.Linear(40, 3))
    secateur.prune(net, "magnitude", sparsity=0.8)
    site = Site("0", net[0])
    packed = nn.Sequential(site.sparse(site.pack("float32").indexed(col=True, bits=False), net[0].bias), net[1])
    stored, nonzero = count_kept(packed)
    assert nonzero == count_kept(net)[1] and stored == nonzero + int((net[1].weight == 0).sum())
