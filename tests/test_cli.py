"""The command line as a user types it: what it prints, and how it fails."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import Run


def prune(run: Run, model: Path, text: Path, out: Path, *more: str | Path) -> tuple[int, str, str]:
    return run("prune", model, "--data", f"text:{text}", "--windows", "8", "--length", "32", "--out", out, *more)


def test_prune_then_measure(no_process: None, run: Run, model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    status, printed, _ = prune(
        run, model, text, out, "--method", "wanda", "--sparsity", "0.5", "--eval", f"text:{text}"
    )
    assert status == 0
    assert "0.500000 of these layers" in printed
    assert "perplexity" in printed
    AutoModelForCausalLM.from_pretrained(out)
    assert AutoTokenizer.from_pretrained(out)("w1 w2").input_ids == [1, 2]
    record = json.loads((out / "run.json").read_text())
    assert record["command"].startswith("secateur prune")
    assert record["data"]["windows"] == 8
    assert len(record["data"]["sha256"]) == 64
    assert all(0 <= layer["error"] < 1 for layer in record["layers"])
    assert "<html" in (out / "report.html").read_text()
    assert (out / "recipe.yaml").exists()
    status, printed, _ = run("measure", out, "--data", f"text:{text}", "--length", "32", "--json")
    found = json.loads(printed)
    assert status == 0
    assert found["perplexity"]["value"] == pytest.approx(record["after"]["perplexity"]["value"], rel=1e-5)
    assert found["perplexity"]["tokens"] == 18 * 31
    assert found["nonzero"] < found["parameters"]
    assert found["baseline"]["perplexity"]["value"] == pytest.approx(record["before"]["perplexity"]["value"], rel=1e-5)
    status, printed, _ = run("measure", out, "--data", f"text:{text}", "--length", "32")
    assert "stride 32" in printed
    status, printed, _ = run("measure", out, "--data", f"text:{text}", "--length", "32", "--alone", "--json")
    assert json.loads(printed)["baseline"] is None


def test_the_recipe_that_was_written_repeats_the_run(run: Run, model: Path, text: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert prune(run, model, text, one, "-m", "sparsegpt", "--granularity", "2:4", "--allocation", "owl")[0] == 0
    assert prune(run, model, text, two, "--recipe", one / "recipe.yaml")[0] == 0
    a, b = (json.loads((p / "run.json").read_text()) for p in (one, two))
    assert a["digest"] == b["digest"]
    assert [x["kept"] for x in a["layers"]] == [x["kept"] for x in b["layers"]]
    assert {x["sparsity"] for x in a["layers"]} == {0.5}
    assert any("allocation 'owl' changed nothing" in note for note in a["notes"])


def test_json_is_all_there_is_on_standard_output(run: Run, model: Path, text: Path, tmp_path: Path) -> None:
    status, printed, err = prune(run, model, text, tmp_path / "out", "--json")
    assert status == 0
    assert json.loads(printed)["sparsity"]["pruned_layers"] == 0.5
    assert err == ""


def test_plan_touches_nothing(run: Run, model: Path) -> None:
    before = sorted(p.name for p in model.iterdir())
    status, printed, _ = run("plan", model, "--method", "wanda", "--sparsity", "0.5")
    assert status == 0
    for words in ("21 layers in 3 blocks", "input_norm", "an embedding; name it with --only", "lm_head"):
        assert words in printed
    assert sorted(p.name for p in model.iterdir()) == before
    status, printed, _ = run("plan", model, "--method", "wanda", "--granularity", "2:4", "--json")
    made = json.loads(printed)
    assert made["weights_kept"] * 2 == made["weights"]


def test_knobs(run: Run, model: Path, text: Path, tmp_path: Path) -> None:
    status, printed, _ = prune(
        run,
        model,
        text,
        tmp_path / "out",
        "-m",
        "sparsegpt",
        "--set",
        "solver.damp=0.1",
        "--set",
        "solver.block=16",
        "--json",
    )
    assert status == 0
    assert json.loads(printed)["recipe"]["knobs"]["solver"] == {"damp": 0.1, "block": 16}


def test_lists_and_explains(run: Run) -> None:
    status, printed, _ = run("methods", "--needs", "nothing")
    assert status == 0
    assert "magnitude" in printed
    assert "wanda" not in printed
    status, printed, _ = run("methods", "--needs", "inputs", "--json")
    assert {"wanda", "sparsegpt", "owl-wanda", "dsnot"} <= {row["name"] for row in json.loads(printed)}
    assert run("methods", "--family", "nothing-like-it")[0] == 1
    status, printed, _ = run("explain", "sparsegpt")
    assert status == 0
    assert "2301.00774" in printed
    assert "damp" in printed
    assert "2310.05175" in run("cite", "owl-sparsegpt")[1]
    assert json.loads(run("info")[1])["versions"]["torch"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "wandda"], "no method named 'wandda'; did you mean 'wanda'? (secateur methods)"),
        (["--sparsity", "1.0"], "sparsity must be a fraction in [0, 1), not 1"),
        (["--sparsity", "-0.1"], "sparsity must be a fraction in [0, 1)"),
        (["--sparsity", "50"], "0.5 removes half"),
        (["--granularity", "3:4", "--sparsity", "0.5"], "fixes the sparsity at 0.25"),
        (["--granularity", "2:5"], "multiple of 5"),
        (["--granularity", "bock(2,2)"], "did you mean"),
        (["--allocation", "olw"], "did you mean 'owl'"),
        (["--method", "sparsegpt", "--allocation", "global"], "name a criterion with --criterion"),
        (["--set", "damp=1"], "write --set solver.damp=0.02"),
        (["--set", "allocation.lam=1"], "has no knob 'lam'"),
        (["--only", "*.nothing"], "no layer is named '*.nothing'"),
        (["--recipe", "/nowhere.yaml"], "there is no recipe file"),
        (["--windows", "1000"], "18 windows of 32, and 1000 were asked for"),
        (["--length", "4096"], "less than one window of 4096"),
        (["--data", "text:/nowhere.txt"], "there is no file /nowhere.txt"),
        (["--data", "csv:file"], "data 'csv:file' is not understood"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(
    run: Run, model: Path, text: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    out = tmp_path / "out"
    status, printed, err = prune(run, model, text, out, *words)
    assert status not in (0, 1)
    assert message in " ".join(err.split()), err
    assert "Traceback" not in err
    assert printed == ""
    assert not out.exists()


@pytest.mark.parametrize(
    "words",
    [
        ["--method", "snip"],
        ["--method", "magnitude", "--criterion", "fisher", "--allocation", "global"],
    ],
)
def test_gradients_of_the_next_token_loss(run: Run, model: Path, text: Path, tmp_path: Path, words: list[str]) -> None:
    status, _, err = prune(run, model, text, tmp_path / "out", *words)
    assert status == 0, err
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["sparsity"]["pruned_layers"] == pytest.approx(0.5, abs=1e-3)
    assert record["data"]["sha256"]


def test_empty_text(run: Run, model: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("  \n")
    status, _, err = prune(run, model, tmp_path / "empty.txt", tmp_path / "out")
    assert status == 2
    assert "is empty" in err


def test_existing_output_is_kept(run: Run, model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("mine")
    status, _, err = prune(run, model, text, out)
    assert status == 2
    assert "--force" in err
    assert (out / "mine").read_text() == "mine"
    assert prune(run, model, text, out, "--force")[0] == 0
    assert not (out / "mine").exists()


def test_interrupt_says_how_to_go_on(
    run: Run, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from secateur.stream import Engine

    original, calls = Engine.prune_block, []

    def interrupt(self: Engine, index: int, *rest: Any, **named: Any) -> Any:
        calls.append(index)
        if index == 1:
            raise KeyboardInterrupt
        return original(self, index, *rest, **named)

    monkeypatch.setattr(Engine, "prune_block", interrupt)
    out = tmp_path / "out"
    status, printed, err = prune(run, model, text, out, "--method", "wanda")
    assert status == 130
    assert "goes on at the block it was in" in err
    assert printed == ""
    assert not out.exists()
    monkeypatch.setattr(Engine, "prune_block", original)
    monkeypatch.setattr(Engine, "prune_block", lambda self, k, *a, **n: calls.append(k) or original(self, k, *a, **n))
    assert prune(run, model, text, out, "--method", "wanda")[0] == 0
    assert calls == [0, 1, 1, 2]


def test_it_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "secateur", "--help"], capture_output=True, text=True, check=True)
    assert "prune" in done.stdout
