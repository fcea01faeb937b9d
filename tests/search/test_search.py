"""A search on models: nothing is left behind, the result is an ordinary recipe, and stopped searches go on."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import secateur
from secateur.calibrate import recalibrate
from secateur.errors import OutputError, RecipeError
from secateur.graph.trace import stored_tensors
from secateur.layers import find_layers
from secateur.search.describe import edges_of_layers, facts_of
from secateur.search.subject import restored
from secateur.structured.make import Case
from tests.conftest import Run
from tests.nets import Residual, noise


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return Residual(32, 24)


X = noise(16, 3, 8, 8)


def likeness(net: nn.Module) -> Any:
    wanted = net.eval()(X).detach()
    return lambda model: -float((model(X) - wanted).square().mean())


CASES: list[dict[str, Any]] = [
    {"sparsity": 0.8},
    {"sparsity": 0.8, "granularity": "row", "method": "wanda", "data": [X]},
    {"granularity": "2:4", "skip": ["stem"]},
    {"granularity": "block(1,4)", "sparsity": 0.7, "skip": ["stem"]},
    {"granularity": "element", "target": "flops 70%", "example": X[:1]},
    {"method": "l1-norm", "target": "flops 50%", "example": X[:1], "multiple": 4},
    {"method": "group-norm", "target": "params 60%", "example": X[:1], "multiple": 1},
    {"method": "taylor", "sparsity": 0.5, "example": X[:1], "multiple": 4, "data": [X], "recovery": "refit",
     "loss": lambda m, b: m(b).square().mean(), "budget": 4},
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.get('method', 'magnitude')} {c.get('granularity', '')}")
def test_the_recipe_repeats_what_was_found_and_the_model_is_as_it_was(case: dict[str, Any], net: nn.Module) -> None:
    evaluate = likeness(net)
    net.train()
    net.b1.eval()
    before = {n: t.detach().clone() for n, t in stored_tensors(net).items()}
    modes = [m.training for m in net.modules()]
    found = secateur.search(net, evaluate=evaluate, **{"budget": 12, **case})
    assert all(torch.equal(t, before[n]) for n, t in stored_tensors(net).items())
    assert [m.training for m in net.modules()] == modes
    assert all(p.grad is None for p in net.parameters())
    few = "method" in case or case.get("granularity") == "2:4"  # spaces that may be tried through before the budget is
    assert len(found.trials) == 12 or (few and 2 <= len(found.trials) <= 12)
    assert all(t.cost <= found.limit for t in found.trials)
    assert found.best.value > found.uniform.value
    recipe = secateur.Recipe.load(found.recipe.dump())
    assert recipe == found.recipe and recipe.allocation == "explicit"
    twin = copy.deepcopy(net)
    given = {k: v for k, v in case.items() if k in ("data", "loss")}
    if "method" in case and "example" in case:
        plan = secateur.prune(twin, recipe, example=X[:1], multiple=case["multiple"], **given)
        assert not [n for n in plan.notes if "target" in n or "more goes" in n]
        twin = plan.shrink()
    else:
        pruned = secateur.prune(twin, recipe, **given)
        if found.quantity == "weights":
            assert sum(r.kept for r in pruned.records) == found.best.cost
    with torch.no_grad():
        assert evaluate(twin.eval()) == pytest.approx(found.best.value, rel=1e-4)


def test_single_weights_meet_the_sparsity_exactly(net: nn.Module) -> None:
    found = secateur.search(net, evaluate=likeness(net), sparsity=0.83, budget=10)
    total = sum(x.numel() for x in (net.stem.weight, net.c1.weight, net.c2.weight, net.head.weight))
    assert {t.cost for t in found.trials} == {round(0.17 * total)}
    floors = [0.2 * 0.17 * n for n in (net.stem.weight.numel(), net.c1.weight.numel())]
    assert all(t.counts[k] >= floors[k] for t in found.trials for k in range(2))


def test_bounds_and_own_allocation(net: nn.Module) -> None:
    found = secateur.search(
        net, evaluate=likeness(net), sparsity=0.8, budget=8, allocation="erk", bounds={"head": (1.0, 1.0)}
    )
    assert [t.origin for t in found.trials[:3]] == ["uniform", "recipe", "strategy"]
    assert all(t.keeps[-1] == 1.0 for t in found.trials)
    assert found.trials[1].keeps[0] > 2 * found.trials[0].keeps[0]  # erk gives small layers more
    with pytest.raises(RecipeError, match="bounds of 'head'"):
        secateur.search(net, evaluate=likeness(net), budget=2, bounds={"head": (0.5, 0.2)})
    with pytest.raises(RecipeError, match="the bounds leave"):
        secateur.search(net, evaluate=likeness(net), sparsity=0.9, budget=2, low=0.0, bounds={"c*": (0.5, 1.0)})


def test_an_interrupted_search_goes_on(net: nn.Module, tmp_path: Path) -> None:
    evaluate, log = likeness(net), tmp_path / "search.jsonl"
    asked = {"sparsity": 0.8, "budget": 12, "history": log}
    whole = secateur.search(net, evaluate=evaluate, sparsity=0.8, budget=12)
    before = net.c1.weight.detach().clone()
    calls = 0

    def tires(model: nn.Module) -> float:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt
        return float(evaluate(model))

    with pytest.raises(KeyboardInterrupt):
        secateur.search(net, evaluate=tires, **asked)
    assert torch.equal(net.c1.weight, before)
    log.write_text(log.read_text() + '{"number": 5, "torn')
    calls = -100
    found = secateur.search(net, evaluate=tires, **asked)
    assert calls == -100 + 7
    assert [(t.counts, t.value) for t in found.trials] == [(t.counts, t.value) for t in whole.trials]
    assert len(log.read_text().splitlines()) == 13
    with pytest.raises(OutputError, match="history of another search"):
        secateur.search(net, evaluate=evaluate, sparsity=0.7, budget=12, history=log)
    json.dumps(found.to_dict())
    assert "uniform" in str(found)


def test_whatever_an_evaluation_does_is_undone(net: nn.Module) -> None:
    before = {n: t.detach().clone() for n, t in stored_tensors(net).items()}
    net.head.weight.grad = torch.ones_like(net.head.weight)

    def misbehave() -> None:
        net.train()
        net(X).sum().backward()
        torch.optim.SGD(net.parameters(), lr=1.0).step()
        net.c1.weight = nn.Parameter(torch.zeros_like(net.c1.weight))
        recalibrate(net, [X])
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), restored(net):
        misbehave()
    assert all(torch.equal(t, before[n]) for n, t in stored_tensors(net).items())
    assert torch.equal(net.head.weight.grad, torch.ones_like(net.head.weight)) and net.stem.weight.grad is None


def test_recalibrated_statistics_are_those_of_the_data() -> None:
    norm = nn.BatchNorm1d(3).eval()
    x = noise(12, 3) * 2 + 1
    recalibrate(norm, [x[:6], x[6:]])
    torch.testing.assert_close(norm.running_mean, x.mean(0))
    torch.testing.assert_close(norm.running_var, (x[:6].var(0) + x[6:].var(0)) / 2)
    assert norm.momentum == 0.1 and not norm.training


def test_recalibration_is_part_of_an_evaluation(net: nn.Module) -> None:
    with pytest.raises(RecipeError, match="measured anew on data"):
        secateur.search(net, evaluate=likeness(net), recalibrated=True, budget=2)
    seen = []

    def evaluate(model: Any) -> float:
        seen.append(model.b1.running_mean.clone())
        return 0.0

    secateur.search(net, evaluate=evaluate, recalibrated=True, data=[X], budget=2)
    assert net.b1.running_mean.eq(0).all() and seen[0].any() and not torch.equal(seen[0], seen[1])


def test_facts_and_edges_of_a_residual_network(net: nn.Module) -> None:
    layers = find_layers(net)[0]
    facts = facts_of(net, layers, ((X[:1],), {}))
    assert facts["c1"] == {
        "linear": 0.0, "outputs": 24.0, "inputs": 32.0, "height": 8.0, "width": 8.0, "stride": 1.0, "kernel": 3.0,
        "flops": 2.0 * 64 * 9 * 32 * 24,
    }  # fmt: skip
    assert facts["head"]["linear"] == 1.0 and facts["head"]["flops"] == 2 * 32 * 5
    found = Case(net, secateur.Recipe(), X[:1]).found
    names = [f"{x.name}.weight" for x in layers]
    # stem -> c1 -> c2 -> head, and around them stem -> head
    assert sorted(edges_of_layers(net, found, names)) == [(0, 1), (0, 3), (1, 2), (2, 3)]


def test_what_cannot_be_searched_is_said(net: nn.Module) -> None:
    evaluate = likeness(net)
    for asked, message in [
        ({"strategy": "evolutoin"}, "did you mean 'evolution'"),
        ({"granularity": "depth", "criterion": "block-cosine"}, "."),
        ({"schedule": "linear", "steps": 3}, "one step"),
        ({"method": "l1-norm"}, "give inputs for it with example="),
        ({"strategy": "graph"}, "follows one forward pass"),
        ({"target": "latency to 2ms", "example": X[:1]}, "can be counted"),
        ({"evaluate": lambda m: "good"}, "returns a number"),
        ({"strategy": "bayesian", "options": {"sampler": "x"}}, "tpe or gp"),
    ]:
        if asked.get("strategy") == "bayesian":
            pytest.importorskip("optuna")
        with pytest.raises(secateur.SecateurError, match=message):
            secateur.search(net, **{"evaluate": evaluate, "budget": 3, **asked})


def test_a_missing_optuna_is_said(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    with pytest.raises(RecipeError, match="pip install 'secateur\\[search\\]'"):
        secateur.search(net, evaluate=likeness(net), strategy="bayesian", budget=3)


FILE = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))

X = torch.randn(32, 8, generator=torch.Generator().manual_seed(1))
Y = net()(X).detach()

def evaluate(model):
    return -float((model(X) - Y).square().mean())
"""


def test_on_the_command_line(run: Run, tmp_path: Path) -> None:
    file, out = tmp_path / "mine.py", tmp_path / "found" / "recipe.yaml"
    file.write_text(FILE)
    asked = ["search", f"{file}:net", "--evaluate", f"{file}:evaluate", "--sparsity", "0.7", "--budget", "8"]
    status, printed, _ = run(*asked, "--strategy", "evolution", "--option", "sigma=0.4", "--out", out, "--json")
    found = json.loads(printed)
    assert status == 0 and len(found["trials"]) == 8
    recipe = secateur.Recipe.load(out)
    assert set(recipe.knobs["allocation"]["table"]) == {"0", "2"} and recipe.allocation == "explicit"
    status, _, error = run(*asked, "--out", out)
    assert status == 2 and "exists" in error
    status, printed, _ = run(*asked, "--out", out, "--force")
    assert status == 0 and "8 evaluations at weights 58 of 192" in printed
    status, _, error = run(*asked[:3], f"{file}:nothing", "--out", tmp_path / "x.yaml")
    assert status == 2 and "FILE.py:NAME" in error
