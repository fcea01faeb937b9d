"""The door for methods of run time whose gates are trained: resumed runs, what is written, refusals, the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import secateur
from secateur.compare.contrasts import study_of
from secateur.compare.of_tasks import run_task
from secateur.compare.page_again import commands
from secateur.compare.plan import left_out, runs_of
from secateur.compare.study import Study
from secateur.errors import ModelError, RecipeError, SecateurError
from secateur.measure.flops import flops
from secateur.sources import sources
from secateur.tasks import Task, find
from secateur.when.dynamic import TrainedDynamic

SMALL: dict[str, Any] = {"options": {"images": 200, "width": 4}, "epochs": 0.5, "length": 1.0, "every": 0.0}


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few inputs are measured by themselves, to be quick."""
    monkeypatch.setattr("secateur.runtime.measured.SINGLES", 4)


class Stopped(Exception):
    pass


def run(out: Path | None = None, method: str = "fbs", stop: tuple[str, int] | None = None, **more: Any) -> TrainedDynamic:  # fmt: skip  # noqa: E501
    def progress(leg: str, done: int, of: int) -> None:
        if stop == (leg, done):
            raise Stopped

    target = {} if "knobs" in more else {"target": "flops 50%"}
    made = secateur.train("digits", method, out=out, progress=progress, **{**SMALL, **target, **more})
    assert isinstance(made, TrainedDynamic)
    return made


def same(a: TrainedDynamic, b: TrainedDynamic) -> bool:
    left, right = a.model.state_dict(), b.model.state_dict()
    return left.keys() == right.keys() and all(torch.equal(v, right[k]) for k, v in left.items())


def test_interrupted_anywhere_it_ends_with_the_same_weights(tmp_path: Path) -> None:
    whole = run()
    for stop in (("train", 2), ("gates", 1), ("gates", 2)):
        with pytest.raises(Stopped):
            run(tmp_path / "out", stop=stop)
    assert (tmp_path / "out.run").is_dir() and not (tmp_path / "out").exists()
    again = run(tmp_path / "out")
    assert same(whole, again) and again.metric == whole.metric
    assert not (tmp_path / "out.run").exists()
    task = find("digits", **SMALL["options"])
    x = next(iter(task.batches("test", 0, 0)))[0][:3]
    loaded = secateur.load(tmp_path / "out", task.model(7))
    assert torch.equal(loaded(x), again.model(x))
    assert flops(loaded, x[:1]).total <= 0.5 * flops(loaded.model, x[:1]).total
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["method"] == "fbs" and record["target"] == "flops 50%"
    assert record["measured"]["gated"]["flops"]["mean"] <= 0.5 * record["measured"]["dense"]["flops"]["mean"]
    assert "MFLOPs" in str(again)


