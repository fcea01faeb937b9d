"""Channels and neurons that are masked while a model trains, and the smaller model at the end."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur
from secateur.errors import RecipeError
from secateur.measure.flops import flops
from tests.when.runs import STEPS, attached, backward, batch, cnn, run, sgd


def channels(model: nn.Sequential) -> list[Tensor]:
    """Which channels of both convolutions are zero, by their weights alone."""
    return [model[i].weight.detach().flatten(1).abs().sum(1) == 0 for i in (0, 3)]


def check_units(model: nn.Sequential, optimizer: Any) -> list[Tensor]:
    """A channel that is gone is gone everywhere: what computes it, its normalization, what reads it, all momenta."""
    gone = channels(model)
    for (conv, norm, reader), lost in zip(((0, 1, 3), (3, 4, 8)), gone, strict=True):
        for name, index in (
            (f"{conv}.weight", lost), (f"{conv}.bias", lost), (f"{norm}.weight", lost), (f"{norm}.bias", lost),
            (f"{reader}.weight", (slice(None), lost)),
        ):  # fmt: skip
            p = model.get_parameter(name)
            assert not bool(p.detach()[index].any()), name
            assert not bool(optimizer.state[p]["momentum_buffer"][index].any()), name
    return gone


def test_gradual_structured_masks_whole_units_and_ends_smaller() -> None:
    model = cnn()
    optimizer = sgd(model)
    keys = list(model.state_dict())
    session = attached(model, "gradual-structured", optimizer)
    before, seen = [torch.zeros(12, dtype=torch.bool), torch.zeros(16, dtype=torch.bool)], set()
    for _ in run(model, optimizer, session):
        gone = check_units(model, optimizer)
        assert all(bool((new | ~old).all()) for new, old in zip(gone, before, strict=True))  # nested
        before = gone
        seen.add(tuple(int(g.sum()) for g in gone))
    assert len(seen) > 3 and list(model.state_dict()) == keys
    small = session.shrink()
    x = batch(99, True)[0]
    assert torch.allclose(small.eval()(x), model.eval()(x), atol=1e-6)
    assert small[0].out_channels == 12 - int(gone[0].sum()) and small[3].out_channels == 16 - int(gone[1].sum())
    assert flops(small, x).total <= 0.5 * flops(model, x).total
    plan = session.plan()
    assert plan.proof.proven and plan.after["flops"] <= 0.5 * plan.before["flops"]
    assert 0.4 < session.flops(x).ratio < 1


@pytest.mark.parametrize("method", ["sfp", "fpgm-soft"])
def test_soft_pruning_zeroes_filters_now_and_then_and_they_grow_back(method: str) -> None:
    model = cnn()
    optimizer = sgd(model)
    session = attached(model, method, optimizer)
    for k in range(8):
        backward(model, k, units=True)
        optimizer.step()
        if k < 7:
            session.step()
            # Momentum moves every filter again.
            assert (sum(int(g.sum()) for g in channels(model)) > 8) == (k == 3)
    moved = [model[i].weight.detach().flatten(1).clone() for i in (0, 3)]
    shifts = [model[i].bias.detach().clone() for i in (1, 4)]
    session.step()
    for w, lost in zip(moved, channels(model), strict=True):
        score = w.norm(dim=1) if method == "sfp" else torch.cdist(w, w).sum(1)
        assert bool(lost.any()) and bool(score[lost].max() <= score[~lost].min() + 1e-6)
    assert all(torch.equal(a, model[i].bias) for a, i in zip(shifts, (1, 4), strict=True))


def test_soft_pruning_becomes_hard_in_the_last_part() -> None:
    model = cnn()
    optimizer = sgd(model)
    session = attached(model, "sfp", optimizer, knobs={"driver": {"every": 4, "until": 0.7}})
    for k in run(model, optimizer, session):
        if k >= int(0.7 * STEPS):
            gone = check_units(model, optimizer)
            assert sum(int(g.sum()) for g in gone) > 8
    weights = [p.detach().clone() for p in model.parameters()]
    small = session.shrink()
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))  # nothing jumps at the end
    x = batch(99, True)[0]
    assert torch.allclose(small.eval()(x), model.eval()(x), atol=1e-6)
    assert flops(small, x).total <= 0.5 * flops(model, x).total


def test_units_that_are_masked_before_training_stay_so() -> None:
    model = cnn()
    optimizer = sgd(model)
    more = {"recovery": "none", "example": batch(0, True)[0], "target": "params 60%", "multiple": 1}
    session = secateur.attach(model, "l1-norm", optimizer=optimizer, **more)
    first = channels(model)
    for _ in run(model, optimizer, session, 0, 0):
        pass
    for k in range(3):
        backward(model, k, units=True)
        optimizer.step()
        session.step()
        assert all(torch.equal(a, b) for a, b in zip(first, check_units(model, optimizer), strict=True))
    assert any(bool(f.any()) for f in first)


def test_what_units_cannot_be() -> None:
    model = cnn()
    optimizer = sgd(model)
    x = batch(0, True)[0]
    for said, call in {
        "give inputs for it with example=": lambda: attached(model, "sfp", optimizer, example=None),
        "units take gradual, renew or once": lambda: attached(model, "sfp", optimizer, driver="regrow", knobs={}),
        "units are held zero, or free": lambda: attached(model, "sfp", optimizer, hold="dense"),
        "a training run does not show": lambda: attached(
            model, "gradual-structured", optimizer, criterion="group-fisher", knobs={}
        ),
        "a target is in params, flops, bytes": lambda: attached(model, "sfp", optimizer, target="latency to 1ms"),
        "nothing can go": lambda: attached(nn.Sequential(nn.Linear(3, 4)), "sfp", optimizer, example=torch.ones(1, 3)),
        "for prune.. and plan": lambda: attached(model, "sfp", optimizer, granularity="depth", criterion="magnitude"),
    }.items():
        with pytest.raises(RecipeError, match=said):
            call()
    assert torch.equal(model.eval()(x), cnn().eval()(x))  # a refusal changes nothing
