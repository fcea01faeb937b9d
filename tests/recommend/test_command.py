"""The command line of the recommender, as a user types it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from secateur import Recipe
from secateur.compare import write_rows
from secateur.recommend import evidence
from tests.conftest import Run
from tests.recommend.rows import row

HERE = ("--hardware", "cpu", "--want", "latency 2x", "--data", "labels", "--retrain", "2h", "--max-drop", "1%")


def test_a_timm_model(run: Run) -> None:
    status, printed, error = run("recommend", "--model", "timm:resnet50", *HERE)
    if importlib.util.find_spec("timm") is None:
        assert (status, printed) == (2, "")
        assert "pip install 'secateur[vision]'" in error
        assert "--kind cnn --parameters 25M" in error
    else:
        assert status == 0
    status, printed, _ = run("recommend", "--model", "timm:resnet50", "--kind", "cnn", "--parameters", "25M", *HERE)
    assert status == 0
    assert "2 times as fast" in printed
    assert "dropped: " in printed


def test_the_demo_on_a_gpu_without_data(run: Run) -> None:
    status, printed, _ = run(
        "recommend", "--model", "demo", "--hardware", "nvidia ampere", "--data", "none", "--retrain", "no"
    )
    assert status == 0
    assert "--granularity 2:4" in printed
    assert "quantize it, which needs none" in printed
    assert "nothing is known for this" in printed or "measured evidence" in printed


def test_a_file_and_what_is_written(run: Run, tmp_path: Path) -> None:
    (tmp_path / "small_net.py").write_text("from torch import nn\ndef net():\n    return nn.Conv2d(3, 64, 3)\n")
    recipe, study = tmp_path / "recipe.yaml", tmp_path / "study.yaml"
    words = (
        "recommend", "--model", f"{tmp_path / 'small_net.py'}:net", "--hardware", "cpu", "--want", "size 50%", "--data",
        "unlabeled", "--retrain", "no", "--write", recipe, "--write-study", study,
    )  # fmt: skip
    status, printed, _ = run(*words)
    assert status == 0
    assert "do not prune: quantize" in printed
    assert Recipe.load(recipe).method in printed
    assert "methods:" in study.read_text()
    status, _, error = run(*words)
    assert status == 2
    assert "exists" in error
    assert run(*words, "--force")[0] == 0


def test_all_and_json_account_for_every_method(run: Run) -> None:
    words = ("recommend", "--kind", "cnn", "--parameters", "1M", "--data", "unlabeled")
    _, printed, _ = run(*words, "--all")
    status, text, _ = run(*words, "--json")
    found = json.loads(text)
    assert status == 0
    names = [m["method"] for m in found["methods"]]
    assert len(names) == len(set(names)) >= 101
    assert all(name in printed for name in names)
    assert {m["status"] for m in found["methods"]} <= {"ranked", "kept", "dropped"}
    assert all(m["reasons"] for m in found["methods"])


def test_studies_ship() -> None:
    runs = evidence.shipped()
    assert {r.study for r in runs} == {"bytes", "fashion", "smollm2", "tasks"} and not any(r.own for r in runs)
    assert {r.subject.kind for r in runs} >= {"cnn", "vit", "encoder", "decoder"}


def test_the_users_own_study_ranks(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence, "shipped", list)
    rows = [row("digits", "dense", "", s, 0.9, kind="task") for s in (0, 1)]
    for label, score in (("gmp", 0.6), ("rigl", 0.85), ("set", 0.7)):
        rows += [row("digits", label, "0.9", s, score, kind="task") for s in (0, 1)]
    write_rows(tmp_path / "rows.jsonl", rows)
    words = ("recommend", "--model", "digits", "--weights", "init", "--data", "training", "--retrain", "any")
    status, printed, _ = run(*words, "--want", "sparsity 0.9", "--studies", tmp_path, "--top", "1")
    assert status == 0
    assert "1. rigl  [ranked]" in printed
    assert "5.6 % of the score" in printed
    assert tmp_path.name in printed


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "--model"), (("--kind", "cnn", "--parameters", "lots"), "25M"),
        (("--kind", "rnn", "--parameters", "1M"), "cnn"),
        (("--kind", "cnn", "--parameters", "1M", "--want", "joy"), "2x"),
        (("--kind", "cnn", "--parameters", "1M", "--hardware", "abacus"), "nvidia ampere"),
        (("--kind", "cnn", "--parameters", "1M", "--data", "all"), "unlabeled"),
        (("--kind", "cnn", "--parameters", "1M", "--studies", "nowhere"), "no study at nowhere"),
        (("--kind", "cnn", "--parameters", "1M", "--max-drop", "much"), "1%"),
    ],
)  # fmt: skip
def test_mistakes_are_one_sentence(words: tuple[str, ...], said: str, run: Run) -> None:
    status, printed, error = run("recommend", *words)
    assert (status, printed) == (2, "")
    assert said in error
    assert error.count("\n") == 1
