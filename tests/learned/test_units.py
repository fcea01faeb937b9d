"""Penalties and gates on units of the whole model: what they look at, and the smaller model that they lead to."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur
from secateur import Recipe, attach
from secateur.errors import ModelError, RecipeError
from secateur.layers import find_layers
from secateur.structured import plan_zeros
from secateur.when.pools import MatrixPool, find_units, scale_pools

STEPS = 20


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16),
        nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 5),
    )  # fmt: skip


def batch(k: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(k)
    return torch.randn(8, 3, 6, 6, generator=generator), torch.randint(5, (8,), generator=generator)


def trained(method: str, steps: int = STEPS, adam: bool = False, **axes: Any) -> tuple[nn.Module, secateur.Session]:
    model = net()
    optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    if adam:
        optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    session = attach(model, method, optimizer=optimizer, steps=steps, example=batch(0)[0], **axes)
    for k in range(steps):
        x, y = batch(k)
        optimizer.zero_grad()
        (nn.functional.cross_entropy(model(x), y) + session.penalty()).backward()
        optimizer.step()
        session.step()
    session.finish()
    return model, session


def zero_channels(model: nn.Module) -> list[int]:
    """Channels of both convolutions, and neurons, that give zero for every input."""
    dead = []
    for conv, norm in (("0", "1"), ("3", "4")):
        parts = [*model.get_submodule(conv).parameters(), *model.get_submodule(norm).parameters()]
        alive = torch.stack([p.detach().flatten(1).any(1) if p.dim() > 1 else p.detach() != 0 for p in parts])
        dead.append(int((~alive.any(0)).sum()))
    linear = model.get_submodule("8")
    dead.append(int((~linear.weight.any(1) & (linear.bias == 0)).sum()))
    return dead


def test_pools_are_the_units_of_the_dependency_analysis() -> None:
    """A channel's row: its filter, then what reads it; and all that makes it: filter, bias, scale, shift."""
    model = net()
    units = find_units(model, Recipe.of("group-lasso"), batch(0)[0])
    by_name = {p.name: (p, m) for p, m in zip(units.pools, units.makers, strict=True)}
    assert set(by_name) == {"0.weight:0", "3.weight:0", "8.weight:0"}
    pool, maker = by_name["3.weight:0"]
    rows, makers = pool.read(), maker.read()
    assert rows.shape == (1, 16, 16 * 9 + 4 * 16) and makers.shape == (1, 16, 16 * 9 + 3)
    for k in range(16):
        reads = model[8].weight.view(16, 16, 4)[:, k]  # flattened: channel k is columns 4k to 4k + 3
        both = torch.cat([model[3].weight[k].flatten(), reads.t().flatten()])
        assert torch.equal(rows[0, k].sort().values, both.sort().values)
        rest = torch.stack([model[3].bias[k], model[4].weight[k], model[4].bias[k]])
        expected = torch.cat([model[3].weight[k].flatten(), rest])
        assert torch.equal(makers[0, k].sort().values, expected.sort().values)
    alone = {p.name: p for p in find_units(model, Recipe.of("greg"), batch(0)[0]).pools}  # granularity filter
    assert torch.equal(alone["3.weight:0"].read()[0], model[3].weight.flatten(1))


def test_what_is_read_is_written_and_has_gradients() -> None:
    model = net()
    units = find_units(model, Recipe.of("group-lasso"), batch(0)[0])
    matrix = MatrixPool.of(find_layers(net())[0][1], secateur.granularity.parse("2:4"))
    for pool in (*units.pools, *units.makers, *scale_pools(model, "slimming"), matrix):
        x = pool.read().detach().clone()
        pool.write(2 * x + 1)
        assert torch.allclose(pool.read(), 2 * x + 1)
        pool.read().square().sum().backward()
        for p in pool.parameters:
            assert p.grad is not None and torch.allclose(p.grad, torch.where(p.grad != 0, 2 * p.detach(), 0.0))
            p.grad = None


def test_the_group_lasso_of_a_model_by_a_loop() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    knobs = {"penalty": {"strength": 0.01}}
    session = attach(model, "group-lasso", optimizer=optimizer, steps=5, example=batch(0)[0], knobs=knobs)
    found, expected = session.penalty(), 0.0
    conv, after = model[0].weight, model[3].weight
    for k in range(16):
        expected += float((conv[k].square().sum() + after[:, k].square().sum()).detach().sqrt()) * (27 + 144) ** 0.5
        both = model[3].weight[k].square().sum() + model[8].weight.view(16, 16, 4)[:, k].square().sum()
        expected += float(both.detach().sqrt()) * (144 + 64) ** 0.5
        both = model[8].weight[k].square().sum() + model[10].weight[:, k].square().sum()
        expected += float(both.detach().sqrt()) * (64 + 5) ** 0.5
    assert found.item() == pytest.approx(0.01 * expected, rel=1e-5)


def test_hesso_leaves_zero_invariant_groups_that_plan_takes_exactly() -> None:
    """By count; the smaller model computes what the trained one does."""
    model, session = trained("hesso", sparsity=0.6)
    model.eval()
    assert session.sparsity == 0.0 and not hasattr(model[0], "parametrizations")
    plan = secateur.plan(model, "hesso", example=batch(0)[0], target="params 60%", recovery="none")
    gone = [f.units - f.kept for f in plan.families if not f.reason]
    assert zero_channels(model) == gone and sum(gone) > 12
    x, _ = batch(99)
    assert torch.allclose(plan.shrink()(x), model(x), atol=1e-5)


