"""What every method that changes masks while a model trains has in common: counts, zeros, resuming, odd loops."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import secateur
from secateur import Recipe
from secateur.errors import ModelError, RecipeError
from secateur.registry import get, parts
from secateur.when.change import shared
from tests.when.runs import STEPS, UNITS, WEIGHTS, attached, backward, batch, held, mlp, net_of, run, sgd

CONSTANT = {"set", "rigl", "rigl-itop", "set-itop", "snfs", "dsr", "deep-r", "top-kast", "sr-ste", "gsm"}
NESTED = {"gmp", "global-gmp", "gradual-structured"}
METHODS = [*WEIGHTS, *UNITS]


def test_no_method_is_forgotten() -> None:
    changing = {n for n, p in parts("method").items() if p.facts["recipe"].driver != "once"}
    assert changing <= set(METHODS) | {n for n, p in parts("method").items() if getattr(p.facts["recipe"], "gate", 0)}


@pytest.mark.parametrize("method", METHODS)
def test_counts_and_zeros_after_every_step(method: str) -> None:
    model = net_of(method)
    keys, optimizer = list(model.state_dict()), sgd(model)
    session = attached(model, method, optimizer)
    total = sum(x.numel for x in session.layers)
    forgets = get("hold", session.recipe.hold).facts["state"] == "zero"
    counts, before = [], session.masks
    for _ in run(model, optimizer, session):
        masks = session.masks
        counts.append(sum(int(m.sum()) for m in masks.values()))
        if method in NESTED:
            assert not any(bool((m & ~before[n]).any()) for n, m in masks.items())
        before = masks
        if held(session) == "free":
            continue
        for layer in session.layers:
            gone = layer.from_oi(~masks[layer.name])
            state = optimizer.state[layer.stored].values() if forgets else ()
            remembered = [v for v in state if isinstance(v, Tensor) and v.shape == gone.shape]
            assert not any(bool(v[gone].any()) for v in (layer.stored.detach(), *remembered))
    assert list(model.state_dict()) == keys
    final = session.finish()
    assert all(not bool(x.weight()[~final[x.name]].any()) for x in session.layers)
    if method in UNITS:
        assert 0.3 < final.sparsity < 0.8
        return
    goal = (1 - session.recipe.sparsity) * total
    assert abs(sum(int(m.sum()) for m in final.values()) - goal) <= (16 if method == "srigl" else 3)
    if method in CONSTANT:
        assert set(counts) == {counts[0]}
    assert session.explored >= 1 - final.sparsity


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("at", [10, 12])
def test_a_resumed_run_is_the_same_run(method: str, at: int) -> None:
    model = net_of(method)
    optimizer = sgd(model)
    session = attached(model, method, optimizer)
    for k in run(model, optimizer, session):
        if k == at:
            kept = copy.deepcopy((model.state_dict(), optimizer.state_dict(), session.state_dict()))
    again = net_of(method, seed=5)
    other = sgd(again)
    resumed = attached(again, method, other)
    again.load_state_dict(kept[0])
    other.load_state_dict(kept[1])
    resumed.load_state_dict(kept[2])
    for _ in run(again, other, resumed, at):
        pass
    assert session.finish().sparsity == resumed.finish().sparsity
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert session.explored == resumed.explored
    x = batch(0, method in UNITS)[0]
    assert session.flops(x) == resumed.flops(x)


@pytest.mark.parametrize("method", METHODS)
def test_state_is_plain_data_and_no_copy_of_the_model_is_kept_without_need(method: str, tmp_path: Any) -> None:
    model = net_of(method)
    optimizer = sgd(model)
    session = attached(model, method, optimizer)
    for _ in run(model, optimizer, session, 0, 8):
        pass
    found: list[Tensor] = []

    def walk(value: Any) -> None:
        if isinstance(value, dict):
            assert all(isinstance(k, str) for k in value)
            any(walk(v) for v in value.values())
        elif isinstance(value, (list, tuple)):
            any(walk(v) for v in value)
        elif isinstance(value, Tensor):
            found.append(value)
        else:
            assert value is None or isinstance(value, (str, int, float, bool))

    walk(session.state_dict())
    wide = [t for t in found if t.dtype != torch.bool]
    remembers = {"movement": 2, "soft-movement": 2, "platon": 2}
    copies = remembers.get(method, 1 if held(session) == "dense" else 0)
    assert sum(t.numel() for t in wide) == copies * sum(x.numel for x in session.layers)


@pytest.mark.parametrize("method", METHODS)
def test_steps_that_a_scaler_skips_change_no_weight(method: str) -> None:
    """With gradients that are not finite the scaler does not call the optimizer, and the session waits."""
    model = net_of(method)
    optimizer = sgd(model)
    session = attached(model, method, optimizer)
    for k in run(model, optimizer, session, 0, 9):
        assert k
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    past = copy.deepcopy(session.state_dict()["history"])
    backward(model, 9, method in UNITS)
    for p in model.parameters():
        assert p.grad is not None
        p.grad.fill_(float("nan"))
    session.step()
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
    now = session.state_dict()["history"]
    assert all(torch.equal(x, now[n][f]) for n, mine in past.items() for f, x in mine.items() if f != "sign")
    for _ in run(model, optimizer, session, 10):
        pass
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_a_closure_makes_the_same_run(method: str) -> None:
    """Lightning makes the gradients within the optimizer's step."""
    models, sessions = [net_of(method), net_of(method)], []
    for model, closed in zip(models, (False, True), strict=True):
        optimizer = sgd(model)
        session = attached(model, method, optimizer, steps=9)
        for k in range(9):
            if closed:
                optimizer.step(lambda k=k, model=model: backward(model, k, method in UNITS))
            else:
                backward(model, k, method in UNITS)
                optimizer.step()
            session.step()
        sessions.append(session)
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))
    assert sessions[0].explored == sessions[1].explored


