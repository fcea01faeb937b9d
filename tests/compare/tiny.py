"""A task that trains in milliseconds: two clouds of points, a network of two layers."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import torch
from torch import nn


def _rows(seed: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (count,), generator=generator)
    return torch.randn(count, 8, generator=generator) + labels[:, None].float(), labels


class clouds:
    """A task as a user writes it."""

    epochs = 1

    def model(self, seed: int) -> nn.Module:
        return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))

    def batches(self, split: str, seed: int, epoch: int) -> Any:
        x, y = _rows({"train": 1, "valid": 2, "test": 3}[split], 64)
        return list(zip(x.split(16), y.split(16), strict=True))


class guarded(clouds):
    """It refuses to show the test data where a file is in the way."""

    def batches(self, split: str, seed: int, epoch: int) -> Any:
        if split == "test" and os.environ.get("SECATEUR_NO_TEST"):
            raise RuntimeError("nobody may look at the test data")
        return super().batches(split, seed, epoch)


class deadly(clouds):
    """Its process dies while it trains, with one seed."""

    def model(self, seed: int) -> nn.Module:
        if seed == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().model(seed)


class slow(clouds):
    """It never ends, with one seed."""

    def model(self, seed: int) -> nn.Module:
        if seed == 1:
            time.sleep(60)
        return super().model(seed)


class broken(clouds):
    """It has a mistake."""

    def batches(self, split: str, seed: int, epoch: int) -> Any:
        if split == "train" and seed == 1:
            raise KeyError("a mistake")
        return super().batches(split, seed, epoch)


class absent(clouds):
    """Its data are not there, until they are."""

    def batches(self, split: str, seed: int, epoch: int) -> Any:
        if not os.path.exists(os.environ["SECATEUR_DATA"]):
            raise FileNotFoundError("the data are not there")
        return super().batches(split, seed, epoch)
