"""Generated weights: what hypernetworks compute by their definitions, and small models that they end in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import secateur
from secateur.errors import RecipeError
from secateur.search.dhp import HyperNet, above, shrink_latents
from secateur.search.generated import Bound, Channels, prepared, smaller
from secateur.search.metapruning import PruningNet, trained
from tests.nets import Residual, noise

X = noise(1, 3, 8, 8)


def task(n: int = 64) -> list[tuple[Tensor, Tensor]]:
    """Which of five patterns is in an image."""
    patterns = noise(5, 3, 8, 8, seed=5)
    labels = torch.arange(n) % 5
    images = patterns[labels] + 0.5 * noise(n, 3, 8, 8, seed=6)
    return list(zip(images.split(32), labels.split(32), strict=True))


def loss(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def accuracy(model: nn.Module) -> float:
    return sum(float((model(x).argmax(1) == y).float().mean()) for x, y in task()) / 2


@pytest.fixture
def channels() -> Channels:
    torch.manual_seed(0)
    _, found, _ = prepared(Residual(16, 12), [X], "flops 50%", X, 4, 0.2, None, 0.5, 0)
    return found


def test_every_position_has_its_unit(channels: Channels) -> None:
    names = [n.name for n in channels.subject.space.nodes]
    stem, inner = names.index("stem.weight:0"), names.index("c1.weight:0")
    owner, unit = channels.places["c2.weight"][1]
    assert owner.tolist() == [inner] * 12 and unit.tolist() == list(range(12))
    assert channels.places["head.weight"][1][0].tolist() == [stem] * 16
    assert 0 not in channels.places["head.weight"] and 1 not in channels.places["stem.weight"]
    stay = channels.first(tuple(8 if i == stem else 4 for i in range(2)))
    masked = channels.masked({"c1.weight": torch.ones(12, 16, 3, 3)}, stay)["c1.weight"]
    assert masked[:4, :8].all() and not masked[4:].any() and not masked[:, 8:].any()


def test_a_pruning_net_by_its_definition(channels: Channels) -> None:
    torch.manual_seed(1)
    net = PruningNet(channels, hidden=6)
    sizes = [n.sizes for n in channels.subject.space.nodes]
    counts = tuple(s[0] for s in sizes)
    units = {n.name: c for n, c in zip(channels.subject.space.nodes, counts, strict=True)}
    a, b = units["stem.weight:0"], units["c1.weight:0"]
    found = net.weights(counts)
    first, _, second = net.generators[channels.convolutions.index("c1.weight")]
    widths = torch.tensor([a / 16, b / 12])
    whole = (second.weight @ torch.relu(first.weight @ widths + first.bias) + second.bias).reshape(12, 16, 3, 3)
    torch.testing.assert_close(found["c1.weight"][:b, :a], whole[:b, :a])
    assert not found["c1.weight"][b:].any() and not found["c1.weight"][:, a:].any()
    # A batch norm of its own for each width: training one leaves the others.
    table = dict(zip(net._of_width, net.tables, strict=True))["b1.weight"]
    assert table.shape == (len(sizes[1]), 12)
    found["b1.weight"].sum().backward()
    assert table.grad[0].any() and not table.grad[1:].any()
    assert set(found) == {n for n, _ in channels.model.named_parameters()}


def test_masked_by_widths_is_the_smaller_network(channels: Channels) -> None:
    net = PruningNet(channels)
    counts = tuple(n.sizes[0] for n in channels.subject.space.nodes)
    weights = {n: w.detach() for n, w in net.weights(counts).items()}
    x = noise(4, 3, 8, 8)
    recipe = channels.subject.recipe_of(counts)
    small = smaller(channels.model, recipe, weights, [x], X, 4)
    assert sum(p.numel() for p in small.parameters()) < 0.5 * sum(p.numel() for p in channels.model.parameters())
    torch.testing.assert_close(small.eval()(x), channels.model.eval()(x))
    assert small.c1.weight.shape == (counts[1], counts[0], 3, 3)


def test_metapruning_learns_and_ends_in_a_plain_smaller_model() -> None:
    torch.manual_seed(0)
    model = Residual(16, 12)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    batches = task()
    small, found = secateur.metapruning(
        model, batches, loss, accuracy, X, target="flops 50%", steps=60, budget=6, multiple=4
    )
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert found.best.cost <= found.limit and found.best.value >= found.uniform.value
    with torch.no_grad():
        assert accuracy(small.eval()) == pytest.approx(found.best.value)
    assert found.best.value > 0.5  # of five classes; the weights were never trained themselves
    fresh = secateur.prune(Residual(16, 12), found.recipe, example=X, multiple=4).shrink()
    assert [p.shape for p in fresh.parameters()] == [p.shape for p in small.parameters()]


def test_generators_train_on_random_widths(channels: Channels) -> None:
    net = PruningNet(channels)
    losses = trained(net, task(), loss, 40, 0.05, torch.Generator().manual_seed(0))
    assert sum(losses[-6:]) < 0.8 * sum(losses[:6])


def test_a_hypernetwork_by_its_definition(channels: Channels) -> None:
    torch.manual_seed(2)
    net = HyperNet(channels, embedding=3)
    with torch.no_grad():
        for parameter in net.hyper:
            parameter.normal_()
    k = channels.convolutions.index("c1.weight")
    w1, w2, b0, b1, b2 = net._parts[k]
    names = [n.name for n in channels.subject.space.nodes]
    z_in, z_out = net.latents[names.index("stem.weight:0")], net.latents[names.index("c1.weight:0")]
    weight = net.weights()["c1.weight"]
    for o, i in ((0, 0), (3, 7), (11, 15)):
        embedded = (z_in[i] * z_out[o] + b0[i, o]) * w1[i, o] + b1[i, o]
        torch.testing.assert_close(weight[o, i].flatten(), w2[i, o] @ embedded + b2[i, o])
    assert net.latent(channels.convolutions.index("stem.weight"), 1).shape == (3,)
    assert net.latent(channels.convolutions.index("c2.weight"), 0) is not z_in  # one vector across the skip connection
    torch.testing.assert_close(net.latent(channels.convolutions.index("c2.weight"), 0), z_in)


@given(st.lists(st.floats(-3, 3), min_size=1, max_size=8), st.floats(0, 1))
@settings(max_examples=50, deadline=None)
def test_the_proximal_step_is_the_minimum(values: list[float], amount: float) -> None:
    z = torch.tensor(values, dtype=torch.float64)
    out = z.clone()
    shrink_latents([out], amount, [0], 0.0)
    cost = lambda v: 0.5 * (v - z).square() + amount * v.abs()  # noqa: E731
    for step in (-1e-3, 1e-3):
        assert bool((cost(out) <= cost(out + step) + 1e-12).all())
    kept = z.clone()
    shrink_latents([kept], amount, [len(values)], 0.0)  # a vector that may lose no more is left alone
    assert torch.equal(kept, z)


def test_dhp_meets_the_target_in_a_plain_smaller_model(channels: Channels) -> None:
    torch.manual_seed(0)
    model = Residual(16, 12)
    small, recipe = secateur.dhp(
        model, task(), loss, X, target="flops 50%", steps=80, multiple=4, strength=0.4, calibration=2
    )
    assert recipe.allocation == "explicit"
    plan = secateur.plan(Residual(16, 12), recipe, example=X, multiple=4)
    assert plan.after["flops"] <= 0.5 * plan.before["flops"]
    assert [p.shape for p in plan.shrink().parameters()] == [p.shape for p in small.parameters()]
    with torch.no_grad():
        assert accuracy(small.eval()) > 0.5
    sizes = [n.sizes for n in channels.subject.space.nodes]
    assert above(channels, [torch.zeros(16), torch.ones(12)], 0.5) == (sizes[0][0], 12)


def test_what_they_need_is_said() -> None:
    with pytest.raises(RecipeError, match="channels are found by one forward pass"):
        secateur.dhp(Residual(), [X], loss, None)
    with pytest.raises(RecipeError, match="generated for convolutions"):
        secateur.dhp(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), [X], loss, noise(2, 8), multiple=1)


def test_a_bound_model_leaves_its_own_parameters_alone() -> None:
    norm = nn.BatchNorm1d(3).train()
    bound = Bound(norm, {"weight": torch.full((3,), 2.0), "bias": torch.zeros(3)}).train()
    y = bound(noise(8, 3))
    torch.testing.assert_close(y.var(0, correction=0), torch.full((3,), 4.0), rtol=1e-3, atol=0)
    assert norm.running_mean.eq(0).all() and norm.weight.eq(1).all() and not list(bound.parameters())
