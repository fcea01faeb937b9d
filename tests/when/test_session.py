"""Masks through a training run: counts, zeros, the brute-force update, resuming, several processes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import secateur
from secateur import attach, drivers
from secateur.errors import DataError, ModelError, RecipeError
from secateur.registry import parts

METHODS = ("random-erk", "gmp", "global-gmp", "set", "rigl", "granet")
STEPS = 40
OFTEN = {"every": 5}


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 24), nn.ReLU(), nn.Linear(24, 4)
    )


def batch(k: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(k)
    return torch.randn(8, 3, 6, 6, generator=generator), torch.randint(4, (8,), generator=generator)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2, nesterov=True)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, amsgrad=True)


def knobs(method: str, **more: Any) -> dict[str, Any]:
    return {} if method == "random-erk" else {"knobs": {"driver": {**OFTEN, **more}}}


def one(model: nn.Module, optimizer: torch.optim.Optimizer, k: int) -> None:
    x, y = batch(k)
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()


def check_zeros(session: secateur.Session, optimizer: torch.optim.Optimizer) -> None:
    """What is gone is zero in the weights and in all that the optimizer remembers of them."""
    masks = session.masks
    for layer in session.layers:
        gone = layer.from_oi(~masks[layer.name])
        whole = getattr(layer.module, layer.parameter)
        states = [v for v in optimizer.state[whole].values() if isinstance(v, Tensor) and v.shape == whole.shape]
        assert states and not any(bool(v[gone].any()) for v in (whole.detach(), *states))


@pytest.mark.parametrize("make", [sgd, adam])
@pytest.mark.parametrize("method", METHODS)
def test_counts_and_zeros_after_every_step(method: str, make: Callable[[nn.Module], Any]) -> None:
    model = net()
    keys, optimizer = list(model.state_dict()), make(model)
    total = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    before: dict[str, Tensor] = {}
    with attach(model, method, optimizer=optimizer, sparsity=0.8, steps=STEPS, **knobs(method)) as session:
        gradual = method in ("gmp", "global-gmp", "granet")
        changed = 0
        for k in range(STEPS):
            one(model, optimizer, k)
            session.step()
            check_zeros(session, optimizer)
            masks = {name: session.masks[name] for name in session.masks}
            kept = sum(int(m.sum()) for m in masks.values())
            if not gradual:
                assert abs(kept - 0.2 * total) <= len(masks)  # each layer rounds
                assert not before or all(int(m.sum()) == int(before[n].sum()) for n, m in masks.items())
            if method in ("gmp", "global-gmp") and before:
                assert not any(bool((m & ~before[n]).any()) for n, m in masks.items())  # nested
            changed += bool(before) and any(not torch.equal(m, before[n]) for n, m in masks.items())
            before = masks
        assert abs(kept - 0.2 * total) <= len(masks) and math.isclose(session.sparsity, 1 - kept / total)
        expected = {"random-erk": 0, "gmp": 6, "global-gmp": 6, "set": 7, "rigl": 5, "granet": 6}[method]
        assert changed == expected
    assert list(model.state_dict()) == keys and session.penalty() == 0
    with pytest.raises(ModelError, match="finished"):
        session.step()


@pytest.mark.parametrize("granularity, kept", [("row", None), ("2:4", 0.5), ("block(2,2)", None)])
@pytest.mark.parametrize("method", ["gmp", "rigl", "granet"])
def test_granularities(method: str, granularity: str, kept: float | None) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4))
    optimizer = sgd(model)
    sparsity = {} if kept else {"sparsity": 0.75}
    more = {"allocation": "uniform", "granularity": granularity, **sparsity, **knobs(method)}
    session = attach(model, method, optimizer=optimizer, steps=STEPS, **more)
    for k in range(STEPS):
        optimizer.zero_grad()
        model(torch.randn(8, 16, generator=torch.Generator().manual_seed(k))).square().sum().backward()
        optimizer.step()
        session.step()
    for mask in session.finish().values():
        if granularity == "2:4":
            assert bool((mask.view(-1, 4).sum(1) == 2).all())
        elif granularity == "row":
            assert bool((mask.sum(1) == round(mask.shape[1] * 0.25)).all())
        else:
            blocks = mask.view(mask.shape[0] // 2, 2, -1, 2).transpose(1, 2).flatten(2)
            assert bool((blocks.all(-1) | ~blocks.any(-1)).all()) and int(mask.sum()) == round(mask.numel() / 4)


def test_an_update_of_rigl_by_brute_force() -> None:
    """The smallest of what is there goes; of all that is not there then, the largest gradients come, with zeros."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    driver = {"every": 3, "fraction": 0.4, "until": 0.5}
    session = attach(
        model, "rigl", optimizer=optimizer, sparsity=0.7, steps=20, allocation="uniform", knobs={"driver": driver}
    )
    for k in range(3):
        old = {name: session.masks[name] for name in session.masks}
        one(model, optimizer, k)
        if k == 2:
            weights = {x.name: x.weight().clone().masked_fill_(~old[x.name], 0) for x in session.layers}
            gradients = {x.name: x.gradient().clone() for x in session.layers}
        session.step()
    share = 0.4 * 0.5 * (1 + math.cos(math.pi * 3 / 10))
    for layer in session.layers:
        name, kept = layer.name, int(old[layer.name].sum())
        out = min(round(share * kept), old[name].numel() - kept)
        there = [(float(w), i) for i, w in enumerate(weights[name].abs().view(-1)) if bool(old[name].view(-1)[i])]
        stay = {i for _, i in sorted(there, key=lambda p: (-p[0], p[1]))[: kept - out]}
        rest = [(float(g), i) for i, g in enumerate(gradients[name].abs().view(-1)) if i not in stay]
        grown = {i for _, i in sorted(rest, key=lambda p: (-p[0], p[1]))[:out]}
        new = session.masks[name].view(-1)
        assert {i for i in range(len(new)) if bool(new[i])} == stay | grown and out > 0
        fresh = torch.tensor(sorted(grown - {i for _, i in there}))
        assert not bool(layer.weight().reshape(-1)[fresh].any())


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_is_the_same_run(method: str) -> None:
    model = net()
    optimizer = sgd(model)
    session = attach(model, method, optimizer=optimizer, sparsity=0.8, steps=STEPS, **knobs(method))
    for k in range(STEPS):
        if k == 17:
            kept = copy.deepcopy((model.state_dict(), optimizer.state_dict(), session.state_dict()))
        one(model, optimizer, k)
        session.step()
    again = net(seed=5)
    other = sgd(again)
    resumed = attach(again, method, optimizer=other, sparsity=0.8, steps=STEPS, **knobs(method))
    again.load_state_dict(kept[0])
    other.load_state_dict(kept[1])
    resumed.load_state_dict(kept[2])
    for k in range(17, STEPS):
        one(again, other, k)
        resumed.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert all(torch.equal(session.masks[n], resumed.masks[n]) for n in session.masks)
    for wrong, said in ((attach(net(), "gmp", sparsity=0.5, steps=9), "another recipe"),):
        with pytest.raises(ModelError, match=said):
            wrong.load_state_dict(kept[2])


