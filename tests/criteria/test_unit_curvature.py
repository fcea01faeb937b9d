"""Curvature of whole units: against the true change of the loss, exact second derivatives and full Hessians."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.func import functional_call

import secateur
from secateur import Recipe
from secateur.calibrate import evidence_of
from secateur.errors import RecipeError
from secateur.graph import Dependencies, dependencies, trace
from secateur.layers import find_layers
from secateur.structured.score import Probes, Scores, combined, unit_scores, weight_scores

METHODS = ["unit-hessian", "group-hessian", "hap", "nvit"]


class Residual(nn.Module):
    """Two families: the stream and the hidden units of its branch."""

    def __init__(self, width: int = 3, hidden: int = 4) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(2, width), nn.Linear(width, 2)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        return self.leave(x + self.down(torch.tanh(self.up(x))))


def mse(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


def residual() -> tuple[nn.Module, list[Any]]:
    torch.manual_seed(0)
    net = Residual().double().eval()
    return net, [(torch.randn(7, 2).double(), torch.randn(7, 2).double()) for _ in range(2)]


def scored(net: nn.Module, batches: list[Any], criterion: str, where: str, loss: Any = mse, **knobs: Any) -> Any:
    """Dependencies, and the scores of the units of every family."""
    granularity = {"coupled": "coupled", "output": "filter", "input": "channel"}[where]
    recipe = Recipe(criterion=criterion, granularity=granularity, knobs={"criterion": knobs})
    found = dependencies(trace(net, (batches[0][0],), {}))
    probes = Probes(found, net, where, recipe.seed)
    evidence = evidence_of(net, recipe, find_layers(net)[0], batches, loss, probes.directions())
    each = weight_scores(net, recipe, evidence)
    return found, unit_scores(found, each, where, combine=combined(recipe, each, probes))


@pytest.fixture
def exhaustive(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every vector of signs in turn, the first unit's fixed: turning all changes nothing."""

    def draws(self: Probes) -> Iterator[list[Scores]]:
        lengths = [len(f) for f in self._found.families]
        for signs in itertools.cycle(itertools.product([1.0, -1.0], repeat=sum(lengths) - 1)):
            yield np.split(np.array([1.0, *signs]), np.cumsum(lengths)[:-1])

    monkeypatch.setattr(Probes, "draws", draws)


def gates(found: Dependencies, net: nn.Module, family: int, where: str, loss: Any) -> tuple[Tensor, Tensor]:
    """First and second derivative of the loss by a factor on the counted weights of each unit of a family."""
    outputs = {f"{layer.name}.weight": 0 for layer in find_layers(net)[0]}
    parameters = {n: p.detach() for n, p in net.named_parameters()}

    def of(unit: Any) -> Any:
        def gated(m: Tensor) -> Tensor:
            turned = dict(parameters)
            for i, places in unit.places.items():
                slot = found.slots[i]
                name = next((n for n in slot.names if n in outputs), None)
                side = "output" if slot.axis == 0 else "input"
                if name is not None and where in ("coupled", side):
                    factor = torch.ones(turned[name].shape[slot.axis]).double()
                    factor = factor.index_put((torch.from_numpy(places),), m.expand(len(places)))
                    shape = [-1 if a == slot.axis else 1 for a in range(turned[name].dim())]
                    turned[name] = turned[name] * factor.reshape(shape)
            return loss(lambda x: functional_call(net, turned, (x,)))

        return gated

    one = torch.ones((), dtype=torch.float64)
    units = found.families[family].units
    first = torch.stack([torch.func.grad(of(u))(one) for u in units])
    return first, torch.stack([torch.func.grad(torch.func.grad(of(u)))(one) for u in units])


