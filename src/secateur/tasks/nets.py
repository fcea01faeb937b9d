"""The networks of the ready tasks."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Residual(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU(),
            nn.Conv2d(o, o, 3, 1, 1, bias=False), nn.BatchNorm2d(o),
        )  # fmt: skip
        short = [nn.Conv2d(i, o, 1, stride, bias=False), nn.BatchNorm2d(o)]
        self.short = nn.Sequential(*short) if stride > 1 or i != o else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.relu(self.body(x) + self.short(x))


def resnet(width: int = 16, depth: int = 3, channels: int = 1, classes: int = 10) -> nn.Module:
    """A residual network for small images: three stages of ``depth`` blocks (3 gives ResNet-20)."""
    layers: list[nn.Module] = [
        nn.Conv2d(channels, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
    ]  # fmt: skip
    i = width
    for stage in range(3):
        for k in range(depth):
            o = width << stage
            layers.append(Residual(i, o, 2 if stage and k == 0 else 1))
            i = o
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(i, classes))


def vgg(width: int = 16, channels: int = 1, classes: int = 10) -> nn.Module:
    """Plain convolutions with batch norm, halved in size four times, as VGG-16 is for small images."""
    layers: list[nn.Module] = []
    i = channels
    for stage, count in enumerate((2, 2, 3, 3, 3)):
        o = width * (1, 2, 4, 8, 8)[stage]
        for _ in range(count):
            layers += [nn.Conv2d(i, o, 3, 1, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU()]
            i = o
        if stage < 4:
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(i, classes))


class Attention(nn.Module):
    """Self-attention with separate projections."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.query, self.key, self.value))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(mixed.transpose(1, 2).flatten(-2))  # type: ignore[no-any-return]


class TransformerBlock(nn.Module):
    """Attention and a two-layer network, each behind a normalization and beside a shortcut."""

    def __init__(self, width: int, heads: int, causal: bool, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, causal)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x)))
        mixed: Tensor = x + self.dropout(self.down(nn.functional.gelu(self.up(self.norm2(x)))))
        return mixed


def _blocks(width: int, depth: int, causal: bool, dropout: float) -> nn.ModuleList:
    heads = max(1, width // 16)
    return nn.ModuleList(TransformerBlock(width, heads, causal, dropout) for _ in range(depth))


class VisionTransformer(nn.Module):
    """Patches of ``patch`` x ``patch`` points, a position each, and the mean of the tokens for the answer."""

    def __init__(self, width: int = 64, depth: int = 4, size: int = 28, classes: int = 10, patch: int = 4) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, width, patch, patch)
        self.position = nn.Parameter(0.02 * torch.randn(1, (size // patch) ** 2, width))
        self.blocks = _blocks(width, depth, causal=False, dropout=0.0)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))  # type: ignore[no-any-return]


class TextTransformer(nn.Module):
    """A transformer over token ids: an encoder that answers once, or a causal one that answers at every position."""

    def __init__(self, vocabulary: int, length: int, outputs: int, width: int, depth: int, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(0.02 * torch.randn(1, length, width))
        self.blocks = _blocks(width, depth, causal, dropout=0.0 if causal else 0.1)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, outputs)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids) + self.position[:, : ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return self.head(x if self.causal else x.mean(1))  # type: ignore[no-any-return]
