"""Structured pruning from the command line: plan, prune, measure, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.conftest import Run
from transformers import AutoModelForCausalLM

import secateur

NET = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 24, 3), nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 32, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )

def images():
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        yield torch.randn(8, 3, 10, 10, generator=generator), torch.randint(0, 10, (8,), generator=generator)

nothing = []
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    found = tmp_path / "given.py"
    found.write_text(NET)
    return found


@pytest.mark.parametrize("method", ["l1-norm", "taylor", "flap"])
def test_a_network_of_a_file(no_process: None, run: Run, file: Path, tmp_path: Path, method: str) -> None:
    out, shape = tmp_path / "small", ["--example", "1x3x10x10"]
    words = [f"{file}:net", "--method", method, "--target", "flops 50%", *shape]
    status, printed, err = run("plan", *words)
    assert status == 0, err
    assert "masked == smaller: proven" in printed
    status, printed, err = run("prune", *words, "--data", f"{file}:images", "--out", out)
    assert status == 0, err
    assert "times as fast here" in printed and "error of the output on held-out data" in printed
    record = json.loads((out / "run.json").read_text())
    assert record["proof"]["proven"] and record["after"]["flops"] <= record["before"]["flops"] / 2
    status, printed, err = run("measure", out, "--against", f"{file}:net", "--json")
    assert status == 0, err
    assert json.loads(printed)["flops"] == record["after"]["flops"]
    assert run("measure", out)[0] != 0  # the file is run only when it is named
    assert run("prune", *words, "--data", f"{file}:images", "--out", out)[0] != 0  # it exists


def test_a_language_model_by_width(no_process: None, run: Run, model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "small"
    given = ["--data", f"text:{text}", "--windows", "8", "--length", "32"]
    status, printed, err = run("prune", model, "--method", "flap", "--target", "params 15%", *given, "--out", out)
    assert status == 0, err
    assert "layers that read removed units were fitted" in printed
    status, printed, err = run("measure", out, "--data", f"text:{text}", "--length", "32")
    assert status == 0, err
    assert "perplexity" in printed and "parameters" in printed


def test_a_language_model_by_depth_loads_in_stock_transformers(
    run: Run,
    model: Path,
    text: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "short"
    given = ["--data", f"text:{text}", "--windows", "8", "--length", "32"]
    status, _, err = run("prune", model, "--method", "shortgpt", "--target", "params 20%", *given, "--out", out)
    assert status == 0, err
    short = AutoModelForCausalLM.from_pretrained(out)
    dense = AutoModelForCausalLM.from_pretrained(model)
    assert short.config.num_hidden_layers < dense.config.num_hidden_layers
    again = secateur.load(out)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(short(ids).logits, again(ids).logits)  # type: ignore[operator]


def test_rounds(run: Run, file: Path, tmp_path: Path) -> None:
    out = tmp_path / "small"
    words = ["--method", "wanda-sp", "--target", "params 40%", "--steps", "3", "--schedule", "cubic"]
    given = ["--example", "1x3x10x10", "--data", f"{file}:images", "--out", out]
    status, printed, err = run("prune", f"{file}:net", *words, *given)
    assert status == 0, err
    assert "masked == smaller: proven" in printed
    assert json.loads((out / "run.json").read_text())["recipe"]["steps"] == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--target", "speed 50%"], "is not understood"),
        (["--target", "flops 50%", "--data", "FILE:absent"], "nothing named 'absent' that gives batches"),
        (["--target", "flops 50%", "--data", "FILE:nothing", "--method", "apoz"], "gives batches"),
        (["--target", "flops 50%", "--method", "apoz"], "measured on data: pass --data"),
        (["--target", "flops 50%", "--method", "shortgpt"], "measured on data: pass --data"),
        (["--target", "flops 50%", "--solver", "sparsegpt"], "solver 'sparsegpt'"),
        (["--target", "flops 50%", "--recovery", "blockwise"], "recovery 'blockwise'"),
        (["--target", "flops 50%", "--criterion", "loss-without"], "ranks whole blocks"),
    ],
)
def test_refused_in_one_sentence(run: Run, file: Path, tmp_path: Path, words: list[str], message: str) -> None:
    words = [w.replace("FILE", str(file)) for w in words]
    out = tmp_path / "small"
    status, _, err = run("prune", f"{file}:net", "--example", "1x3x10x10", "--out", out, *words)
    assert status != 0 and message in " ".join(err.split()), err
    assert "Traceback" not in err and not out.exists()
