"""Whole runs: rounds against brute force, tickets, transfer, smaller models; and what is refused."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import secateur
from secateur import Masks, Recipe, Task, Trained, drivers, train
from secateur.errors import DataError, ModelError, NumericalError, OutputError, RecipeError
from secateur.graph import dependencies, trace
from secateur.layers import find_layers
from secateur.measure import count_parameters
from secateur.when import supermask
from secateur.when.course import Course
from secateur.when.early import EarlyBird, channel_mask
from secateur.when.healing import fitting, fresh_model
from secateur.when.train import recipe_and_moment
from tests.tasks.conftest import _one_thread  # noqa: F401  each test on one thread
from tests.tasks.tiny import TASK, batches, network

OFTEN = {"driver": {"every": 2}}


def clean(made: Trained) -> None:
    """Zeros where the masks say so, and only there is nothing asked of the rest."""
    for name, mask in made.masks.items():
        assert not bool(made.model.get_submodule(name).weight.detach()[~mask.reshape_as(_weight(made, name))].any())


def _weight(made: Trained, name: str) -> Tensor:
    weight: Tensor = made.model.get_submodule(name).weight
    return weight


def largest(model: nn.Module, count: int, before: dict[str, Tensor]) -> dict[str, Tensor]:
    """The ``count`` largest weights of a network among those that ``before`` keeps, one by one."""
    rows = [(layer.name, layer.weight()) for layer in find_layers(model)[0]]
    flat = [
        (-float(w[o, i].abs()) if before.get(name, torch.ones_like(w))[o, i] else 1.0, k, o, i)
        for k, (name, w) in enumerate(rows)
        for o in range(w.shape[0])
        for i in range(w.shape[1])
    ]
    found = {name: torch.zeros_like(w, dtype=torch.bool) for name, w in rows}
    for _, k, o, i in sorted(flat)[:count]:
        found[rows[k][0]][o, i] = True
    return found


def test_the_first_round_removes_the_smallest_weights_of_the_dense_run() -> None:
    dense = train(TASK, seed=2)
    total = sum(x.numel for x in find_layers(dense.model)[0])
    ticket = train(TASK, "lth", sparsity=0.2, steps=1, seed=2)
    wanted = largest(dense.model, round(0.8 * total), {})
    differ = sum(int((ticket.masks[n] != wanted[n]).sum()) for n in wanted)
    assert differ <= len(wanted)  # each layer's count is rounded by itself
    assert ticket.run["before"]["metric"]["value"] == dense.metric


def test_rounds_are_nested_and_a_fifth_each() -> None:
    masks = {}
    for rounds in (1, 2, 3):  # what each round leaves, since rounds do not know how many follow
        masks[rounds] = train(TASK, "lth", sparsity=1 - 0.8**rounds, steps=rounds, epochs=1).masks
    for rounds in (1, 2, 3):
        assert masks[rounds].sparsity == pytest.approx(1 - 0.8**rounds, abs=2e-3)
        for name in masks[1] if rounds > 1 else ():
            assert not bool((masks[rounds][name] & ~masks[rounds - 1][name]).any())


@pytest.mark.parametrize(
    ("given", "rounds"),
    [
        ({}, 10),
        ({"sparsity": 0.95}, 14),
        ({"sparsity": 0.2}, 1),
        ({"sparsity": 0.95, "steps": 5}, 5),
        ({"steps": 3}, 3),
    ],
)
def test_how_many_rounds(given: dict[str, Any], rounds: int) -> None:
    recipe, moment = recipe_and_moment("lth", given, None, None)
    assert recipe.steps == rounds and moment == "after"


@pytest.mark.parametrize("method", ["random-erk", "gmp", "set", "rigl", "granet"])
def test_methods_along_the_way(method: str) -> None:
    knobs = {} if method == "random-erk" else {"knobs": OFTEN}
    made = train(TASK, method, sparsity=0.7, **knobs)
    assert made.sparsity == pytest.approx(0.7, abs=0.01)
    clean(made)
    assert made.run["curves"][-1]["sparsity"] == pytest.approx(0.7, abs=0.01)
    assert made.model.state_dict().keys() == network(0).state_dict().keys()


def test_a_gradual_run_may_be_taught_at_its_end() -> None:
    made = train(TASK, "gmp", sparsity=0.7, epochs=1, knobs={**OFTEN}, recovery="distill")
    clean(made)
    assert {row["leg"] for row in made.run["curves"]} == {"train", "dense", "recovery"}


def test_a_trained_model_is_pruned_as_it_is() -> None:
    dense = train(TASK)
    before = {k: v.clone() for k, v in dense.model.state_dict().items()}
    made = train(TASK, "magnitude-finetune", sparsity=0.5, model=dense.model)
    clean(made)
    assert all(torch.equal(v, before[k]) for k, v in dense.model.state_dict().items())
    assert {row["leg"] for row in made.run["curves"]} == {"round-1"}
    one_shot = train(TASK, "magnitude", sparsity=0.5, model=dense.model)
    assert one_shot.run["curves"] == []
    assert one_shot.metric == dense_masked(dense.model, one_shot.masks)


def dense_masked(model: nn.Module, masks: Masks) -> float:
    masks.apply(model)
    return TASK.measure(model, "test")


def test_the_dense_run_is_trained_once(tmp_path: Path) -> None:
    first = train(TASK, "magnitude-finetune", sparsity=0.5, dense=tmp_path)
    (file,) = tmp_path.iterdir()
    stamp = file.stat().st_mtime_ns
    second = train(TASK, "magnitude-finetune", sparsity=0.8, dense=tmp_path)
    assert file.stat().st_mtime_ns == stamp
    alone = train(TASK, "magnitude-finetune", sparsity=0.8)
    assert all(torch.equal(v, alone.model.state_dict()[k]) for k, v in second.model.state_dict().items())
    assert first.run["before"] == second.run["before"]


# -- tickets -----------------------------------------------------------------------------------------


def test_a_ticket_of_another_task(tmp_path: Path) -> None:
    ticket = train(TASK, "lth", sparsity=0.5, steps=1, epochs=1, out=tmp_path / "ticket")

    def wider(seed: int) -> nn.Module:
        made = network(seed)
        made[7] = nn.Linear(16, 5)  # another number of classes
        return made

    other = Task(wider, batches, epochs=1)
    made = train(other, masks=Masks.load(tmp_path / "ticket" / "masks.safetensors"))
    assert set(made.masks) == set(ticket.masks) - {"7"}
    assert all(torch.equal(made.masks[n], ticket.masks[n]) for n in made.masks)
    assert made.run["notes"] == ["1 masks fit no layer of this model and were left out, e.g. 7"]
    clean(made)
    with pytest.raises(RecipeError, match="no layer of this model has the name and the shape"):
        fitting({"9": torch.ones(2, 2, dtype=torch.bool)}, network(0))


def test_supermasks() -> None:
    masks = train(TASK, "lth", sparsity=0.5, steps=1, epochs=1).masks
    start = fresh_model(TASK, 0)
    masks.apply(start)
    assert supermask(TASK, masks) == TASK.measure(start, "test")
    signed = fresh_model(TASK, 0)
    for layer in find_layers(signed)[0]:
        w = layer.weight().clone()
        values = sorted({round(float(v), 5) for v in torch.where(w > 0, w.std(), -w.std()).flatten()})
        assert len(values) == 2
        layer.write(torch.where(masks[layer.name], w.sign() * w.std(), 0.0))
    assert supermask(TASK, masks, signed=True) == TASK.measure(signed, "test")


class TestEarlyBird:
    """The driver, the masks that are compared, and a whole run."""

    @given(st.lists(st.floats(0, 0.3), max_size=7), st.integers(2, 6))
    def test_the_driver(self, distances: list[float], window: int) -> None:
        found = drivers.early_bird(3, 10, tuple(distances), window=window)
        last = distances[len(distances) - (window - 1) :] if len(distances) >= window - 1 else None
        assert (found is not None) == (last is not None and all(d <= 0.1 for d in last))
        assert drivers.early_bird(10, 10, tuple(distances), window=window) is not None

    def test_distances_are_those_of_the_masks(self) -> None:
        recipe = Recipe(driver="early-bird", sparsity=0.5, knobs={"driver": {"window": 3}})
        watch, drawn = EarlyBird(recipe), []
        for seed in range(4):
            torch.manual_seed(seed)
            net = nn.Linear(6, 6)
            drawn.append(secateur.prune(nn.Sequential(net), "magnitude", sparsity=0.5).masks["0"])
            torch.manual_seed(seed)
            watch.at_epoch(nn.Sequential(nn.Linear(6, 6)), seed + 1, 10)
        assert watch.distances[0] == []
        assert watch.distances[3] == [float((drawn[3] != drawn[k]).double().mean()) for k in (1, 2)]

    def test_channels_by_their_scales(self) -> None:
        net = nn.Sequential(nn.BatchNorm1d(50), nn.ReLU(), nn.BatchNorm1d(30))
        for norm in (net[0], net[2]):
            nn.init.normal_(norm.weight)
        scales = torch.cat([net[0].weight, net[2].weight]).detach().abs()
        kept = channel_mask(net, 0.7)
        assert int(kept.sum()) == 24 and float(scales[kept].min()) >= float(scales[~kept].max())
        with pytest.raises(RecipeError, match="the model has none"):
            channel_mask(nn.Linear(2, 2), 0.5)

    def test_a_smaller_model_comes_out(self, tmp_path: Path) -> None:
        made = train(
            "digits", "early-bird", sparsity=0.4, epochs=2, options={"images": 400, "width": 16}, out=tmp_path / "out",
            knobs={"driver": {"window": 2, "below": 0.5}},
        )  # fmt: skip
        assert made.run["after"]["parameters"] < 0.75 * made.run["model"]["parameters"] or made.masks == {}
        small = secateur.load(tmp_path / "out", fresh_model(secateur.tasks.find("digits", width=16), 0))
        x = torch.randn(2, 1, 12, 12)
        with torch.no_grad():
            assert torch.allclose(small.eval()(x), made.model(x), atol=1e-5)
        assert made.run["distances"][0] == []


@pytest.mark.parametrize("recovery", ["finetune", "scratch", "distill", "refit"])
def test_smaller_models_heal(recovery: str) -> None:
    made = train(
        "digits", "l1-norm", sparsity=0.5, epochs=1, options={"images": 400, "width": 16}, recovery=recovery, steps=1
    )
    dense = made.run["before"]["parameters"]
    assert made.run["after"]["parameters"] < 0.7 * dense and not made.masks


@functools.cache
def digits() -> nn.Module:
    """A trained network; runs of 200 steps."""
    return train("digits").model


@pytest.mark.parametrize(("method", "sparsity", "least"), [("gsm", 0.9, 0.85), ("platon", 0.8, 0.9)])
def test_methods_that_press_a_trained_model_keep_it_right(method: str, sparsity: float, least: float) -> None:
    made = train("digits", method, sparsity=sparsity, model=digits())
    assert made.sparsity == pytest.approx(sparsity, abs=1e-3) and made.metric > least
    clean(made)


def test_without_fading_gsm_cuts_what_is_as_large_as_ever() -> None:
    made = train("digits", "gsm", sparsity=0.9, model=digits(), knobs={"hold": {"fade": 0.0}})
    assert made.metric < 0.5


def test_a_run_begins_with_the_model_that_was_given() -> None:
    given = network(7)
    before = {k: v.clone() for k, v in given.state_dict().items()}
    made = train(TASK, "random-erk", sparsity=0.5, model=given, epochs=1 / 6)  # one step
    assert all(torch.equal(v, before[k]) for k, v in given.state_dict().items())
    rate = 0.1 * 0.05
    for name, mask in made.masks.items():
        moved = (_weight(made, name) - given.get_submodule(name).weight).detach()[mask.reshape_as(_weight(made, name))]
        assert 0 < float(moved.abs().max()) < 20 * rate


UNITS: dict[str, Any] = {"epochs": 1, "options": {"images": 200, "width": 16}}


@pytest.mark.parametrize(
    "method", ["l1-norm", "sfp", "gradual-structured", "l0-units", "slimming", "greg", "early-bird"]
)
def test_a_target_of_units_is_met_whenever_they_go(method: str) -> None:
    """Before, while, or after the model trains: and what goes is set by FLOPs, not by parameters."""
    task, x = secateur.tasks.find("digits", width=16), torch.zeros(1, 1, 12, 12)
    total = secateur.plan(task.model(0), "l1-norm", sparsity=0.5, example=x).before
    made = train("digits", method, target="flops 40%", multiple=4, **UNITS)
    count = dependencies(trace(made.model, (x,), {})).flops()
    assert 0.5 * total["flops"] < count <= 0.6 * total["flops"]
    assert made.run["target"] == "flops 40%" and made.masks == {}
    assert made.run["after"]["parameters"] < total["params"]


@pytest.mark.parametrize(("method", "leg"), [("gradual-structured", "train"), ("sfp", "train"), ("slimming", "train")])
def test_units_go_while_the_model_trains(method: str, leg: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole model is trained, and what training has settled is what is cut: the outputs stay."""
    seen: list[nn.Module] = []
    cut = Course._cut

    def spy(self: Any, plan: Any) -> nn.Module:
        small = cut(self, plan)
        seen.extend([plan.model, small])
        return small

    monkeypatch.setattr(Course, "_cut", spy)
    made = train("digits", method, sparsity=0.4, **UNITS)
    masked, small = (m.eval() for m in seen)
    assert made.run["curves"][-1]["leg"] == leg and small is made.model
    whole, x = fresh_model(secateur.tasks.find("digits", width=16), 0), torch.randn(4, 1, 12, 12)
    assert count_parameters(masked)[0] == count_parameters(whole)[0] > count_parameters(small)[0]
    assert not torch.equal(masked.state_dict()["0.weight"], whole.state_dict()["0.weight"])
    with torch.no_grad():
        assert torch.allclose(masked(x), small(x), atol=1e-5)
    if method != "slimming":  # and training itself had zeroed it
        final = made.run["curves"][-1]["sparsity"]
        assert final > 0.2


