"""A supernet in a study: equal budgets, what it cost, how it is run again, and where it has no place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from secateur.compare.execute import execute, processes_of
from secateur.compare.of_tasks import run_task
from secateur.compare.page_again import commands, recipes
from secateur.compare.plan import Run, left_out, runs_of
from secateur.compare.study import Study
from secateur.errors import SecateurError
from secateur.tasks.checkpoint import Checkpoint
from secateur.when.own import training_runs

TINY = str(Path(__file__).parents[1] / "compare" / "tiny.py")
FAST = {"budget": 3, "calibration": 2, "multiple": 2, "random": 1, "span": 0.5}


def study(**more: Any) -> Study:
    method = {"method": "supernet", "knobs": FAST}
    return Study.of({
        "tasks": [f"{TINY}:clouds"], "methods": [method, "l1-norm"], "targets": ["flops 50%"], "seeds": 1, **more,
    })  # fmt: skip


def chosen(asked: Study, label: str = "supernet") -> Run:
    return next(r for r in runs_of(asked) if r.label == label)


def test_a_contender_is_measured_like_any_other(tmp_path: Path) -> None:
    asked = study(budget={"total_epochs": 3.5})
    run = chosen(asked)
    assert run.spec["recipe"] == {"method": "supernet", "when": "during", "seed": 0, "knobs": FAST}
    result, record = run_task(run.spec, tmp_path, run.digest)
    cost, epochs = result["cost"], result["protocol"]["epochs"]
    assert epochs == 2.0 and cost["epochs"] == pytest.approx(3.5, abs=0.26)  # 2 + 0.5 * 2 + 0.25 * 2
    assert cost["after_dense"] == pytest.approx(1.5, abs=0.26) and result["protocol"]["when"] == "during"
    # 64 samples an epoch, three networks a step of the supernet; each that is tried sees 64, and two batches of 16
    tried = record["tried"]
    assert tried == len(record["supernet"]["trials"]) >= 1
    assert cost["samples"] == round((cost["epochs"] + 2 * 1.0) * 64 + tried * (64 + 2 * 16))
    assert cost["labels"] == round(cost["epochs"] * 64 + tried * 64)
    small, whole = result["flops"], run_task(chosen(asked, "dense").spec, tmp_path, "whole")[0]
    assert small <= 0.5 * whole["flops"] and result["flops"] == result["effective_flops"]
    assert result["parameters"] < whole["parameters"] and result["data"] == whole["data"]
    assert 0 <= result["test"] <= 1 and result["test_count"] == 64 and set(result["groups"]) == {"class 0", "class 1"}
    assert not list(tmp_path.glob(f"{run.digest}*"))
    for dense in (Checkpoint(f) for f in tmp_path.glob("dense/*/dense-*.safetensors")):
        dense.write({**dense.read(), "seconds": 100.0})  # it is read the second time, and its seconds count
    again = run_task(run.spec, tmp_path, run.digest)[0]
    assert again["cost"]["seconds"] > 100 > cost["seconds"] and again["test"] == result["test"]


def test_it_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = chosen(study(budget={"epochs": 1}))
    straight = execute(run.digest, run.spec, tmp_path / "a")
    assert straight.status == "done", straight.reason

    def stopped(*_: Any) -> None:
        raise InterruptedError

    with monkeypatch.context() as patch:
        patch.setattr("secateur.supernet.shrinking.extracted", stopped)
        with pytest.raises(InterruptedError):
            run_task(run.spec, tmp_path / "b", run.digest)
    kept = {f.name for f in (tmp_path / "b" / f"{run.digest}.run").iterdir()}
    assert {"goal.json", "search.jsonl", "supernet.safetensors"} <= kept
    legs: list[str] = []
    monkeypatch.setattr("secateur.tasks.loop._Run.go", lambda self, saved: legs.append(self.leg.tags["leg"]))
    with pytest.raises(AttributeError):  # nothing but fine-tuning is left to be trained
        run_task(run.spec, tmp_path / "b", run.digest)
    assert legs == ["fine-tuning"]
    monkeypatch.undo()
    again = execute(run.digest, run.spec, tmp_path / "b")
    assert {k: again.result[k] for k in ("test", "flops", "layers")} == {
        k: straight.result[k] for k in ("test", "flops", "layers")
    }
    assert again.result["cost"]["samples"] == straight.result["cost"]["samples"]


def test_how_it_is_run_again(tmp_path: Path) -> None:
    asked = study(budget={"epochs": 1})
    row = chosen(asked).row("done", None, {"protocol": {"epochs": 1.0}})
    (words,) = commands(asked.to_dict(), [row])
    assert "--method supernet --set supernet.budget=3" in words and "--target 'flops 50%' --epochs 1" in words
    assert recipes([row]) == []
    assert Study.load(asked.dump()) == asked


def test_all_of_its_training_is_counted() -> None:
    assert training_runs("supernet", {}) == 2.25 and training_runs("supernet", {"length": 0.0}) == 2.0
    assert training_runs("supernet", {"knobs": {"span": 3.0}, "length": 1.0}) == 5.0


def test_processes_make_it_together() -> None:
    assert processes_of(chosen(study(budget={"processes": 3})).spec) == 3


@pytest.mark.parametrize(
    ("method", "match"),
    [
        ({"method": "supernet", "knobs": {"wdith": 1}}, "no knob 'wdith'"),
        ({"method": "supernet", "sparsity": 0.5}, "the study's to say"),
        ({"method": "supernet", "tune": {"supernet.budget": [1, 2]}}, "leave out tune"),
        ({"method": "supernet", "allocation": "owl"}, "has no allocation"),
    ],
)
def test_bad_contenders(method: dict[str, Any], match: str) -> None:
    with pytest.raises(SecateurError, match=match):
        study(methods=[method])


def test_where_it_has_no_place() -> None:
    asked = study(models=["demo"], targets=["flops 50%", "latency 30%", "memory 50%", "0.5"])
    reasons = {(x.subject, x.target): x.reason for x in left_out(asked) if x.label == "supernet"}
    assert reasons["demo", "flops 50%"] == "it trains on a task, and this is a model"
    name = asked.subjects[0].name if asked.subjects[0].kind == "task" else asked.subjects[1].name
    assert reasons[name, "memory 50%"] == "it takes a target in flops or params or bytes or latency, not in memory"
    assert reasons[name, "0.5"].endswith("and 0.5 is for weights") and (name, "latency 30%") not in reasons
