"""Training all sub-networks at once, the search among them, and whole runs: saved, stopped and gone on with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import secateur
from secateur.errors import RecipeError, SecateurError
from secateur.recipe import Recipe
from secateur.structured.targets import Target
from secateur.supernet import Elastic, Supernet, sandwich
from secateur.supernet.course import Course
from secateur.supernet.goal import Goal, facts_of, fitted, nonnegative
from secateur.supernet.shrinking import chosen
from secateur.tasks.base import cross_entropy
from secateur.when.own import own_options

from .nets import TASK, TINY, Convolutional, X, batches, perceptron, tiny

RECIPE = Recipe.of("l1-norm", recovery="none", allocation="uniform")
FAST = {"multiple": 2, "budget": 4, "calibration": 2, "random": 1}


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return perceptron()


@pytest.fixture
def elastic(net: nn.Module) -> Elastic:
    return Elastic(net, RECIPE, X, multiple=4)


# -- the sandwich rule ---------------------------------------------------------------------------------


def test_each_step_has_the_largest_the_smallest_and_random_ones(net: nn.Module, elastic: Elastic) -> None:
    steps: list[list[tuple[int, ...]]] = []
    loss = sandwich(Supernet(net, elastic), cross_entropy, random=3, seen=steps.append)
    batch = next(batches("train"))
    torch.manual_seed(1)
    for _ in range(4):
        loss(net, batch)
    for step in steps:
        assert step[0] == elastic.most and step[1] == elastic.least and len(step) == 5
        assert all(c in n.sizes for counts in step for c, n in zip(counts, elastic.nodes, strict=True))
    assert len({c for step in steps for c in step[2:]}) > 3
    again: list[list[tuple[int, ...]]] = []
    torch.manual_seed(1)  # the generator's state is all that decides: a checkpoint has it
    loss = sandwich(Supernet(net, elastic), cross_entropy, random=3, seen=again.append)
    for _ in range(4):
        loss(net, batch)
    assert again == steps


@pytest.mark.parametrize("distilled", [True, False])
def test_the_loss_by_its_definition(distilled: bool, net: nn.Module, elastic: Elastic) -> None:
    super_ = Supernet(net, elastic)
    x, y = next(batches("train"))
    value = sandwich(super_, cross_entropy, random=0, distilled=distilled)(net, (x, y))
    teacher, student = net(x).detach(), super_.small(elastic.least)(x)
    plain = nn.functional.cross_entropy(net(x), y)
    p, q = teacher.softmax(-1), student.log_softmax(-1)
    own = (p * (p.log() - q)).sum(-1).mean() if distilled else nn.functional.cross_entropy(student, y)
    torch.testing.assert_close(value, plain + own)
    value.backward()
    got = {n: p.grad.clone() for n, p in net.named_parameters()}  # type: ignore[union-attr]
    net.zero_grad()
    other = super_.sub(elastic.least)(x)
    q = other.log_softmax(-1)
    own = (p * (p.log() - q)).sum(-1).mean() if distilled else nn.functional.cross_entropy(other, y)
    (nn.functional.cross_entropy(net(x), y) + own).backward()
    for n, parameter in net.named_parameters():
        torch.testing.assert_close(parameter.grad, got[n])


def test_how_many_are_drawn_is_a_count(net: nn.Module, elastic: Elastic) -> None:
    with pytest.raises(RecipeError, match="how many sub-networks"):
        sandwich(Supernet(net, elastic), cross_entropy, random=-1)


# -- targets -------------------------------------------------------------------------------------------


def test_prices_that_are_not_negative_are_the_best() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        x = torch.rand(12, 3, generator=generator, dtype=torch.float64)
        y = torch.randn(12, generator=generator, dtype=torch.float64)
        p = torch.from_numpy(nonnegative(x.numpy(), y.numpy()))
        gradient = x.T @ (x @ p - y)  # the conditions of Karush, Kuhn and Tucker
        assert (p >= 0).all() and (gradient > -1e-9).all() and float((gradient * p).abs().max()) < 1e-9
    exact = fitted([(1.0, a, a * a, 0.0) for a in (0.0, 0.3, 0.6, 1.0)], [0.1 + 0.5 * a for a in (0.0, 0.3, 0.6, 1.0)])
    assert exact.error < 1e-12 and exact((1.0, 0.5, 0.25, 0.0)) == pytest.approx(0.35)


class Clock:
    """A machine whose latency is a number for each model and a share of its parameters."""

    def __init__(self, slope: float = 1.0, surprise: float = 1.0) -> None:
        self.slope, self.surprise, self.asked = slope, surprise, 0

    def __call__(self, models: Mapping[str, nn.Module], args: Any, kwargs: Mapping[str, Any]) -> Mapping[str, float]:
        self.asked += 1
        return {
            name: (1.0 + self.slope * sum(p.numel() for p in model.parameters()))
            * (self.surprise if name == "small" else 1.0)
            for name, model in models.items()
        }


def test_a_latency_is_predicted_from_what_was_measured(net: nn.Module, elastic: Elastic) -> None:
    goal = Goal(
        elastic, Target.parse("latency 40%"), net, lambda c: Supernet.small_of(net, elastic, c), measure=Clock()
    )
    assert goal.limit == pytest.approx(0.6) and goal.predictor is not None and goal.predictor.error < 1e-9
    counts = elastic.draw(torch.Generator().manual_seed(5))
    assert goal.cost(counts) == pytest.approx(goal.share(counts)) and goal.cost(elastic.most) == pytest.approx(1.0)
    assert facts_of(elastic, elastic.most) == (1.0, 1.0, 1.0, 1.0)
    clock = Clock()
    known = Goal(elastic, goal.target, net, goal.made, measure=clock, known=goal.record())
    assert known.cost(counts) == goal.cost(counts) and clock.asked == 0
    with pytest.raises(RecipeError, match="not 'memory"):
        Goal(elastic, Target.parse("memory 50%"), net, goal.made)


def course(net: nn.Module, target: str) -> Course:
    return Course(TASK, net, Target.parse(target), 1.0)


@pytest.mark.parametrize("target", ["flops 50%", "params 40%"])
def test_the_search_finds_the_best_of_a_space_that_can_be_gone_through(
    target: str, net: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a sub-network is worth is known in closed form here; all that are within the target are gone through."""
    elastic = Elastic(net, RECIPE, X, multiple=1)
    run, super_ = course(net, target), Supernet(net, elastic)
    goal = Goal(elastic, run.target, net, super_.small)

    def worth(counts: tuple[int, ...]) -> float:
        return -sum(a * n.units / c for a, c, n in zip((1.0, 3.0), counts, elastic.nodes, strict=True))

    monkeypatch.setattr(super_, "small", lambda counts: counts)
    monkeypatch.setattr(run, "value", lambda counts, few: worth(counts))
    best, trials = chosen(run, elastic, super_, goal, 40, "evolution", [])
    a, b = (n.sizes for n in elastic.nodes)
    within = [(i, j) for i in a for j in b if goal.cost((i, j)) <= goal.limit]
    assert worth(best.counts) == max(map(worth, within)) and len(trials) > 1
    assert all(goal.met(t.counts) for t in trials)


