"""GraSP, ProsPr, NTK-SAP and SNIP against what defines them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur
from secateur.calibrate import evidence_of, run_model
from secateur.errors import DataError, ModelError, NumericalError, RecipeError
from secateur.evidence import gather_meta, gather_products, gather_tangent
from secateur.layers import find_layers
from secateur.recipe import Recipe
from tests.before.nets import NETS, features, images, loss, made, mlp, vgg


def double(model: nn.Module) -> nn.Module:
    return model.double()


def batches(count: int = 2) -> list[tuple[Tensor, Tensor]]:
    return [(x.double(), y) for x, y in (features(8, seed=k) for k in range(count))]


def weights(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.dim() == 2]


def gradient(model: nn.Module, data: list[Any], temperature: float) -> Tensor:
    """Of the sum over batches, by all weights, as one vector."""
    value = sum(nn.functional.cross_entropy(model(x) / temperature, y) for x, y in data)
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(value, weights(model))])


def shift(model: nn.Module, direction: Tensor) -> None:
    with torch.no_grad():
        for p, d in zip(weights(model), direction.split([p.numel() for p in weights(model)]), strict=True):
            p += d.view_as(p)


@pytest.mark.parametrize("temperature", [1.0, 200.0])
def test_the_hessian_gradient_product_by_finite_differences(temperature: float) -> None:
    model, data = double(made(mlp)), batches()
    g = gradient(model, data, temperature)
    step = 1e-5 / float(g.norm())
    sides = []
    for sign in (step, -step):
        moved = copy.deepcopy(model)
        shift(moved, sign * g)
        sides.append(gradient(moved, data, temperature))
    expected = (sides[0] - sides[1]) / (2 * step)
    layers, _ = find_layers(model)
    found = gather_products(model, layers, data, loss, temperature=temperature)
    product = torch.cat([found[x.name]["hessian_gradient"].reshape(-1) for x in layers])
    torch.testing.assert_close(product, expected, rtol=1e-5, atol=1e-9 * float(expected.abs().max()))


def test_grasp_keeps_what_raises_the_norm_of_the_gradient() -> None:
    """-theta * (H g) to first order is half the change of g^T g without the weight: the largest of it goes."""
    model, data = double(made(mlp)), batches(1)
    layers, _ = find_layers(model)
    found = gather_products(model, layers, data, loss, temperature=1.0)
    first = layers[0]
    product, w = found[first.name]["hessian_gradient"], first.weight()
    scale = 1e-6
    for o, i in ((0, 0), (3, 2), (11, 5)):
        norms = []
        for factor in (1 + scale, 1 - scale):
            moved = copy.deepcopy(model)
            with torch.no_grad():
                moved[0].weight[o, i] *= factor
            norms.append(float(gradient(moved, data, 1.0).square().sum()))
        slope = (norms[0] - norms[1]) / (2 * scale)  # by a gate on this weight
        assert 2 * float(w[o, i] * product[o, i]) == pytest.approx(slope, rel=1e-4, abs=1e-9)
    kept = secateur.prune(
        copy.deepcopy(model), "grasp", sparsity=0.7, data=data, loss=loss, knobs={"criterion": {"temperature": 1.0}}
    ).masks
    score = torch.cat([(x.weight() * found[x.name]["hessian_gradient"]).reshape(-1) for x in layers])
    mask = torch.cat([kept[x.name].reshape(-1) for x in layers])
    assert float(score[mask].min()) >= float(score[~mask].max()) and float(score[~mask].min()) < 0


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("unroll", [0, 1, 3])
def test_meta_gradients_by_brute_force(unroll: int, momentum: float) -> None:
    """Each weight's gate is moved a little, the network is trained with torch's own SGD, and the loss is looked at."""
    model, data = double(made(mlp)), batches(2)
    layers, _ = find_layers(model)
    found = gather_meta(model, layers, data, loss, unroll=unroll, rate=0.3, momentum=momentum)

    def trained(name: str, o: int, i: int, factor: float) -> float:
        net = copy.deepcopy(model)
        with torch.no_grad():
            net.get_submodule(name).weight[o, i] *= factor
        optimizer = torch.optim.SGD(net.parameters(), lr=0.3, momentum=momentum)
        for k in range(unroll):
            optimizer.zero_grad()
            loss(net, data[k % 2]).backward()
            optimizer.step()
        return float(loss(net, data[unroll % 2]).detach())

    step = 1e-5
    for layer in layers:
        gates = layer.weight() * found[layer.name]["meta_gradient"]
        for o, i in ((0, 0), (1, 3), (3, 5)):
            slope = (trained(layer.name, o, i, 1 + step) - trained(layer.name, o, i, 1 - step)) / (2 * step)
            assert float(gates[o, i]) == pytest.approx(slope, rel=1e-5, abs=1e-9)


def test_prospr_without_steps_is_snip() -> None:
    data = [features()]
    one = secateur.prune(made(mlp), "snip", sparsity=0.8, data=data, loss=loss).masks
    two = secateur.prune(
        made(mlp), "prospr", sparsity=0.8, data=data, loss=loss, knobs={"criterion": {"unroll": 0}}
    ).masks
    other = secateur.prune(made(mlp), "prospr", sparsity=0.8, data=data, loss=loss).masks
    assert all(torch.equal(one[n], two[n]) for n in one) and any(not torch.equal(one[n], other[n]) for n in one)


def test_tangent_by_finite_differences_of_its_definition() -> None:
    """d/dm of the summed squared change of the outputs, gate by gate, on the same draws."""
    model = double(made(mlp))
    layers, _ = find_layers(model)
    knobs: dict[str, Any] = {"draws": 2, "epsilon": 0.05, "samples": 5}
    data = [features()[0].double()]
    found = gather_tangent(model, layers, data, run_model, generator=torch.Generator().manual_seed(3), **knobs)

    def distance(gated: tuple[str, int, int, float]) -> float:
        generator = torch.Generator().manual_seed(3)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).double()

        value = 0.0
        for _ in range(2):
            x = normal(5, 6)
            drawn = {y.name: normal(*y.shape) * y.weight().square().mean().sqrt() for y in layers}
            noise = {y.name: 0.05 * normal(*y.shape) for y in layers}
            outputs = []
            for w in (drawn, {n: drawn[n] + noise[n] for n in drawn}):
                net = copy.deepcopy(model)
                with torch.no_grad():
                    for y in layers:
                        net.get_submodule(y.name).weight.copy_(w[y.name])
                    name, o, i, factor = gated
                    net.get_submodule(name).weight[o, i] *= factor
                    outputs.append(net(x))
            value += float((outputs[0] - outputs[1]).square().sum()) / 2
        return value

    step = 1e-5
    for layer in layers:
        for o, i in ((0, 0), (2, 4), (3, 1)):
            slope = (distance((layer.name, o, i, 1 + step)) - distance((layer.name, o, i, 1 - step))) / (2 * step)
            assert float(found[layer.name]["tangent"][o, i]) == pytest.approx(slope, rel=1e-4, abs=1e-9)


def test_the_perturbation_measures_the_trace_of_the_kernel() -> None:
    """E ||f(w) - f(w + e)||^2 / epsilon^2 = ||df/dw||^2 in a linear network of one layer: rows times outputs."""
    net = nn.Linear(4, 3, bias=False).double()
    layers, _ = find_layers(net)
    generator = torch.Generator().manual_seed(0)
    found = gather_tangent(
        net, layers, [torch.ones(1, 4).double()], run_model, draws=400, epsilon=0.1, samples=6, generator=generator
    )
    # f = (m w) x: the sum is sum_oi m^2 e^2 x^2, so its derivative by m is 2 e^2 x^2, of mean 2 epsilon^2 samples.
    mean = float(found["weight"]["tangent"].mean())
    assert mean == pytest.approx(2 * 0.1**2 * 6, rel=0.1)


@pytest.mark.parametrize("method", ["snip", "iterative-snip", "force", "grasp", "prospr", "ntk-sap"])
@pytest.mark.parametrize("kind", NETS)
def test_every_kind_of_network_is_left_as_it_was_but_for_its_weights(kind: str, method: str) -> None:
    make, batch = NETS[kind]
    net = made(make).train()
    state, data = copy.deepcopy(net.state_dict()), [batch(), batch(seed=1)]
    steps = {"steps": 3} if Recipe.of(method).steps > 1 else {}
    made_ = secateur.prune(net, method, sparsity=0.8, data=data, loss=loss, **steps)
    again = secateur.prune(made(make), method, sparsity=0.8, data=data, loss=loss, **steps)
    names = {f"{n}.weight" for n in made_.masks}
    for name, value in net.state_dict().items():
        mask = made_.masks[name.removesuffix(".weight")].view_as(value) if name in names else None
        assert torch.equal(value, state[name] if mask is None else state[name] * mask)
    total = sum(m.numel() for m in made_.masks.values())
    assert sum(int(m.sum()) for m in made_.masks.values()) == round(0.2 * total)
    assert all(torch.equal(again.masks[n], made_.masks[n]) for n in made_.masks)
    assert net.training and all(p.grad is None and p.requires_grad for p in net.parameters())


def test_snip_is_first_order_taylor_end_to_end() -> None:
    """The same masks as the largest squared changes of the loss, on a network with batch norms by the batch."""
    net, data = made(lambda: vgg(4)), [images()]
    twin = copy.deepcopy(net).train()
    loss(twin, data[0]).backward()
    kept = secateur.prune(net, "snip", sparsity=0.9, data=data, loss=loss).masks
    layers, _ = find_layers(twin)
    taylor = torch.cat([(x.weight() * x.gradient()).square().reshape(-1) for x in layers])
    mask = torch.cat([kept[x.name].reshape(-1) for x in layers])
    assert float(taylor[mask].min()) >= float(taylor[~mask].max())


def test_fresh_batch_norms_normalize_by_the_batch_and_others_do_not() -> None:
    net, data = made(lambda: vgg(4)), [images()]
    layers, _ = find_layers(net)
    recipe = Recipe.of("snip")

    def measured(model: nn.Module) -> Tensor:
        return evidence_of(model, recipe, find_layers(model)[0], data, loss)[layers[0].name]["gradient"]

    def plain(model: nn.Module) -> Tensor:
        model = copy.deepcopy(model)
        loss(model, data[0]).backward()
        return find_layers(model)[0][0].gradient()

    torch.testing.assert_close(measured(net.eval()), plain(net.train()))
    assert int(net[1].num_batches_tracked) == 0 and not bool(net[1].running_mean.any())
    with torch.no_grad():
        net.train()(images(seed=5)[0])
    torch.testing.assert_close(measured(net), plain(net.eval()))
    assert not torch.allclose(measured(net), plain(net.train()))
    single = images(1, size=8)  # three pools leave one position
    with pytest.raises(DataError, match="two examples or more"):
        secateur.prune(made(lambda: vgg(4)), "snip", sparsity=0.5, data=[single], loss=loss)


def test_a_network_that_rounds_have_cut_through_is_an_error() -> None:
    """Without a path there is no gradient, and ties would be broken by order alone."""
    net = nn.Sequential(*[m for _ in range(6) for m in (nn.Linear(3, 3, bias=False), nn.ReLU())])
    data = [torch.randn(4, 3)]
    with pytest.raises(NumericalError, match="connects the input with the output no more"):
        secateur.prune(
            net, "iterative-snip", sparsity=0.95, steps=8, data=data, loss=lambda m, b: m(b).square().mean()
        )  # fmt: skip


def test_bad_input_is_one_sentence() -> None:
    data = [features()]

    def run(method: str, **more: Any) -> Any:
        return secateur.prune(made(mlp), method, sparsity=0.5, **{"data": data, "loss": loss, **more})

    for kind, said, call in (
        (RecipeError, "above 0", lambda: run("grasp", knobs={"criterion": {"temperature": 0}})),
        (RecipeError, "counted from 0", lambda: run("prospr", knobs={"criterion": {"unroll": -1}})),
        (RecipeError, "at least 1", lambda: run("ntk-sap", knobs={"criterion": {"draws": 0}})),
        (RecipeError, "'grasp' needs hessian_gradient, which is measured with a loss", lambda: run("grasp", loss=None)),
        (RecipeError, "'prospr' needs meta_gradient, which is measured on data", lambda: run("prospr", data=None)),
        (DataError, "one element", lambda: run("prospr", loss=lambda m, b: m(b[0]))),
        (ModelError, "zero everywhere", lambda: run("grasp", loss=lambda m, b: torch.ones(()))),
    ):
        with pytest.raises(kind, match=said):
            call()
