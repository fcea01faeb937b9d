"""Untrained networks of the kinds that are pruned before training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def vgg(width: int = 16, norm: bool = True) -> nn.Module:
    """Ten convolutions with batch norms, and a classifier."""
    layers: list[nn.Module] = []
    channels = 3
    for size in (1, 1, 0, 2, 2, 0, 4, 4, 4, 0, 4, 4, 4):
        if not size:
            layers.append(nn.MaxPool2d(2))
            continue
        layers += [nn.Conv2d(channels, size * width, 3, padding=1), nn.BatchNorm2d(size * width), nn.ReLU()]
        layers = layers if norm else [m for m in layers if not isinstance(m, nn.BatchNorm2d)]
        channels = size * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.LayerNorm(12), nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 4))


class ViT(nn.Module):
    """Patches, a class token, positions, and blocks of fused attention."""

    def __init__(self, width: int = 16, depth: int = 3) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, stride=4)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 5, width))
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).mT
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        for block in self.blocks:
            x = block(x)
        found: Tensor = self.head(self.norm(x)[:, 0])
        return found


class Block(nn.Module):
    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(n, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, c))
        found: Tensor = x + self.down(nn.functional.gelu(self.up(self.norm2(x))))
        return found


def encoder() -> nn.Module:
    """Tokens in, through torch's own encoder layers, classes out."""
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, dropout=0.1)
    return nn.Sequential(nn.Embedding(50, 16), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), Pooled())


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(x.mean(1))
        return found


def images(count: int = 16, size: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, size, size, generator=g), torch.randint(10, (count,), generator=g)


def features(count: int = 16, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(count, 6, generator=g), torch.randint(4, (count,), generator=g)


def tokens(count: int = 16, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(50, (count, 7), generator=g), torch.randint(4, (count,), generator=g)


#: Name -> what makes the network, and batches for it.
NETS: dict[str, tuple[Callable[[], nn.Module], Callable[..., tuple[Tensor, Tensor]]]] = {
    "vgg": (lambda: vgg(4), images),
    "mlp": (mlp, features),
    "vit": (ViT, images),
    "encoder": (encoder, tokens),
}


def made(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A network, always the same."""
    torch.manual_seed(seed)
    return make()


def loss(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])