@pytest.mark.parametrize("target", [None, "flops 50%"])
def test_a_session_of_gates_shrinks_to_what_they_left(target: str | None) -> None:
    """Exactly the closed units go, within the target, and the outputs stay."""
    model, session = trained("l0-units", sparsity=0.4, adam=True, steps=24, target=target, multiple=1)
    plan = session.plan()
    small, x = session.shrink(), batch(99)[0]
    model.eval(), small.eval()
    gone = [f.units - f.kept for f in plan.families if not f.reason]
    assert gone == zero_channels(model) and sum(gone) > 4
    counted, share = ("params", 0.6) if target is None else ("flops", 0.5)
    assert 0.7 * share * plan.before[counted] < plan.after[counted] <= share * plan.before[counted]
    assert torch.allclose(small(x), model(x), atol=1e-5)
    assert not any("parametrizations" in n for n in small.state_dict())


def test_what_closed_nothing_is_not_cut() -> None:
    model, x = net(), batch(0)[0]
    with pytest.raises(ModelError, match="no unit of this model is zero"):
        plan_zeros(model, Recipe.of("l0-units"), target="params 50%", example=x)
    _, session = trained("group-lasso")
    with pytest.raises(RecipeError, match=r"finish, then secateur.plan\(model"):
        session.shrink()


def test_l0_gates_of_units_leave_a_model_that_plan_makes_smaller() -> None:
    model, session = trained("l0-units", sparsity=0.6, adam=True, steps=24)
    model.eval()
    plan = secateur.plan(model, "group-norm", example=batch(0)[0], target="params 60%", recovery="none")
    gone = [f.units - f.kept for f in plan.families if not f.reason]
    dead = zero_channels(model)
    assert sum(dead) > 12 and all(d >= g - 8 for d, g in zip(dead, gone, strict=True))
    keeps = find_units(net(), session.recipe, batch(0)[0]).keeps
    assert sum(dead) == sum(16 - round(k * 16) for k in keeps.values())
    before = copy.deepcopy(model)
    x, _ = batch(99)
    assert torch.equal(before(x), model(x)) and list(before.state_dict()) == list(net().state_dict())


def test_oto_zeroes_chosen_groups_for_good() -> None:
    model, _ = trained("oto", sparsity=0.6, steps=24, knobs={"penalty": {"strength": 0.3, "epsilon": 0.9}})
    assert sum(zero_channels(model)) > 8


def test_greg_fades_the_chosen_filters_and_nothing_else() -> None:
    model, _ = trained("greg", sparsity=0.6, steps=30, knobs={"penalty": {"rise": 0.4, "every": 1, "ceiling": 5.0}})
    norms = model[3].weight.detach().flatten(1).norm(dim=1).sort().values
    units = find_units(net(), Recipe.of("greg", sparsity=0.6), batch(0)[0])
    count = 16 - round(16 * units.keeps["3.weight:0"])
    assert count >= 4 and float(norms[count - 1]) < 0.3 * float(norms[count])


@pytest.mark.parametrize("method", ["slimming", "ista-bn"])
def test_scales_shrink_and_rank_the_channels(method: str) -> None:
    strength = {"slimming": 0.05, "ista-bn": 0.3}[method]
    model, _ = trained(method, sparsity=0.5, steps=20, knobs={"penalty": {"strength": strength}})
    free, _ = trained(method, sparsity=0.5, steps=20, knobs={"penalty": {"strength": 0.0}})
    size = [float(sum(m[k].weight.detach().abs().sum() for k in (1, 4))) for m in (model, free)]
    assert size[0] < 0.8 * size[1]
    plan = secateur.plan(model, method, example=batch(0)[0], target="params 40%", recovery="none")
    for conv, norm in ((0, 1), (3, 4)):
        kept = plan.kept[f"{conv}.weight"][0]
        scale = model[norm].weight.detach().abs()
        lost = [k for k in range(16) if k not in set(kept.tolist())]
        assert bool(lost) and float(scale[lost].max()) <= float(scale[kept.tolist()].min())


def test_a_resumed_run_of_units_is_the_same_run() -> None:
    for method in ("oto", "l0-units"):
        x, y = batch(0)
        states: list[dict[str, Tensor]] = []
        kept: Any = None
        for resumed in (False, True):
            model = net()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
            session = attach(model, method, optimizer=optimizer, steps=10, example=x, sparsity=0.5)
            first = 0
            if resumed:
                model.load_state_dict(kept[0])
                optimizer.load_state_dict(kept[1])
                session.load_state_dict(kept[2])
                first = 6
            for k in range(first, 10):
                if k == 6 and not resumed:
                    kept = copy.deepcopy((model.state_dict(), optimizer.state_dict(), session.state_dict()))
                x, y = batch(k)
                optimizer.zero_grad()
                (nn.functional.cross_entropy(model(x), y) + session.penalty()).backward()
                optimizer.step()
                session.step()
            session.finish()
            states.append({n: p.detach().clone() for n, p in model.named_parameters()})
        assert all(torch.equal(states[0][n], states[1][n]) for n in states[0]), method
