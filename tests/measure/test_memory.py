"""Peak bytes against sums by hand."""

import torch
from torch import nn

import secateur
from secateur.measure.memory import peak_bytes


def test_a_chain_holds_two_activations_at_a_time():
    net = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5)).train()
    x = torch.randn(7, 10)
    stored = 4 * (10 * 20 + 20 + 20 * 5 + 5 + 7 * 10)
    assert peak_bytes(net, (x,)) == stored + 4 * 7 * (20 + 20)
    assert net.training


def test_a_residual_is_held_and_views_and_tied_weights_are_free():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 8, bias=False)
            self.b = nn.Linear(8, 8, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.a(x)
            z = self.b(y.view(-1, 8).view(y.shape))
            return z.add_(y)

    x = torch.randn(3, 8)
    assert peak_bytes(Net(), (), {"x": x}) == 4 * (64 + 24) + 4 * (24 + 24)


def test_a_target_in_memory_is_met():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    ).eval()  # fmt: skip
    x = torch.randn(1, 3, 32, 32)
    plan = secateur.plan(net, "l1-norm", target="memory 40%", example=x)
    small = plan.shrink()
    assert plan.before["memory"] == peak_bytes(net, (x,)) and plan.after["memory"] == peak_bytes(small, (x,))
    assert plan.after["memory"] <= 0.6 * 1.05 * plan.before["memory"]