def test_methods_before_training_hold_their_mask() -> None:
    model = net()
    data = [batch(k) for k in range(2)]

    def loss(m: nn.Module, b: Any) -> Tensor:
        return nn.functional.cross_entropy(m(b[0]), b[1])

    twin = copy.deepcopy(model)
    masks = secateur.prune(twin, "snip", sparsity=0.9, data=data, loss=loss).masks
    optimizer = adam(model)
    with attach(model, "snip", optimizer=optimizer, sparsity=0.9, data=data, loss=loss) as session:
        for k in range(5):
            one(model, optimizer, k)
            session.step()
            check_zeros(session, optimizer)
    assert all(torch.equal(masks[n], session.masks[n]) for n in masks)


def test_steps_whose_gradients_are_not_finite_are_waited_out() -> None:
    """A scaler of mixed precision skips them as well."""
    model = net()
    optimizer = sgd(model)
    session = attach(model, "rigl", optimizer=optimizer, sparsity=0.8, steps=STEPS, knobs={"driver": OFTEN})
    for k in range(6):
        old = {n: session.masks[n] for n in session.masks}
        x, y = batch(k)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        if k == 4:
            model[0].weight.grad[0, 0, 0, 0] = float("inf")
        else:
            optimizer.step()
        session.step()
        same = all(torch.equal(old[n], session.masks[n]) for n in old)
        assert same == (k != 5)


def test_accumulated_clipped_and_autocast_gradients() -> None:
    model = net()
    optimizer = adam(model)
    session = attach(model, "granet", optimizer=optimizer, sparsity=0.8, steps=10, knobs={"driver": {"every": 2}})
    for k in range(10):
        optimizer.zero_grad()
        for part in range(2):
            x, y = batch(2 * k + part)
            with torch.autocast("cpu", torch.bfloat16):
                loss = nn.functional.cross_entropy(model(x), y) + session.penalty()
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        session.step()
        check_zeros(session, optimizer)
    assert abs(session.sparsity - 0.8) < 0.01


def test_a_compiled_model_sees_the_masks() -> None:
    model = net()
    compiled = torch.compile(model, backend="eager")
    optimizer = sgd(model)
    session = attach(model, "gmp", optimizer=optimizer, sparsity=0.8, steps=10, knobs={"driver": {"every": 2}})
    for k in range(10):
        one(compiled, optimizer, k)
        session.step()
    x, _ = batch(0)
    assert torch.equal(compiled(x), model(x)) and abs(session.sparsity - 0.8) < 0.01