def test_a_run_that_was_over_is_gated_as_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after training, before anything was written: the gates are then at their final density."""

    def stopped(*args: Any, **kwargs: Any) -> None:
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr("secateur.when.dynamic.measured", stopped)
        with pytest.raises(Stopped):
            run(tmp_path / "out")
    again = run(tmp_path / "out")
    assert again.gates.record["density"] == again.model.gates[0].keep < 1  # type: ignore[union-attr, index]
    assert same(again, run())


def test_seeds_draw_other_gates() -> None:
    one, two = run(seed=1, length=0.01), run(seed=2, length=0.01)
    assert not torch.equal(one.gates.tensors()["0.predict.weight"], two.gates.tensors()["0.predict.weight"])


def test_length_and_rate_are_knobs_too() -> None:
    made = run(knobs={"fbs": {"density": 0.5, "length": 0.02, "rate": 1.0}}, length=None)
    assert (made.run["length"], made.run["rate"]) == (0.02, 1.0)
    assert [row["leg"] for row in made.run["curves"]].count("gates") == 1


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"target": "flops 99.9%"}, "out of reach"), ({"target": "params 50%"}, "not in params"),
        ({"target": None}, "one of them"), ({"sparsity": 0.5}, "has no sparsity"),
        ({"knobs": {"solver": {"x": 1}}}, "no part"),
        ({"knobs": {"fbs": {"dens": 1}}}, "no knob 'dens'"), ({"when": "after"}, "leave out masks and when"),
    ],
)  # fmt: skip
def test_bad_input_is_said_before_any_training(options: dict[str, Any], match: str) -> None:
    with pytest.raises(RecipeError, match=match):
        run(stop=("train", 1), **options)


def test_one_target() -> None:
    with pytest.raises(RecipeError, match="has one target"):
        run(stop=("train", 1), target="flops 50%", knobs={"fbs": {"target": "flops 30%"}})


def test_a_method_that_is_not_trained_says_so() -> None:
    with pytest.raises(RecipeError, match="works at run time and is not trained"):
        secateur.train(find("digits", images=100), "tome", target="flops 50%")


def test_a_model_with_no_place_for_a_gate_is_refused_before_any_training() -> None:
    digits = find("digits", images=100)
    flat = Task(lambda seed: nn.Sequential(nn.Flatten(), nn.Linear(144, 10)), digits.batches, name="flat")
    with pytest.raises(ModelError, match="no convolution"):
        secateur.train(flat, "fbs", target="flops 50%", epochs=0.1)


def test_batches_of_one() -> None:
    assert run(options={"images": 20, "width": 4, "batch": 1}, epochs=0.5).metric >= 0


def test_the_command(tmp_path: Path) -> None:
    from secateur.cli import app

    out = tmp_path / "out"
    words = [
        "train",
        "digits",
        "--method",
        "fbs",
        "--target",
        "flops 50%",
        "--epochs",
        "0.2",
        "--set",
        "task.images=100",
    ]
    words += ["--set", "fbs.length=1", "--set", "fbs.lasso=0.001", "--out", str(out)]
    made = CliRunner().invoke(app, words, catch_exceptions=False)
    assert made.exit_code == 0 and "fbs on task digits" in made.output and "fbs: " in made.output
    assert json.loads((out / "run.json").read_text())["lasso"] == 0.001
    with pytest.raises(RecipeError, match="has no sparsity"):
        CliRunner().invoke(app, [*words[:-1], str(tmp_path / "b"), "--sparsity", "0.5"], catch_exceptions=False)


def test_measured_with_the_dense_model_in_it_beside(tmp_path: Path) -> None:
    """What ``secateur measure OUT`` asks for; a task of one's own is named."""
    made = run(tmp_path / "out", length=0.02)
    gated, dense = sources(str(tmp_path / "out"))
    assert (gated.kind, dense.kind, gated.example) == ("gated", "ungated", "1x1x12x12")
    x = torch.randn(1, 1, 12, 12)
    assert torch.equal(gated.load()(x), made.model(x)) and torch.equal(dense.load()(x), made.model.model(x))  # type: ignore[union-attr, operator]
    assert flops(gated.load(), x).total <= 0.5 * flops(dense.load(), x).total
    digits = find("digits", **SMALL["options"])
    own = Task(digits.model, digits.batches, name="mine", example=lambda: x)
    secateur.train(own, "fbs", target="flops 50%", epochs=0.1, length=0.1, out=tmp_path / "mine")
    with pytest.raises(ModelError, match="made of mine.*--against"):
        sources(str(tmp_path / "mine"))


def test_a_contender_in_a_study(tmp_path: Path) -> None:
    asked = study_of(
        "static-vs-dynamic", "task", "digits", options={"images": 100, "width": 8}, epochs=0.6, seeds=1,
        targets=["flops 50%"],
    )  # fmt: skip
    made = [r.row("done", None, run_task(r.spec, tmp_path, r.digest)[0]) for r in runs_of(asked)]
    rows = {row.label: row for row in made}
    dense = rows["dense"].figure("flops")
    for label in ("l1-norm (static)", "fbs (dynamic)", "ftwt (dynamic)"):
        assert dense is not None and (rows[label].figure("flops") or dense) < 0.6 * dense
        assert rows[label].figure("cost", "epochs") == rows["taylor (static)"].figure("cost", "epochs")
    assert rows["fbs (dynamic)"].recipe == {"method": "fbs", "when": "runtime", "seed": 0, "rate": 0.3, "knobs": {}}
    words = commands(asked.to_dict(), made)[made.index(rows["fbs (dynamic)"])]
    assert "--method fbs --set fbs.rate=0.3 --target 'flops 50%'" in words


@pytest.mark.parametrize(
    ("method", "match"),
    [
        ({"method": "fbs", "knobs": {"solver": {"a": 1}}}, "no part"), ({"method": "fbs", "steps": 2}, "has no steps"),
        ({"method": "fbs", "when": "after"}, "leave out tune, masks and when"),
        ({"method": "fbs", "knobs": {"dens": 1}}, "no knob 'dens'"),
    ],
)  # fmt: skip
def test_bad_contenders(method: dict[str, Any], match: str) -> None:
    with pytest.raises(SecateurError, match=match):
        Study.of({"tasks": ["digits"], "methods": [method], "targets": ["flops 50%"]})


def test_a_contender_that_makes_no_sense_is_left_out() -> None:
    asked = Study.of({"tasks": ["digits"], "models": ["demo"], "methods": ["fbs"], "targets": ["flops 50%", "0.5"]})
    reasons = {(left.subject, left.target): left.reason for left in left_out(asked)}
    assert reasons["digits", "0.5"] == "it takes a target in flops, and 0.5 is for weights"
    assert reasons["demo", "flops 50%"] == "it trains on a task, and this is a model"


def test_what_cannot_be_shared_is_no_process_of_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(ModelError, match="works in one process: start it without torchrun"):
        secateur.train("digits", "tucker", target="flops 50%", options={"images": 200})