@pytest.mark.parametrize("method", METHODS)
def test_accumulated_clipped_autocast_and_compiled(method: str) -> None:
    units = method in UNITS
    model = net_of(method)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    session = attached(model, method, optimizer, steps=9)
    compiled = torch.compile(model, backend="eager")
    for k in range(9):
        optimizer.zero_grad()
        for part in range(2):
            x, y = batch(2 * k + part, units)
            with torch.autocast("cpu", torch.bfloat16):
                loss = nn.functional.cross_entropy(compiled(x), y) + session.penalty()
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        session.step()
    final = session.finish()
    assert all(not bool(x.weight()[~final[x.name]].any()) for x in session.layers)
    x, _ = batch(0, units)
    assert torch.equal(compiled(x), model(x))


def test_a_real_scaler() -> None:
    """Scaled gradients are unscaled before the session reads them; one step overflows and is waited out."""
    model, plain = mlp(), mlp()
    pairs = [(m, sgd(m)) for m in (model, plain)]
    sessions = [attached(m, "sr-ste", o) for m, o in pairs]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for k in range(12):
        x, y = batch(k)
        for (m, o), session in zip(pairs, sessions, strict=True):
            loss = nn.functional.cross_entropy(m(x), y) * (float("inf") if k == 5 else 1.0)
            o.zero_grad()
            if m is model:
                scaler.scale(loss).backward()
                scaler.step(o)
                scaler.update()
            elif k != 5:
                loss.backward()
                o.step()
            session.step()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    fused = mlp()
    optimizer = torch.optim.SGD(fused.parameters(), lr=0.1, fused=True)
    session = attached(fused, "sr-ste", optimizer)
    scaler.scale(nn.functional.cross_entropy(fused(batch(0)[0]), batch(0)[1])).backward()
    with pytest.raises(ModelError, match="unscale_"):
        scaler.step(optimizer)
    assert session.at == 0


@settings(max_examples=60)
@given(st.lists(st.tuples(st.floats(0, 1e6), st.integers(0, 50)), min_size=1, max_size=9), st.integers(0, 200))
def test_shares_are_exact(parts: list[tuple[float, int]], total: int) -> None:
    worth, rooms = [w for w, _ in parts], [r for _, r in parts]
    found = shared(total, worth, rooms)
    assert sum(found) == min(total, sum(rooms)) and all(0 <= n <= r for n, r in zip(found, rooms, strict=True))
    if total <= min(rooms) and sum(worth) > 0:
        assert all(abs(n - total * w / sum(worth)) < 1 + 1e-6 for n, w in zip(found, worth, strict=True))