def test_bad_input_is_one_sentence() -> None:
    model = net()
    for said, call in {
        "say how long it is": lambda: attach(model, "gmp", sparsity=0.5),
        "are for prune": lambda: attach(model, "sparsegpt", sparsity=0.5, steps=5),
        "which a training run does not show": lambda: attach(model, "gmp", criterion="wanda", sparsity=0.5, steps=5),
        "give inputs for it with example=": lambda: attach(model, "magnitude", granularity="coupled", sparsity=0.5),
        "use secateur.attach": lambda: secateur.prune(model, "rigl", sparsity=0.5),
        "passed|pass --data": lambda: attach(model, "snip", sparsity=0.5),
        "no knob 'often'": lambda: attach(model, "gmp", steps=5, knobs={"driver": {"often": 1}}),
        "at least 1": lambda: attach(model, "gmp", steps=5, knobs={"driver": {"every": 0}}),
        "begin first": lambda: attach(model, "gmp", steps=5, knobs={"driver": {"begin": 0.9, "end": 0.1}}),
        "cosine or none": lambda: attach(model, "rigl", steps=5, knobs={"driver": {"fraction": 2.0}}),
        "not -1": lambda: attach(model, "gmp", steps=-1),
    }.items():
        with pytest.raises(RecipeError, match=said):
            call()
    optimizer = sgd(model)
    session = attach(model, "rigl", optimizer=optimizer, sparsity=0.5, steps=2, knobs={"driver": {"every": 1}})
    with pytest.raises(DataError, match="before zero_grad"):
        session.step()
    short = attach(net(), "gmp", sparsity=0.5, steps=1)
    short.step()
    with pytest.raises(ModelError, match="step 2 of a run of 1"):
        short.step()


@given(
    st.sampled_from([n for n, d in parts("driver").items() if n != "once" and d.needs == ("step", "steps")]),
    st.integers(1, 300), st.integers(1, 50), st.floats(0.1, 1.0),
)  # fmt: skip
def test_drivers_keep_their_promises(name: str, steps: int, every: int, end: float) -> None:
    """Progress never falls and arrives; what is exchanged is a share, and there is an end to it."""
    span = {"end": end} if name.startswith("gradual") else {"until": end}
    found = [drivers_at(name, s, steps, every=every, **span) for s in range(steps + 1)]
    progress = [u.progress for u in found if u is not None]
    assert progress == sorted(progress) and progress[-1] == 1.0
    assert all(0 <= u.swap <= 1 for u in found if u is not None)
    assert not any(u is not None for u in found[math.ceil(end * steps) + 1 :])


def drivers_at(name: str, step: int, steps: int, **given: Any) -> drivers.Update | None:
    found: drivers.Update | None = parts("driver")[name]({"step": step, "steps": steps}, **given)
    return found


#: A method of each kind of change and hold; together with a small network for them.
SHARED = ("rigl", "snfs", "dsr", "srigl", "sr-ste", "movement", "platon", "gsm", "deep-r", "gmp")


def _session(method: str, model: nn.Module, optimizer: Any) -> secateur.Session:
    driven = {"movement", "platon", "gsm", "deep-r", "sr-ste"}
    more: dict[str, Any] = {} if method in driven else {"knobs": {"driver": OFTEN}}
    more |= {"skip": "0"} if method == "sr-ste" else {"sparsity": 0.8}
    return attach(model, method, optimizer=optimizer, steps=12, **more)


def _trained(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    for method in SHARED:
        model = net().double()  # the order of sums then decides no rank
        shared = nn.parallel.DistributedDataParallel(model)
        optimizer = sgd(model)
        session = _session(method, model, optimizer)
        for k in range(12):
            x, y = batch(k)
            part = slice(rank * 4, rank * 4 + 4)
            optimizer.zero_grad()
            nn.functional.cross_entropy(shared(x[part].double()), y[part]).backward()
            optimizer.step()
            session.step()
        session.masks.save(Path(folder, f"{method}.{rank}.safetensors"))
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch has no gloo here")
def test_two_processes_are_one_on_the_union_of_the_data(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_trained, (2, str(tmp_path)), nprocs=2)
    for method in SHARED:
        model = net().double()
        optimizer = sgd(model)
        session = _session(method, model, optimizer)
        for k in range(12):
            x, y = batch(k)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x.double()), y).backward()
            optimizer.step()
            session.step()
        first, second = (secateur.Masks.load(tmp_path / f"{method}.{rank}.safetensors") for rank in range(2))
        for name, mask in session.masks.items():
            assert torch.equal(first[name], second[name]), method
            assert torch.equal(first[name], mask), method
