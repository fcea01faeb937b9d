"""The commands compare, contrast and report."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from secateur.cli import app
from secateur.errors import SecateurError
from secateur.methods import load

load()
TINY = Path(__file__).parent / "compare" / "tiny.py"
runner = CliRunner()


def test_a_study_of_the_command_line(tmp_path: Path) -> None:
    out = tmp_path / "study"
    words = [
        "compare", f"{TINY}:clouds", "--methods", "magnitude,random[allocation=erk]", "--sparsity", "0.5,0.75",
        "--seeds", "2", "--epochs", "1", "--out", str(out), "--workers", "1", "--threads", "1", "--json",
    ]  # fmt: skip
    done = runner.invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    printed = json.loads(done.stdout)
    assert printed["missing"] == 0 and {r["label"] for r in printed["rows"]} == {
        "dense", "magnitude", "random[allocation=erk]",
    }  # fmt: skip
    assert Path(printed["report"]).read_text(encoding="utf-8").startswith("<!doctype html>")
    again = runner.invoke(app, ["compare", str(out / "study.yaml"), "--out", str(out)], catch_exceptions=False)
    assert again.exit_code == 0 and "accuracy on the test data" in again.stdout and "0.75: " in again.stdout
    made = runner.invoke(app, ["report", str(out), "--out", str(tmp_path / "r.html")], catch_exceptions=False)
    assert made.exit_code == 0 and (tmp_path / "r.html").is_file()


def test_a_contrast_answers_its_question(tmp_path: Path) -> None:
    words = [
        "contrast", "layerwise-vs-global", "--task", f"{TINY}:clouds", "--epochs", "1", "--sparsity", "0.9", "--seeds",
        "2", "--out", str(tmp_path / "c"), "--workers", "1", "--threads", "1",
    ]  # fmt: skip
    done = runner.invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "Should every layer lose the same share" in done.stdout
    assert "layer-wise" in done.stdout and "global" in done.stdout and "published statement" in done.stdout
    assert "One ranking is better" in (tmp_path / "c" / "report.html").read_text(encoding="utf-8")


def test_contrasts_are_listed() -> None:
    listed = json.loads(runner.invoke(app, ["contrast", "--json"], catch_exceptions=False).stdout)
    assert len(listed) == 10 and all(x["question"] and x["source"] for x in listed)


@pytest.mark.parametrize(
    "words, message",
    [
        (["compare", "digits"], "say what is compared"),
        (["compare", "digits", "-m", "magnitude", "--sparsity", "0.5"], "--out DIR"),
        (["compare", "digits", "-m", "magnitude[allocation=owl", "--sparsity", "0.5", "--out", "x"], "not understood"),
        (["compare", "digits", "-m", "magnitude", "--sparsity", "0.5", "--out", "x", "--set", "a.b=2"], "no size"),
        (["compare", "nowhere.yaml"], "there is no study file"),
        (["contrast", "one-shot-vs-iterativ"], "did you mean 'one-shot-vs-iterative'"),
        (["contrast", "one-shot-vs-iterative", "--out", "x"], "say what contrast"),
        (["contrast", "static-vs-dynamic", "--model", "demo", "--out", "x"], "it is about tasks"),
        (["contrast", "original-vs-transferred", "--task", "digits", "--out", "x"], "--from digits"),
        (["report", "nowhere"], "not the directory of a study"),
    ],
)  # fmt: skip
def test_mistakes(words: list[str], message: str) -> None:
    with pytest.raises(SecateurError, match=message):
        runner.invoke(app, words, catch_exceptions=False, standalone_mode=False)


def test_what_a_study_file_says_is_not_said_again(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text("task: digits\nmethods: [magnitude]\ntargets: [0.5]\n", encoding="utf-8")
    with pytest.raises(SecateurError, match="--seeds is the study's to say: write it into"):
        runner.invoke(app, ["compare", str(file), "--seeds", "5", "--workers", "1"], catch_exceptions=False)
    assert not (tmp_path / "study").exists()


def test_a_missing_package_is_said_before_the_first_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    words = ["compare", f"{TINY}:clouds", "-m", "magnitude", "--sparsity", "0.5", "--out", str(tmp_path / "s")]
    with pytest.raises(SecateurError, match=r"pip install 'secateur\[compare\]'"):
        runner.invoke(app, words, catch_exceptions=False, standalone_mode=False)
    assert not (tmp_path / "s").exists()
