"""Criteria that rank whole units, against brute force."""

import pytest
import torch
from torch import nn

import secateur
from secateur.criteria.activation import activation_mean, apoz, fluctuation
from secateur.criteria.redundancy import fpgm
from secateur.evidence import gather_inputs
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


@pytest.mark.parametrize("method", ["flap", "wanda-sp", "apoz", "minitron", "fpgm", "network-slimming", "isomorphic"])
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
