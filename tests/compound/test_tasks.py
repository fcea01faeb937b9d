"""Compounds on a task: trained first, then step by step; and from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import secateur
from secateur.cli import app
from secateur.compound import Compound
from secateur.errors import RecipeError
from secateur.layers import find_layers
from tests import tiny
from tests.compare.tiny import clouds

TINY = Path(__file__).parents[1] / "compare" / "tiny.py"
STEPS: list[dict[str, Any]] = [
    {"prune": {"method": "magnitude", "sparsity": 0.5}},
    {"recover": {"method": "distill", "epochs": 2}},
    {"quantize": "int8"},
]


def test_a_task_is_trained_and_then_goes_through_the_steps(tmp_path: Path) -> None:
    made = secateur.train(clouds, Compound.of(STEPS), epochs=3, out=tmp_path / "out")
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert [s["title"] for s in run["steps"]] == ["prune magnitude, 0.5", "recover distill", "quantize int8"]
    assert [s["metric"]["name"] for s in run["steps"]] == ["accuracy, valid"] * 3
    assert run["metric"]["split"] == "test" and run["metric"]["after"] > 0.7
    assert made.sparsity == pytest.approx(0.5, abs=0.02) and set(made.grids) == {"0", "2"}
    again = secateur.load(tmp_path / "out", clouds().model(0))
    x = torch.randn(5, 8)
    assert torch.equal(again(x), made.model(x))
    assert not (tmp_path / "out.run").exists()
    twice = secateur.train(clouds, Compound.of(STEPS), epochs=3)
    assert torch.equal(twice.model(x), made.model(x)), "a seed decides all"


def test_by_hand_on_a_task() -> None:
    """The steps are those that `train` and `prune` would do one after the other."""
    made = secateur.train(clouds, Compound.of(STEPS[:1] + STEPS[2:]), epochs=2)
    dense = secateur.train(clouds, None, epochs=2).model
    data = list(clouds().batches("train", 0, 0))
    pruned = secateur.prune(dense, "magnitude", sparsity=0.5)
    secateur.prune(dense, secateur.Recipe.of("gptq", sparsity=0.0).quantized("int8"), data=data, masks=pruned.masks)
    for name, weight in dense.state_dict().items():
        assert torch.equal(weight, made.model.state_dict()[name]), name


def test_a_method_that_trains_is_a_step() -> None:
    steps = [{"prune": {"method": "gmp", "sparsity": 0.5, "knobs": {"driver": {"every": 1}}}}, {"decompose": {"method": "svd", "sparsity": 0.1}}]  # fmt: skip  # noqa: E501
    with pytest.raises(RecipeError, match="factors do not keep its zeros"):
        Compound.of(steps)
    made = secateur.train(clouds, Compound.of([*steps[:1], {"quantize": "int8"}]), epochs=1)
    layers = {x.name: x for x in find_layers(made.model)[0]}
    assert made.masks and made.sparsity == pytest.approx(0.5, abs=0.02)
    assert all(not bool((layers[n].weight() != 0)[~m].any()) for n, m in made.masks.items())
    with pytest.raises(RecipeError, match=r"step 1 \(prune gmp, 0.5\) needs a task: train a task"):
        secateur.prune(nn.Sequential(nn.Linear(4, 4)), Compound.of(steps[:1]))


def test_a_decomposition_on_a_task() -> None:
    made = secateur.train(clouds, "low-rank", sparsity=0.3, epochs=1)
    assert str(made.compound) == "low-rank: decompose low-rank, 0.3"
    assert isinstance(made.model[0], nn.Sequential)


def test_from_the_command_line(tmp_path: Path) -> None:
    tiny.save(tmp_path / "model", dtype=torch.bfloat16)
    recipe = tmp_path / "compound.yaml"
    recipe.write_text(
        "steps:\n  - prune: {method: magnitude, granularity: '2:4'}\n  - quantize: {as: int8, method: round}\n"
    )
    done = CliRunner().invoke(app, ["plan", f"{tmp_path}/model", "--recipe", str(recipe)])
    assert done.exit_code == 0, done.output
    assert "quantize int8 by round" in done.output and "needs nothing but the model" in done.output
    done = CliRunner().invoke(app, ["prune", f"{tmp_path}/model", "--recipe", str(recipe), "--out", f"{tmp_path}/out"])
    assert done.exit_code == 0, done.output
    by_hand = ["prune", f"{tmp_path}/model", "--method", "magnitude", "--granularity", "2:4", "--quantize", "int8", "--out", f"{tmp_path}/hand"]  # fmt: skip  # noqa: E501
    assert CliRunner().invoke(app, by_hand).exit_code == 0
    left, right = secateur.load(tmp_path / "out"), secateur.load(tmp_path / "hand")
    for name, weight in left.state_dict().items():
        assert torch.equal(weight, right.state_dict()[name]), name
    done = CliRunner().invoke(app, ["prune", f"{tmp_path}/model", "--recipe", str(recipe), "--storage", "smallest", "--out", f"{tmp_path}/least"])  # fmt: skip  # noqa: E501
    assert done.exit_code == 0 and (tmp_path / "least" / "stored.json").is_file(), done.output
    again = secateur.load(tmp_path / "least").state_dict()
    assert all(torch.equal(again[name], weight) for name, weight in left.state_dict().items())
    refused = CliRunner().invoke(app, ["prune", f"{tmp_path}/model", "--recipe", str(recipe), "--sparsity", "0.3", "--out", "x"])  # fmt: skip  # noqa: E501
    assert refused.exit_code == 2 or "write --sparsity into the step" in str(refused.exception)


def test_a_task_from_the_command_line(tmp_path: Path) -> None:
    recipe = tmp_path / "compound.yaml"
    recipe.write_text(json.dumps({"steps": STEPS}))
    done = CliRunner().invoke(
        app,
        [
            "train",
            f"{TINY}:clouds",
            "--recipe",
            str(recipe),
            "--epochs",
            "1",
            "--storage",
            "smallest",
            "--out",
            f"{tmp_path}/out",
        ],
    )
    assert done.exit_code == 0 and (tmp_path / "out" / "stored.json").is_file(), done.output
    assert "accuracy, test" in done.output
    done = CliRunner().invoke(
        app, ["plan", f"{TINY.parents[1]}/nets.py:small", "--method", "svd", "--sparsity", "0.3", "--json"]
    )
    assert done.exit_code in (0, 1)


@pytest.mark.parametrize("before", [[], [{"quantize": "int4:8"}]], ids=["fresh", "quantized"])
def test_training_on_integers_is_a_step(before: list[Any], tmp_path: Path) -> None:
    """After a quantization its grids stay; without one they are found, and in both cases integers are written."""
    qat: dict[str, Any] = {"method": "qat", "epochs": 6, "rate": 2.0} | ({} if before else {"bits": 3})
    made = secateur.train(clouds, Compound.of([STEPS[0], *before, {"recover": qat}]), epochs=2, out=tmp_path / "out")
    layers = {x.name: x for x in find_layers(made.model)[0]}
    assert set(made.grids) == set(layers) and made.sparsity == pytest.approx(0.5, abs=0.02)
    for name, layer in layers.items():
        found: Any = made.grids[name]
        assert torch.equal(found.round(layer.weight()), layer.weight()) and found.bits == (4 if before else 3)
        assert not bool(layer.weight()[~made.masks[name]].any())
    if before:
        plain = secateur.train(clouds, Compound.of([STEPS[0], *before]), epochs=2)
        assert all(torch.equal(plain.grids[n].scale, g.scale) for n, g in made.grids.items())  # type: ignore[union-attr]
        assert not torch.equal(plain.model.state_dict()["0.weight"], made.model.state_dict()["0.weight"])
        assert plain.run["after"]["bytes"] == made.run["after"]["bytes"]
    again = secateur.load(tmp_path / "out", clouds().model(0))
    x = torch.randn(5, 8)
    assert torch.equal(again(x), made.model(x))
    told = secateur.plan(clouds().model(0), made.compound, example=x, data=list(clouds().batches("train", 0, 0)))
    assert told.steps[-1]["after"]["bytes"] == made.run["after"]["bytes"]
