"""A task of a fraction of a second: dropout and batch norm, so that generators and buffers matter."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from secateur import Task


def network(seed: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2), nn.Linear(64, 16), nn.ReLU(),
        nn.Linear(16, 3),
    )  # fmt: skip


def batches(split: str, seed: int = 0, epoch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    start = {"train": 1000 * seed + epoch, "valid": 10**6, "test": 10**7}[split]
    generator = torch.Generator().manual_seed(start)
    for _ in range(6):
        x = torch.randn(16, 1, 6, 6, generator=generator)
        yield x, (x[:, 0, :2].mean((1, 2)) > 0.1).long() + (x[:, 0, 4:].mean((1, 2)) > 0.1).long()


TASK = Task(network, batches, epochs=2, name="tiny")
