"""Packed layers beside dense ones, for the tests of this directory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from secateur.compression.modules import Sparse, SparseConv2d, SparseLinear
from secateur.formats import pack


def sparse(generator: torch.Generator, rows: int, cols: int, density: float) -> Tensor:
    """Every fifth row keeps nothing, unless all is kept."""
    kept = torch.rand(rows, cols, generator=generator) < density
    if density < 1:
        kept[::5] = False
    return torch.randn(rows, cols, generator=generator) * kept


def layers() -> dict[str, tuple[Sparse, nn.Module, Tensor]]:
    """A packed layer, the dense one, and an input."""
    generator = torch.Generator().manual_seed(0)
    weight, bias = sparse(generator, 33, 108, 0.3), torch.randn(33, generator=generator)
    line, image = nn.Linear(108, 33), nn.Conv2d(12, 33, 3, 2, 1)
    with torch.no_grad():
        for dense in (line, image):
            dense.weight.copy_(weight.view(dense.weight.shape))
            dense.bias.copy_(bias)
            dense.requires_grad_(False)
    packed = pack(weight)
    whole = (10 * weight).round()  # weights and inputs that int8 holds: whole numbers, the largest 127
    whole[:, 0], tokens = 127.0, torch.randint(-127, 128, (9, 108), generator=generator).float()
    tokens[:, 1] = 127.0
    small = nn.Linear(108, 33).requires_grad_(False)
    small.weight.copy_(whole)
    small.bias.copy_(bias)
    return {
        "many": (SparseLinear(packed, bias), line, torch.randn(9, 108, generator=generator)),
        "few": (SparseLinear(packed.indexed(False, True), bias), line, torch.randn(2, 3, 108, generator=generator)),
        "quad": (SparseLinear(pack(whole, "int8-dynamic").indexed(False, True, True), bias), small, tokens),
        "image": (
            SparseConv2d(packed, bias, (3, 3), (2, 2), (1, 1), (1, 1)), image,
            torch.randn(2, 12, 9, 10, generator=generator),
        ),
    }  # fmt: skip


LAYERS = pytest.mark.parametrize("name", ["many", "few", "quad", "image"])