def test_what_cannot_be_is_refused() -> None:
    model = mlp()
    optimizer, plain = sgd(model), torch.optim.SGD(model.parameters(), lr=0.1)
    for said, call in {
        "SGD with momentum": lambda: attached(model, "snfs", plain),
        "pass optimizer=": lambda: attached(model, "dpf", None),
        "weight_decay, or set hold.fade": lambda: attached(model, "gsm", plain, knobs={"hold": {"fade": 0.0}}),
        "choose granularity row": lambda: attached(model, "srigl", optimizer, granularity="element"),
        "choose element or block": lambda: attached(model, "dsr", optimizer, granularity="row"),
        "only a training run shows": lambda: secateur.prune(model, criterion="movement", sparsity=0.5),
        "only steps of training show": lambda: secateur.attach(model, "magnitude", criterion="movement"),
        "are for units of the whole model": lambda: attached(model, "gmp", optimizer, example=batch(0)[0]),
        "not 'sideways'": lambda: attached(model, "rigl", optimizer, knobs={"driver": {"drop": "sideways"}}),
        "use secateur.attach": lambda: secateur.prune(model, "movement", sparsity=0.5),
    }.items():
        with pytest.raises(RecipeError, match=said):
            call()
    session = attached(model, "dpf", optimizer)
    backward(model, 0)
    optimizer.step()
    with pytest.raises(ModelError, match="stepped twice"):
        optimizer.step()
    with pytest.raises(RecipeError, match="nothing is smaller"):
        session.shrink()


def test_a_hold_is_an_axis_like_others() -> None:
    """RigL over dense weights: what comes back has the value that it had, and the recipe says so."""
    recipe = Recipe.of("rigl", hold="dense", sparsity=0.5)
    assert Recipe.load(recipe.dump()) == recipe and recipe.digest != Recipe.of("rigl", sparsity=0.5).digest
    model = mlp()
    start = model[0].weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    session = secateur.attach(model, recipe, optimizer=optimizer, steps=8, knobs={"driver": {"every": 2}})
    for _ in run(model, optimizer, session, 0, 8):
        mask = session.masks["0"]
        assert torch.equal(model[0].weight.detach(), start * mask)
    assert session.explored > 0.5


def test_finish_leaves_the_optimizer_as_it_was() -> None:
    model = mlp()
    optimizer = sgd(model)
    with attached(model, "movement", optimizer, steps=STEPS) as session:
        for _ in run(model, optimizer, session, 0, 3):
            pass
    weights = model[0].weight.detach().clone()
    backward(model, 3)
    optimizer.step()
    assert not torch.equal(model[0].weight, weights) and not optimizer._optimizer_step_pre_hooks


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(sorted(CONSTANT - {"sr-ste", "gsm"})), st.floats(0.1, 0.97), st.integers(1, 5),
    st.lists(st.integers(2, 12), min_size=2, max_size=4), st.integers(0, 5),
)  # fmt: skip
def test_the_number_of_weights_is_exact_in_every_step(
    method: str, sparsity: float, every: int, sizes: list[int], seed: int
) -> None:
    """Whatever the shapes, the sparsity and the time between two changes; gsm has no mask before its first change."""
    torch.manual_seed(seed)
    model = nn.Sequential(*[nn.Linear(a, b) for a, b in zip([5, *sizes], sizes, strict=False)])
    optimizer = sgd(model)
    total = sum(m.weight.numel() for m in model)
    session = secateur.attach(
        model, method, optimizer=optimizer, steps=8, sparsity=sparsity, seed=seed, knobs={"driver": {"every": every}}
    )
    counts = set()
    for _ in range(8):
        optimizer.zero_grad()
        model(torch.randn(6, 5)).square().mean().backward()
        optimizer.step()
        session.step()
        counts.add(sum(int(m.sum()) for m in session.masks.values()))
    final = session.finish()
    assert len(counts) == 1 and abs(counts.pop() - (1 - sparsity) * total) <= len(sizes)
    assert sum(int(m.count_nonzero()) for m in (x.weight() for x in session.layers)) <= sum(
        int(m.sum()) for m in final.values()
    )
