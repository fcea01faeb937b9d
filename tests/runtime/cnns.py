"""Small convolutional networks, with gates that have learned something."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from secateur.runtime import ChannelGates
from secateur.tasks.nets import resnet


def plain(width: int = 4, seed: int = 0) -> nn.Module:
    """A chain of four convolutions."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    i = 1
    for o in (width, 2 * width, 2 * width, 4 * width):
        layers += [nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU(inplace=True)]
        i = o
    layers.insert(6, nn.MaxPool2d(2))
    return used(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(i, 10)))


def residual(width: int = 4, depth: int = 1, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return used(resnet(width, depth))


def used(net: nn.Module) -> nn.Module:
    """With norms that are no longer what they were born as."""
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, -1, 1)
            nn.init.uniform_(m.bias, -0.5, 0.5)
            nn.init.normal_(m.running_mean, std=0.1)
            nn.init.uniform_(m.running_var, 0.5, 1.5)
    return net.eval()


def pictures(count: int = 3, seed: int = 1, size: int = 8) -> Tensor:
    """Some faint, some bright, so that gates choose differently."""
    x = torch.randn(count, 1, size, size, generator=torch.Generator().manual_seed(seed))
    return x * 5.0 ** (torch.arange(count) % 3 - 1)[:, None, None, None]


def taught(gated: ChannelGates, seed: int = 2) -> ChannelGates:
    """Gates whose choice depends much on the input."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in gated.gates.parameters():
            p.add_(0.5 * torch.randn(p.shape, generator=g))
        first: Any = gated.gates[0].predict
        edge = torch.linspace(
            -1, 1, first.out_features
        )  # the first channels for what is faint, the last for the bright
        first.weight.copy_(edge[:, None].expand_as(first.weight))
        first.bias.copy_(-0.5 * edge)
    return gated.eval()


class Odd(nn.Module):
    """What a finder of places has to get right: a shortcut, a concatenation, squeezing, groups, a shared convolution,
    a group norm, a map that is the answer, and memory that is shared."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, padding=1)
        self.left, self.right = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.Conv2d(6, 4, 1)
        self.norm = nn.BatchNorm2d(6)
        self.squeeze, self.excite = nn.Linear(10, 3), nn.Linear(3, 10)
        self.grouped = nn.Conv2d(10, 10, 3, padding=1, groups=5)
        self.shared = nn.Conv2d(10, 10, 1)
        self.mixed, self.group = nn.Conv2d(10, 8, 1), nn.GroupNorm(2, 8)
        self.last, self.map = nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(6, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.silu(self.stem(x))
        left = self.norm(self.left(x)) + x
        both = torch.cat([nn.functional.relu(left), self.right(x)], 1)
        weight = self.excite(self.squeeze(both.mean((2, 3))).relu()).sigmoid()
        both = both * weight[..., None, None]
        both = self.shared(self.shared(self.grouped(both)))
        x = self.group(self.mixed(both)).relu()
        x = self.last(nn.functional.max_pool2d(x, 2))
        x.view(-1).add_(0.1)  # channels that were zero no longer are
        return self.map(x)


def odd(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return used(Odd())
