"""Criteria that rank whole units, against brute force."""

import pytest
import torch
from torch import nn

import secateur
from secateur.criteria.activation import activation_mean, apoz, fluctuation
from secateur.criteria.redundancy import fpgm
from secateur.evidence import gather_inputs
from secateur.evidence.maps import map_independence, map_rank
from secateur.layers import find_layers


def test_fpgm_is_the_sum_of_distances():
    weight = torch.randn(7, 12)
    wanted = [sum(float((weight[i] - weight[j]).norm()) for j in range(7)) for i in range(7)]
    torch.testing.assert_close(fpgm(weight).sum(1), torch.tensor(wanted))


def test_activation_criteria_are_those_of_the_inputs_seen():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 4))
    batches = [torch.randn(30, 5), torch.randn(17, 5)]
    layers, _ = find_layers(net)
    needs = {"input_var", "input_abs", "input_nonzero"}
    found = gather_inputs(net, layers, needs, batches, lambda m, b: m(b))["2"]
    with torch.no_grad():
        x = net[:2](torch.cat(batches))
    weight = net[2].weight.detach()
    torch.testing.assert_close(fluctuation(weight, found["input_var"]), weight**2 * x.var(0, unbiased=False))
    torch.testing.assert_close(activation_mean(weight, found["input_abs"])[0], x.abs().mean(0))
    torch.testing.assert_close(apoz(weight, found["input_nonzero"])[0], (x != 0).float().mean(0))


@pytest.mark.parametrize(
    "method",
    ["flap", "wanda-sp", "apoz", "minitron", "fpgm", "network-slimming", "isomorphic", "hrank", "chip", "group-fisher"],
)
def test_methods_end_in_a_smaller_proven_network(method):
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Conv2d(3, 24, 3), nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 32, 3), nn.BatchNorm2d(32), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    ).eval()  # fmt: skip
    data = [(torch.randn(8, 3, 10, 10), torch.randint(0, 10, (8,))) for _ in range(3)]
    plan = secateur.plan(
        net, method, target="params 40%", example=data[0][0][:1], data=data,
        loss=lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1]),
    )  # fmt: skip
    assert plan.proof.proven
    small = plan.shrink().eval()
    plan.mask()
    with torch.no_grad():
        torch.testing.assert_close(small(data[0][0]), net(data[0][0]), rtol=1e-4, atol=1e-5)


def net_and_data():
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10),
    ).eval()  # fmt: skip
    return net, [(torch.randn(8, 3, 10, 10), torch.randint(0, 10, (8,))) for _ in range(3)]


def loss(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


@pytest.mark.parametrize("criterion", ["group-fisher", "unit-taylor"])
def test_unit_changes_are_the_derivative_of_a_gate_on_the_channel(criterion, monkeypatch):
    """Summed over the weights that read a channel, w dL/dw is the derivative by a factor on that channel."""
    from secateur.structured import make

    net, data = net_and_data()
    wanted = []
    for batch in data:
        gate = torch.ones(1, 6, 1, 1, requires_grad=True)
        value = nn.functional.cross_entropy(net[3:](net[:3](batch[0]) * gate), batch[1])
        wanted.append(torch.autograd.grad(value, gate)[0].flatten())
    change = torch.stack(wanted).double()
    expected = change.square().mean(0) / 2 if criterion == "group-fisher" else change.abs().mean(0)
    seen = {}
    original = make.unit_scores

    def spy(found, *rest):
        scores = original(found, *rest)
        seen.update({f.name: s for f, s in zip(found.families, scores, strict=True)})
        return scores

    monkeypatch.setattr(make, "unit_scores", spy)
    secateur.plan(
        net, "group-fisher", criterion=criterion, granularity="channel", target="params 20%", example=data[0][0][:1],
        data=data, loss=loss, recovery="none",
    )  # fmt: skip
    six = next(s for s in seen.values() if len(s) == 6)
    torch.testing.assert_close(torch.from_numpy(six), expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("shape", [(2, 5, 3, 4), (2, 9, 2, 2)])
def test_maps_against_the_definitions(shape):
    x = torch.randn(shape)
    x[:, 1] = 0.5 * x[:, 0]  # spanned by another
    x[:, 2] = 1.0  # of rank one
    ranks = map_rank(x)
    outer = torch.outer(torch.randn(14), torch.randn(14))[None, None]  # of rank one, but for rounding
    assert map_rank(outer).tolist() == [[1.0]]
    assert ranks[:, 2].tolist() == [1.0, 1.0] and ranks[:, 0].tolist() == [min(shape[2:])] * 2
    flat = x.double().flatten(2)
    for n, matrix in enumerate(flat):
        for c in range(shape[1]):
            masked = matrix.clone()
            masked[c] = 0
            wanted = torch.linalg.matrix_norm(matrix, "nuc") - torch.linalg.matrix_norm(masked, "nuc")
            assert float(map_independence(x)[n, c]) == pytest.approx(float(wanted), abs=1e-6)


def test_maps_need_images():
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    x = torch.randn(4, 8)
    with pytest.raises(secateur.errors.DataError, match="two-dimensional convolutions"):
        secateur.plan(net, "hrank", target="params 20%", example=x, data=[x])
    with pytest.raises(secateur.errors.RecipeError, match="by the feature maps"):
        secateur.plan(net, "hrank", granularity="depth", target="params 20%", example=x, data=[x])