def test_scored_on_the_validation_data_nothing_sees_the_test_data() -> None:
    asked: list[str] = []

    def seen(split: str, seed: int = 0, epoch: int = 0) -> Any:
        asked.append(split)
        return batches(split, seed, epoch)

    task = Task(network, seen, epochs=1)
    for method in ("lth", "gmp", "snip", None):
        extra: dict[str, Any] = {} if method is None else {"sparsity": 0.5}
        made = train(task, method, score="valid", **extra)
        assert made.metric == task.measure(made.model, "valid") and made.run["score"] == "valid"
        assert "accuracy, valid" in str(made)
    assert set(asked) == {"train", "valid"}
    train(task)
    assert "test" in asked


# -- refusals ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "error", "sentence"),
    [
        ({"sparsity": 0.5}, RecipeError, "sparsity belongs to a method, and none is named"),
        ({"method": "gmp", "when": "later"}, RecipeError, "when is before, during or after, not 'later'"),
        ({"method": "gmp", "when": "after"}, RecipeError, "driver 'gradual' works while the model trains, not after"),
        ({"method": "gmp", "masks": {}}, RecipeError, "masks stand in place of a method"),
        ({"score": "train"}, RecipeError, "score is valid or test, not 'train'"),
        ({"method": "gmp", "target": "flops 50%"}, RecipeError, "and method 'gmp' works on 'element': give a sparsity"),
        ({"target": "flops 50%"}, RecipeError, "and no method is named that removes some"),
        ({"method": "sfp", "target": "flops"}, RecipeError, "target 'flops' is not understood"),
        ({"epochs": 0}, RecipeError, "a run takes more than no time: epochs is 0"),
        ({"epochs": float("inf")}, RecipeError, "a run takes more than no time"),
        ({"method": "early-bird", "granularity": "filter", "recovery": "rewind"}, RecipeError, "prune single weights"),
        ({"method": "lth", "granularity": "2:4", "steps": 2}, RecipeError, "fixes the sparsity"),
    ],
)
def test_sentences(given: dict[str, Any], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        train(TASK, **given)


def test_attach_knows_what_watches_epochs() -> None:
    with pytest.raises(RecipeError, match="driver 'early-bird' watches whole epochs: use secateur.train"):
        secateur.attach(nn.Linear(4, 4), "gmp", driver="early-bird", steps=3)


def test_masks_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ModelError, match=r"the mask of weight is \(2, 2\), the weight \(4, 4\)"):
        secateur.attach(nn.Linear(4, 4), masks={"weight": torch.ones(2, 2, dtype=torch.bool)})


