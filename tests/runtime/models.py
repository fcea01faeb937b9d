"""Small transformers, with and without a class token."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from secateur.tasks.nets import VisionTransformer


def vit(width: int = 16, depth: int = 3, seed: int = 0) -> VisionTransformer:
    """A vision transformer for 28 x 28 points, 49 tokens, whose answer is their mean."""
    torch.manual_seed(seed)
    return VisionTransformer(width, depth).eval()


def images(count: int = 3, seed: int = 1) -> Tensor:
    return torch.randn(count, 1, 28, 28, generator=torch.Generator().manual_seed(seed))


class Block(nn.Module):
    """Attention and a feed-forward part with one projection of all three, as in timm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Classifier(nn.Module):
    """A transformer over vectors, with so many special tokens in front of them; no positions."""

    def __init__(self, width: int = 16, depth: int = 3, special: int = 1, pool: bool = False) -> None:
        super().__init__()
        self.special = nn.Parameter(torch.randn(1, special, width))
        self.blocks = nn.Sequential(*(Block(width, 2) for _ in range(depth)))
        self.pool = pool
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(torch.cat([self.special.expand(len(x), -1, -1), x], 1))
        return self.head(x[:, self.special.shape[1] :].mean(1) if self.pool else x[:, 0])


def classifier(special: int = 1, pool: bool = False, seed: int = 0, depth: int = 3) -> Classifier:
    torch.manual_seed(seed)
    return Classifier(special=special, pool=pool, depth=depth).eval()


def vectors(count: int = 3, tokens: int = 20, seed: int = 1) -> Tensor:
    return torch.randn(count, tokens, 16, generator=torch.Generator().manual_seed(seed))


class Biased(nn.Module):
    """A block that is given what its attention adds: ``(tokens, tokens)``, ``(heads, tokens, tokens)`` or more."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, bias: Tensor, *, scale: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        found = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return x + scale[:, None, None] * self.proj(found.transpose(1, 2).flatten(2))


class BiasedClassifier(nn.Module):
    """Blocks that share a bias for all inputs, and a number for each of them."""

    def __init__(self, heads: int = 2, depth: int = 4, width: int = 16) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Biased(width, heads) for _ in range(depth))
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        scale = 1 + x[:, 0, 0].sigmoid()
        for block in self.blocks:
            x = block(x, bias, scale=scale)
        return self.head(x.mean(1))