@pytest.mark.parametrize("where", ["coupled", "output", "input"])
def test_all_signs_give_the_second_derivative_of_a_gate(where: str, exhaustive: None) -> None:
    """A factor on all weights of a unit: -g + h / 2 is the loss without it, to second order."""
    net, batches = residual()
    found, scores = scored(net, batches, "unit-hessian", where, probes=2**6)
    assert sorted(len(s) for s in scores) == [3, 4]
    for k in range(len(found.families)):
        first, second = gates(
            found, net, k, where, lambda f: sum(F.mse_loss(f(x), y) for x, y in batches) / len(batches)
        )
        torch.testing.assert_close(torch.from_numpy(scores[k]), (second / 2 - first).abs(), rtol=1e-10, atol=1e-12)
        assert float(second.abs().max()) > 1e-3


def test_it_is_the_change_of_the_loss_where_that_is_quadratic(exhaustive: None) -> None:
    """A squared error is quadratic in the weights that read a unit."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).double().eval()
    batches = [(torch.randn(6, 3).double(), torch.randn(6, 4).double()) for _ in range(3)]
    _, scores = scored(net, batches, "unit-hessian", "input", probes=2**4)

    def total() -> float:
        return sum(float(mse(net, b).detach()) for b in batches) / len(batches)

    before, weight = total(), net[2].weight.detach().clone()
    for unit in range(5):
        with torch.no_grad():
            net[2].weight[:, unit] = 0
            change = total() - before
            net[2].weight.copy_(weight)
        assert scores[0][unit] == pytest.approx(abs(change), rel=1e-9)


def test_random_signs_come_near_the_exact_value(monkeypatch: pytest.MonkeyPatch) -> None:
    net, batches = residual()
    _, few = scored(net, batches, "unit-hessian", "coupled", probes=400)
    found, again = scored(net, batches, "unit-hessian", "coupled", probes=400)
    for k in range(2):
        np.testing.assert_array_equal(few[k], again[k])
        first, second = gates(found, net, k, "coupled", lambda f: sum(F.mse_loss(f(x), y) for x, y in batches) / 2)
        exact = (second / 2 - first).abs().numpy()
        assert np.abs(few[k] - exact).max() < 0.15 * exact.max()


def test_the_scale_of_the_loss_and_of_a_unit_within_the_network() -> None:
    """The score is linear in the loss, and scale moved from outgoing to incoming weights changes nothing."""
    torch.manual_seed(2)
    net = nn.Sequential(nn.Linear(3, 5, bias=False), nn.ReLU(), nn.Linear(5, 4)).double().eval()
    batches = [(torch.randn(6, 3).double(), torch.randn(6, 4).double())]
    for criterion in ("unit-hessian", "group-fisher"):
        _, (one,) = scored(net, batches, criterion, "coupled")
        _, (three,) = scored(net, batches, criterion, "coupled", loss=lambda m, b: 3 * mse(m, b))
        np.testing.assert_allclose(three, one * (3 if criterion == "unit-hessian" else 9), rtol=1e-10)
        factors = torch.tensor([0.5, 2.0, 7.0, 1.0, 0.1]).double()
        with torch.no_grad():
            net[0].weight.mul_(factors[:, None])
            net[2].weight.div_(factors)
        _, (moved,) = scored(net, batches, criterion, "coupled")
        np.testing.assert_allclose(moved, one, rtol=1e-8)


def bowl(net: nn.Module) -> tuple[Any, dict[str, Tensor]]:
    """A loss whose Hessian is diagonal, with its minimum where the weights are."""
    best = {n: p.detach().clone() for n, p in net.named_parameters() if p.dim() > 1}
    curve = {n: torch.rand_like(p) + 0.5 for n, p in best.items()}

    def loss(model: nn.Module, _: Any) -> Tensor:
        now = dict(model.named_parameters())
        return sum((curve[n] * (now[n] - best[n]).square()).sum() for n in best) / 2  # type: ignore[return-value]

    return loss, curve


def test_traces_and_diagonals_of_units_where_the_hessian_is_diagonal() -> None:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).double().eval()
    loss, curve = bowl(net)
    batches = [(torch.randn(1, 3).double(), None)]
    up, down = net[0].weight.detach(), net[2].weight.detach()
    bends = [curve["0.weight"], curve["2.weight"].t()]
    for where, used in (("coupled", [0, 1]), ("output", [0]), ("input", [1])):
        weight = torch.cat([(up, down.t())[k] for k in used], 1)
        bend = torch.cat([bends[k] for k in used], 1)
        exact = (bend * weight.square()).sum(1) / 2
        _, (damage,) = scored(net, batches, "obd", where, loss=loss)
        torch.testing.assert_close(torch.from_numpy(damage), exact, rtol=1e-6, atol=0)
        _, (trace_,) = scored(net, batches, "hap", where, loss=loss)
        mean = bend.mean(1) * weight.square().sum(1) / 2
        torch.testing.assert_close(torch.from_numpy(trace_), mean, rtol=1e-10, atol=0)

    _, (damage,) = scored(net, batches, "obd", "coupled", loss=loss)
    for unit in range(5):  # the sum of the diagonal's terms is what happens: the loss was zero
        smaller = copy.deepcopy(net)
        with torch.no_grad():
            smaller[0].weight[unit], smaller[2].weight[:, unit] = 0, 0
            assert damage[unit] == pytest.approx(float(loss(smaller, None)), rel=1e-6)


def test_curvature_takes_a_loss_and_at_least_one_probe() -> None:
    net, batches = residual()
    with pytest.raises(RecipeError, match="loss"):
        secateur.plan(net, "unit-hessian", target="params 20%", example=batches[0][0], data=batches)
    with pytest.raises(RecipeError, match="granularity coupled"):
        Recipe(criterion="unit-hessian")
    with pytest.raises(RecipeError, match="at least one probe"):
        scored(net, batches, "unit-hessian", "coupled", probes=0)


def convolutional() -> tuple[nn.Module, list[Any], Any]:
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3, groups=2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10),
    )  # fmt: skip
    data = [(torch.randn(4, 3, 8, 8), torch.randint(0, 10, (4,))) for _ in range(2)]
    return net.eval(), data, lambda m, b: F.cross_entropy(m(b[0]), b[1])


def vision() -> tuple[nn.Module, list[Any], Any]:
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, image_size=16, patch_size=8,
        num_labels=5,
    )  # fmt: skip
    data = [(torch.randn(2, 3, 16, 16), torch.randint(0, 5, (2,)))]
    net = transformers.ViTForImageClassification(config).eval()
    return net, data, lambda m, b: F.cross_entropy(m(b[0]).logits, b[1])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("make", [convolutional, vision])
def test_methods_end_in_a_smaller_proven_network(make: Any, method: str) -> None:
    torch.manual_seed(4)
    net, data, loss = make()
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    options = {"target": "params 40%", "example": data[0][0][:1], "data": data, "loss": loss, "recovery": "none"}
    if method != "nvit":
        options["knobs"] = {"criterion": {"probes": 2}}
    plan = secateur.plan(net, method, **options)
    assert plan.proof.proven and plan.after["params"] <= 0.6 * plan.before["params"]
    assert not any("has no score" in f.reason for f in plan.families)
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in net.named_parameters())
    assert sum(p.numel() for p in plan.shrink().parameters()) == plan.after["params"]


def test_rounds_and_measured_targets_take_probes_too() -> None:
    torch.manual_seed(5)
    net, data, loss = convolutional()
    options = {"example": data[0][0][:1], "data": data, "loss": loss, "recovery": "none"}
    options["knobs"] = {"criterion": {"probes": 2}}
    plan = secateur.plan(net, "unit-hessian", target="params 40%", steps=2, schedule="linear", **options)
    assert plan.proof.proven and plan.kept
    plan = secateur.plan(net, "unit-hessian", target="memory 5%", **options)
    assert plan.proof.proven and plan.kept
    again = secateur.plan(net, "unit-hessian", target="memory 5%", **options)
    assert str(again.to_dict()) == str(plan.to_dict())  # signs are drawn from the recipe's seed
