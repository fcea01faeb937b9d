"""Recoveries that train: masks hold at every step, losses against plain formulas, where a rewinding goes back to."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.tasks.conftest import _one_thread  # noqa: F401  each test on one thread
from tests.tasks.tiny import TASK, batches, network
from torch import Tensor, nn

from secateur import Masks, Recipe, prune, train
from secateur.errors import RecipeError
from secateur.layers import find_layers
from secateur.measure.flops import effective_flops
from secateur.recover.distill import chosen_layers, soft, taught
from secateur.registry import get
from secateur.tasks import fit
from secateur.tasks.loop import Leg
from secateur.when.healing import Healing, fresh_model

PER = 6  # steps of an epoch


def healing(sparsity: float = 0.7, **more: Any) -> Healing:
    """A dense run of two epochs, pruned, about to be healed."""
    model = fresh_model(TASK, 0)
    made = fit(TASK, model, Leg(2, keep=0.5))
    masks = prune(model, "magnitude", sparsity=sparsity).masks
    dense = fresh_model(TASK, 0)
    fit(TASK, dense, Leg(2))
    return Healing(
        TASK, model, dict(masks), 2.0, 0, lambda epochs, **f: Leg(epochs, seed=0, round=1, **f), lambda: dense,
        lambda to: made.kept or {}, **more,
    )  # fmt: skip


def zeros(run: Healing) -> None:
    for layer in find_layers(run.model)[0]:
        assert not bool((layer.weight() != 0)[~run.kept[layer.name]].any())


@pytest.mark.parametrize(
    ("name", "knobs"),
    [
        ("finetune", {}),
        ("rewind", {"to": 0.5}),
        ("rewind", {"to": 0.5, "weights": False}),
        ("scratch", {}),
        ("distill", {"attention": 1.0, "layers": "0"}),
    ],
    ids=str,
)
def test_masks_hold_at_every_step(name: str, knobs: dict[str, Any]) -> None:
    seen = []
    run = healing()

    def look(done: int, of: int) -> None:
        zeros(run)
        seen.append(done)

    run.progress = look
    part = get("recovery", name)
    part.function(run, **part.knobs_with(knobs))
    assert seen and seen[-1] == len(seen)
    zeros(run)
    assert all(run.model.get_submodule(n).weight.count_nonzero() == m.sum() for n, m in run.kept.items())


def test_what_is_rewound_to_are_the_weights_of_that_step() -> None:
    class Stop(Exception):
        pass

    early = fresh_model(TASK, 0)

    def stop(done: int, of: int) -> None:
        if done == PER:
            raise Stop

    with pytest.raises(Stop):
        fit(TASK, early, Leg(2), progress=stop)
    run = healing()
    masks = Masks(run.kept)
    run.rewind(0.5)
    masks.apply(early)
    state = early.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in run.model.state_dict().items())
    assert bool(state["1.running_mean"].any())  # statistics go back too, and are not those of the start


def test_rewound_to_the_start_are_the_initial_weights() -> None:
    made = train(TASK, "lth", sparsity=0.5, steps=1, epochs=1)
    start = fresh_model(TASK, 0)
    Masks(made.masks).apply(start)
    assert made.run["rounds"][0]["untrained"] == TASK.measure(start)  # a supermask, before any training


def test_where_the_schedule_goes_on() -> None:
    """Rewinding to half of the run trains its second half, at that half's learning rates."""
    run = healing()
    get("recovery", "rewind").function(run, to=0.5)
    assert [row["step"] for row in run.rows] == [2 * PER]
    assert run.rows[-1]["rate"] == pytest.approx(0.1 * TASK.schedule((2 * PER - 1) / (2 * PER)))
    other = healing()
    get("recovery", "finetune").function(other, length=0.5, rate=0.01)
    assert other.rows[-1]["rate"] == pytest.approx(0.001 * TASK.schedule((PER - 1) / PER))


def test_scratch_takes_other_weights_and_as_many_epochs_as_its_budget() -> None:
    run = healing()
    run.fresh(7)
    new = fresh_model(TASK, 7)
    Masks(run.kept).apply(new)
    assert all(torch.equal(v, new.state_dict()[k]) for k, v in run.model.state_dict().items())
    x = torch.zeros(1, 1, 6, 6)
    share = effective_flops(run.model, x).total / effective_flops(network(0), x).total
    assert run.cost() == pytest.approx(share) and 0.25 < share < 0.5
    get("recovery", "scratch").function(run, budget="flops")
    assert run.rows[-1]["step"] == 2 * 2 * PER  # twice as long at most
    with pytest.raises(RecipeError, match="budget is epochs or flops, not 'steps'"):
        get("recovery", "scratch").function(run, budget="steps")