def test_given_masks_hold_in_the_users_loop() -> None:
    torch.manual_seed(0)
    net = nn.Linear(6, 6)
    masks = secateur.prune(net, "magnitude", sparsity=0.5).masks
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
    with secateur.attach(net, masks=masks, optimizer=optimizer) as session:
        for _ in range(3):
            net(torch.randn(4, 6)).square().mean().backward()
            optimizer.step()
            session.step()
            optimizer.zero_grad()
    assert torch.equal(net.weight != 0, masks["weight"]) and session.sparsity == 0.5


def test_rounds_of_prune_keep_what_earlier_ones_removed() -> None:
    torch.manual_seed(0)
    net = nn.Linear(20, 20)
    first = secateur.prune(net, "random", sparsity=0.5, seed=1)
    nn.init.normal_(net.weight)  # trained on without its masks
    second = secateur.prune(net, "random", sparsity=0.8, seed=2, masks=first.masks)
    assert second.sparsity == 0.8
    assert not bool((second.masks["weight"] & ~first.masks["weight"]).any())


def test_a_diverging_loss_is_said() -> None:
    task = Task(network, batches, loss=lambda m, b: m(b[0]).sum() * float("nan"), name="odd")
    with pytest.raises(NumericalError, match="the loss of task 'odd' is not finite at step 6"):
        train(task)


def test_no_data_is_said() -> None:
    with pytest.raises(DataError, match="a task gave no training batches"):
        train(Task(network, lambda split, seed, epoch: []))


def test_what_exists_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    with pytest.raises(OutputError, match="exists: choose another directory"):
        train(Task(lambda seed: pytest.fail("no work"), batches), out=tmp_path)
