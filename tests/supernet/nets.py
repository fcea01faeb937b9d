"""Networks with widths, stages and kernels that may vary, and a task of a fraction of a second."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur import Task
from secateur.tasks.nets import Residual, TransformerBlock


class Convolutional(nn.Module):
    """A 7x7 stem, two stages of residual blocks, a depthwise 5x5 convolution, and a head."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, width, 7, padding=3, bias=False), nn.BatchNorm2d(width)
        self.first = nn.Sequential(*(Residual(width, width, 1) for _ in range(2)))
        self.second = nn.Sequential(Residual(width, 2 * width, 2), *(Residual(2 * width, 2 * width, 1) for _ in "ab"))
        self.wide = nn.Conv2d(2 * width, 2 * width, 5, padding="same", groups=2 * width)
        self.head = nn.Linear(2 * width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = self.second(self.first(x))
        return self.head(F.relu(self.wide(x)).mean((2, 3)))  # type: ignore[no-any-return]


class Transformer(nn.Module):
    """Patches, attention blocks whose number of heads is a plain number, and a head."""

    def __init__(self, width: int = 16, depth: int = 3) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, width, 4, 4)
        self.blocks = nn.ModuleList(TransformerBlock(width, 2, causal=False, dropout=0.0) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))  # type: ignore[no-any-return]


def perceptron() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)
    )  # fmt: skip


def tiny() -> nn.Module:
    """An elastic kernel, batch norm and a width: as little as shows what a run keeps."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 5, 2, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 8), nn.ReLU(),
        nn.Linear(8, 3),
    )  # fmt: skip


X = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def batches(split: str, seed: int = 0, epoch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Which of three patterns is in an image."""
    patterns = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(7))
    start = {"train": 1000 * seed + epoch, "valid": 10**6, "test": 10**7}[split]
    generator = torch.Generator().manual_seed(start)
    for _ in range(4):
        y = torch.randint(3, (32,), generator=generator)
        yield patterns[y] + 0.8 * torch.randn(32, 1, 8, 8, generator=generator), y


TASK = Task(lambda seed: Convolutional(), batches, epochs=2, name="patterns")
TINY = Task(lambda seed: tiny(), batches, epochs=1, name="tiny patterns")