def test_what_is_slower_than_predicted_is_searched_again_or_refused(
    net: nn.Module, elastic: Elastic, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, super_ = course(net, "latency 30%"), Supernet(net, elastic)
    clock = Clock()
    goal = Goal(elastic, run.target, net, super_.small, measure=clock)
    monkeypatch.setattr(run, "value", lambda model, few: float(sum(p.numel() for p in model.parameters())))
    clock.surprise, goal.shares = 1.2, {}  # the machine has become slower for small ones
    best, _ = chosen(run, elastic, super_, goal, 8, "evolution", [])
    assert goal.share(best.counts) <= 1.05 * goal.limit < 1.2 * goal.cost(elastic.most)
    clock.surprise, goal.shares = 9.0, {}
    with pytest.raises(RecipeError, match=r"takes \d+% of the whole model's time here, and 70% was asked for"):
        chosen(run, elastic, super_, goal, 8, "evolution", [])


# -- whole runs ----------------------------------------------------------------------------------------


def test_a_run_ends_in_a_smaller_model_that_is_saved_and_loaded(tmp_path: Path) -> None:
    made = secateur.train(TASK, "supernet", target="flops 50%", epochs=1, out=tmp_path / "out", knobs=FAST)
    found = made.run["supernet"]
    assert found["reached"] <= found["limit"] == pytest.approx(0.5 * found["total"]) and len(found["trials"]) == 4
    from secateur.measure.flops import flops

    assert flops(made.model, X[:1]).total == found["reached"]
    assert made.run["before"]["parameters"] > made.run["after"]["parameters"] and found["error"] < 1e-9
    assert [r["leg"] for r in made.run["curves"]] == ["dense", "supernet", "fine-tuning"]
    loaded = secateur.load(tmp_path / "out", Convolutional())
    assert torch.equal(loaded.eval()(X), made.model(X)) and not (tmp_path / "out.run").exists()
    assert json.loads((tmp_path / "out" / "run.json").read_text())["target"] == "flops 50%"


class Stop(Exception):
    """Ends a run."""


def go(out: Path, stop: tuple[str, int] | None = None) -> Any:
    def progress(name: str, done: int, of: int) -> None:
        if (name, done) == stop:
            raise Stop

    return secateur.train(
        TINY, "supernet", target="params 40%", epochs=1, out=out, knobs={"supernet": FAST}, every=0.0,
        progress=progress, dense=out.parent / "dense",
    )  # fmt: skip


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return go(tmp_path_factory.mktemp("run") / "out")


@pytest.mark.parametrize("stop", [("supernet", 3), ("search", 2), ("fine-tuning", 1)], ids=lambda s: s[0])
def test_a_run_that_was_stopped_ends_with_the_same_weights(
    stop: tuple[str, int], straight: Any, tmp_path: Path
) -> None:
    with pytest.raises(Stop):
        go(tmp_path / "a", stop)
    one = go(tmp_path / "a")
    assert one.run["supernet"]["counts"] == straight.run["supernet"]["counts"]
    for a, b in zip(one.model.state_dict().values(), straight.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"target": "flops 99%"}, "the smallest sub-network has flops"),
        ({"target": "memory 50%"}, "flops, params, bytes or latency"),
        ({"budget": 0}, "budget is a whole number, at least 1, not 0"),
        ({"calibration": 0}, "calibration is a whole number, at least 1"),
        ({"random": -1}, "random is a whole number, at least 0"), ({"multiple": 2.5}, "multiple is a whole number"),
        ({"order": "nothing"}, "no method named 'nothing'"), ({"strategy": "luck"}, "no search named 'luck'"),
        ({"low": 0.0}, "low is a share"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_said_before_any_training(given: dict[str, Any], message: str) -> None:
    seen: list[str] = []
    target = given.get("target", "flops 50%")
    knobs = {**FAST, **{k: v for k, v in given.items() if k != "target"}}
    with pytest.raises(SecateurError, match=message):
        secateur.train(TINY, "supernet", target=target, knobs=knobs, progress=lambda name, *_: seen.append(name))
    assert seen == []


def test_options_of_train_that_are_knobs_here() -> None:
    assert own_options("supernet", {"multiple": 4, "knobs": {"budget": 2}})["knobs"] == {"multiple": 4, "budget": 2}
    assert own_options("supernet", {"multiple": 4, "knobs": {"multiple": 2}})["knobs"] == {"multiple": 2}
    with pytest.raises(RecipeError, match="'fbs' has no multiple"):
        secateur.train("digits", "fbs", target="flops 50%", multiple=4)


def test_a_search_that_is_repeated_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was measured of those that were too slow is kept: the second search is the same, the clock is not."""
    clock, searches = Clock(), []
    monkeypatch.setattr("secateur.supernet.goal.latency", lambda models, *a, **k: clock(models, *a))

    def progress(name: str, done: int, of: int) -> None:
        searches.append(name)
        if name == "search" and clock.surprise == 1.0:
            clock.surprise = 1.6  # the machine has become slower for small ones
        if name == "search-2" and clock.surprise == 1.6:
            clock.surprise = 1.65
            raise Stop

    given: dict[str, Any] = {"target": "latency 30%", "epochs": 0.5, "knobs": {**FAST, "budget": 6}, "every": 0.0}
    given |= {"out": tmp_path / "a", "progress": progress}
    with pytest.raises(Stop):
        secateur.train(TINY, "supernet", **given)
    made = secateur.train(TINY, "supernet", **given)
    found = made.run["supernet"]
    assert "search-2" in searches and found["reached"] <= 1.05 * found["limit"]
    assert made.run["tried"] == len(found["trials"]) > 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "give one, such as --target"),
        ({"target": "flops 50%", "knobs": {"span": 0.0}}, "span is how long"),
        ({"target": "flops 50%", "length": -1.0}, "length is -1.0: it is a number of 0 or more"),
        ({"target": "flops 50%", "knobs": {"wdith": 1}}, "has no knob 'wdith'"),
        ({"target": "flops 50%", "knobs": {"order": "taylor"}}, "ranks by data"),
        ({"target": "flops 50%", "knobs": {"strategy": "amc"}}, "looks at layers"),
        ({"target": "flops 50%", "sparsity": 0.5}, "has no sparsity"),
    ],
)
def test_bad_input_is_one_sentence(given: dict[str, Any], message: str) -> None:
    torch.manual_seed(0)
    with pytest.raises(RecipeError, match=message):
        secateur.train(TINY, "supernet", model=tiny(), **given)