@given(st.integers(0, 1000), st.floats(0.5, 8.0))
def test_soft_targets_are_the_divergence(seed: int, temperature: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    own, dense = torch.randn(2, 5, 4, dtype=torch.float64, generator=generator) * 3
    p, q = (dense / temperature).softmax(-1), (own / temperature).softmax(-1)
    plain = temperature**2 * sum(float((a * (a / b).log()).sum()) for a, b in zip(p, q, strict=True)) / 5
    assert float(soft(own, dense, temperature)) == pytest.approx(plain, rel=1e-9, abs=1e-12)
    assert float(soft(own, dense, temperature)) >= -1e-12


def test_soft_targets_in_half_precision_and_with_masked_classes() -> None:
    own, dense = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = soft(own, dense, 2.0)
    assert found.dtype == torch.float32 and torch.equal(found, soft(own.float(), dense.float(), 2.0))
    own, dense = own.float().requires_grad_(), dense.float()
    dense[:, 3:5] = -torch.inf
    lost = soft(own, dense, 1.0)
    lost.backward()
    lost = lost.detach()
    assert own.grad is not None and bool(own.grad.isfinite().all()) and float(lost) > 0
    q, p = dense.softmax(-1), own.detach().softmax(-1)
    there = q > 0
    assert float(lost) == pytest.approx(float((q[there] * (q[there] / p[there]).log()).sum()) / 3, rel=1e-5)


def test_the_whole_loss_of_distillation() -> None:
    run = healing()
    dense = run.teacher()
    dense.zero_grad()
    x, y = next(batches("train"))
    own = run.model.eval()
    hidden, other = (nn.Sequential(*m[:3])(x) for m in (own, dense))
    logits, targets = own(x), dense(x)
    cross = nn.functional.cross_entropy(logits, y)
    kl = nn.functional.kl_div(
        (logits / 2).log_softmax(-1), (targets / 2).log_softmax(-1), reduction="batchmean", log_target=True
    )
    relative = (hidden - other).square().sum() / other.square().sum()
    maps = [nn.functional.normalize(h.pow(2).sum(1).flatten(1), dim=1) for h in (hidden, other)]
    apart = (maps[0] - maps[1]).pow(2).sum(1).mean()
    loss = taught(run, 0.25, 2.0, 0.5, 3.0, "2")
    whole = loss(own, (x, y))
    assert torch.allclose(whole, 0.75 * cross + 0.25 * 4 * kl + 0.5 * relative + 3 * apart, rtol=1e-5)
    whole.backward()
    assert own[0].weight.grad is not None and dense[0].weight.grad is None
    assert not own[2]._forward_hooks and not dense[2]._forward_hooks  # nothing is left behind
    assert torch.allclose(taught(run, 0.0, 2.0, 0.0, 0.0, "")(own, (x, y)), cross)


def test_layers_that_are_compared() -> None:
    blocks = nn.ModuleDict({"body": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]), "head": nn.Linear(2, 2)})
    assert chosen_layers(blocks, "") == ["body.0", "body.1"]
    stages = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1)), nn.ReLU())
    assert chosen_layers(stages, "") == ["1"]
    with pytest.raises(RecipeError, match="no module is named 'x'"):
        chosen_layers(stages, "x")
    with pytest.raises(RecipeError, match="no repeated blocks"):
        chosen_layers(nn.Sequential(nn.Linear(1, 1)), "")


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (partial(prune, nn.Linear(4, 4), "magnitude-finetune"), "give a task to secateur.train"),
        (lambda: healing().fit(0.0), "a run takes more than no time"),
        (lambda: train(TASK, "lth", knobs={"recovery": {"to": 1.5}}), r"to is a share of the dense run in \[0, 1\)"),
        (lambda: train(TASK, "lth", model=network(0)), "goes back in the dense run, and there is none here"),
        (lambda: train(TASK, "magnitude-distill", knobs={"recovery": {"logits": 2}}), "logits is in"),
    ],
)  # fmt: skip
def test_sentences(call: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        call()


class TestLora:
    """Low-rank adapters on the masked layers, with peft."""

    @pytest.fixture(autouse=True)
    def _needs_peft(self) -> None:
        pytest.importorskip("peft", reason="peft is not installed")

    @pytest.mark.filterwarnings("ignore")
    def test_zeros_stay_and_merging_changes_nothing(self) -> None:
        run = healing()
        before = {k: v.clone() for k, v in run.model.state_dict().items()}
        seen: list[Tensor] = []
        x = next(batches("test"))[0]

        def look(done: int, of: int) -> None:
            if done == of:
                with torch.no_grad():
                    seen.append(run.model.eval()(x))

        run.progress = look
        part = get("recovery", "lora")
        part.function(run, **part.knobs_with({"rank": 2}))
        zeros(run)
        after = run.model.state_dict()
        assert after.keys() == before.keys()
        assert torch.equal(after["0.weight"], before["0.weight"])  # no linear layer
        assert not torch.equal(after["5.weight"], before["5.weight"])
        with torch.no_grad():
            assert torch.allclose(run.model.eval()(x), seen[0], atol=1e-6)
        assert all(p.requires_grad for p in run.model.parameters())
        delta = after["5.weight"] - before["5.weight"]
        assert bool(delta[run.kept["5"]].any()) and math.isfinite(run.rows[-1]["loss"])

    @pytest.mark.filterwarnings("ignore")
    def test_as_a_recovery_of_a_recipe(self) -> None:
        made = train(TASK, Recipe(sparsity=0.5), recovery="lora", epochs=0.5, when="after")
        assert made.sparsity == pytest.approx(0.5, abs=0.02)
        with pytest.raises(RecipeError, match="rank is at least 1"):
            train(TASK, Recipe(sparsity=0.5), recovery="lora", epochs=0.5, knobs={"recovery": {"rank": 0}})


def test_lora_without_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(RecipeError, match="recovery 'lora' needs the package peft: pip install peft"):
        get("recovery", "lora").function(healing())
