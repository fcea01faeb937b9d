"""Small layers with correlated inputs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

Layer = tuple[Tensor, Tensor]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def layer() -> Callable[..., Layer]:
    """``layer(o, i, seed, tokens)``: a weight and the inputs ``(tokens, i)``."""

    def make(o: int, i: int, seed: int = 0, tokens: int = 0) -> Layer:
        g = torch.Generator().manual_seed(seed)
        mix = torch.eye(i) + 0.7 * torch.randn(i, i, generator=g) / i**0.5
        x = torch.randn(tokens or 8 * i, i, generator=g) @ mix
        x = x * torch.exp(0.5 * torch.randn(i, generator=g)) + 0.2 * torch.randn(i, generator=g)
        return torch.randn(o, i, generator=g), x

    return make
