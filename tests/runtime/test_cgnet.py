"""Gates by partial sums: against a plain loop, executed and masked, what is learned, what is said."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import conv2d

import secateur
from secateur.errors import ModelError, RecipeError
from secateur.measure.flops import flops
from secateur.runtime import cgnet

from .cnns import pictures, plain, residual


def closed(gated: nn.Module, seed: int = 3) -> nn.Module:
    """Some output channels closed everywhere, some nowhere, others here and there."""
    g = torch.Generator().manual_seed(seed)
    for gate in gated.gates:  # type: ignore[union-attr]
        k = torch.randint(3, gate.threshold.shape, generator=g)
        gate.threshold.data.copy_(torch.tensor([0.0, 50.0, -50.0])[k])
        gate.mean.normal_(std=0.1, generator=g)
    return gated.eval()


def test_a_convolution_by_the_papers_equations() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 5, 3, padding=1)
    net = nn.Sequential(conv, nn.ReLU(), nn.Conv2d(5, 3, 1), nn.Flatten(), nn.LazyLinear(2)).eval()
    x = torch.randn(3, 8, 6, 6)
    net(x)
    gated = closed(cgnet(net, x[:1]))
    gate = gated.gates[0]  # type: ignore[index]
    seen: list[torch.Tensor] = []
    net[1].register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with torch.no_grad():
        gated(x)
        part = conv2d(x[:, :2], conv.weight[:, :2], padding=1)
        whole = conv2d(x, conv.weight, padding=1)
        for o in range(5):
            decides = (part[:, o] - gate.mean[o]) / (gate.var[o] + 1e-5).sqrt() > gate.threshold[o]
            wanted = torch.where(decides, whole[:, o], part[:, o]) + conv.bias[o]  # type: ignore[index]
            torch.testing.assert_close(seen[0][:, o], wanted, rtol=1e-4, atol=1e-5)


def test_executed_is_masked_and_closed_channels_are_not_multiplied() -> None:
    net, x = residual(8), pictures(3)
    gated = closed(cgnet(net, x[:1]))
    executed = gated(x)
    gated.executes = False  # type: ignore[assignment]
    torch.testing.assert_close(gated(x), executed, rtol=1e-4, atol=1e-5)
    gated.executes = True  # type: ignore[assignment]
    torch.testing.assert_close(torch.cat([gated(one) for one in x.split(1)]), executed, rtol=1e-4, atol=1e-5)
    assert flops(gated, x[:1]).total < flops(net, x[:1]).total
    for gate in gated.gates:  # type: ignore[union-attr]
        gate.threshold.data.fill_(-1e9)
    torch.testing.assert_close(gated(x), net(x), rtol=1e-4, atol=1e-5)
    assert flops(gated, x[:1]).total == flops(net, x[:1]).total


def test_open_positions_are_counted() -> None:
    """Closed everywhere, what is expected is what the base channels take."""
    net, x = plain(8), pictures(2)
    gated = cgnet(net, x[:1])
    for gate in gated.gates:
        gate.threshold.data.fill_(1e9)
    gated.settle([(x, torch.zeros(2))])
    before = flops(net, x[:1]).by_module
    wanted = before[""] - sum(before[p.conv] * 3 / 4 for p in gated.places)
    assert gated.record["flops"]["after"] == wanted and set(gated.record["open"].values()) == {0.0}
    assert "0.0 % of the positions open" in gated.told() and "masked" in gated.told()
    gated = closed(gated)
    y = pictures(2, seed=5)
    gated.settle([(x, torch.zeros(2)), (y, torch.zeros(2))])
    both = gated.record["open"]
    gated.settle([(torch.cat([x, y]), torch.zeros(4))])
    assert both == gated.record["open"]  # all batches count
    gated.settle([(x, torch.zeros(2))])
    assert both != gated.record["open"]


def test_thresholds_are_learned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secateur.runtime.measured.SINGLES", 4)
    net, x = plain(), pictures(4)
    gated = cgnet(net, x[:1], goal=2.0, pull=0.5).train()
    torch.testing.assert_close(gated.penalty().detach(), torch.tensor(0.5 * 4.0 * sum(p.outputs for p in gated.places)))
    gated(x).square().sum().backward()
    assert all(g.threshold.grad is not None and bool(g.threshold.grad.any()) for g in gated.gates)
    made = secateur.train(
        "digits", "cgnet", epochs=0.3, length=1.0, options={"images": 100, "width": 4}, out=tmp_path / "o"
    )
    assert set(made.run["open"]) == {p.conv for p in made.model.places}  # type: ignore[union-attr]
    one = torch.randn(2, 1, 12, 12)
    fresh = secateur.tasks.find("digits", images=100, width=4).model(5)
    assert torch.equal(secateur.load(tmp_path / "o", fresh)(one), made.model(one))


def test_bad_options() -> None:
    with pytest.raises(RecipeError, match="2 or more"):
        cgnet(plain(), pictures(1), parts=1)
    with pytest.raises(RecipeError, match="slope above 0"):
        cgnet(plain(), pictures(1), slope=0.0)
    with pytest.raises(ModelError, match="reads several channels"):
        cgnet(nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 2)), pictures(1))
    with pytest.raises(RecipeError, match="no knob 'target'"):
        secateur.train("digits", "cgnet", target="flops 50%")
