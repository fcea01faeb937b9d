"""Tasks without batch norm and dropout, on which two processes are one; and what the processes do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from secateur import Task, train
from secateur.errors import RecipeError, SecateurError, UnknownName
from secateur.processes import decided
from secateur.supernet import goal
from secateur.tasks.nets import VisionTransformer


def network(seed: int) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 3)).double()


def batches(split: str, seed: int = 0, epoch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of nine, which two processes cannot halve, and a last one of a single row."""
    start = {"train": 1000 * seed + epoch, "valid": 10**6, "test": 10**7}[split]
    generator = torch.Generator().manual_seed(start)
    for rows in (9, 9, 9, 1):
        x = torch.randn(rows, 6, generator=generator, dtype=torch.double)
        yield x, (x[:, :2].sum(1) > 0).long() + (x[:, 2:4].sum(1) > 0).long()


class Block(nn.Module):
    """A residual block without a norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(width, width, 3, padding=1) for _ in "ab")

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = x + self.second(self.first(x).relu())
        return found


class Residual(nn.Module):
    """A stem, blocks, a head."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(3)))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.blocks(self.stem(x).relu()).relu().mean((2, 3)))
        return found


def images(split: str, seed: int = 0, epoch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Which of three patterns is in an image; batches as above."""
    patterns = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(7))
    for x, y in batches(split, seed, epoch):
        generator = torch.Generator().manual_seed(int(x[0, 0].abs() * 1e6))
        yield (patterns[y] + 0.5 * torch.randn(len(y), 1, 8, 8, generator=generator)).double(), y


TASK = Task(network, batches, epochs=2, name="shared")
CNN = Task(lambda seed: Residual().double(), images, epochs=1, name="residual")
VIT = Task(lambda seed: VisionTransformer(16, 3, size=8, classes=3, patch=2).double(), images, epochs=1, name="patches")
_SMALL: dict[str, Any] = {"low": 0.25, "multiple": 2, "budget": 4, "calibration": 1, "random": 1}
_GATES: dict[str, Any] = {"length": 1.0, "rate": 1.0}
METHODS: dict[str, dict[str, Any]] = {
    "dense": {},
    "rigl": {"method": "rigl", "sparsity": 0.5, "knobs": {"driver": {"every": 2}}},
    "snip": {"method": "snip", "sparsity": 0.5},
    "l0": {"method": "l0", "sparsity": 0.5},
    "lth-rewind": {"method": "lth-rewind", "sparsity": 0.5, "steps": 2, "knobs": {"recovery": {"to": 0.25}}},
    "magnitude-distill": {"method": "magnitude-distill", "sparsity": 0.5},
    "l1-norm": {"method": "l1-norm", "sparsity": 0.3, "recovery": "finetune", "multiple": 1},
    "supernet": {"method": "supernet", "target": "params 40%", "knobs": _SMALL},
    "supernet-latency": {"method": "supernet", "target": "latency 20%", "knobs": _SMALL, "epochs": 1},
    "fbs": {"task": CNN, "method": "fbs", "target": "flops 30%", "knobs": {"lasso": 0.1}, **_GATES},
    "ftwt": {"task": CNN, "method": "ftwt", "target": "flops 20%", **_GATES},
    "skipnet": {"task": CNN, "method": "skipnet", "target": "flops 30%", "knobs": {"cost": 200.0}, **_GATES},
    "early-exit": {"task": CNN, "method": "early-exit", "knobs": {"exits": 1}, **_GATES},
    "dynamicvit": {"task": VIT, "method": "dynamicvit", "knobs": {"keep": 0.7}, **_GATES},
}  # fmt: skip
#: Those that are stopped on the way: where, and after how many steps.
STOPPED = {"rigl": ("train", 5), "supernet": ("search", 2)}


def made(name: str, **more: Any) -> Any:
    given = {"task": TASK, **METHODS[name], **more}
    return train(given.pop("task"), **given)


class Stop(Exception):
    """In the middle of a run."""


def clock(rank: int) -> Any:
    """A clock that says of each process something else."""
    return lambda models, *_, **__: {
        name: 1.0 + (1 + rank) * sum(p.numel() for p in model.parameters()) for name, model in models.items()
    }


def member(rank: int, world: int, folder: str) -> None:
    """One of the processes."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    goal.latency = clock(rank)  # type: ignore[assignment]
    for name in METHODS:
        if name in STOPPED:  # and it goes on where it was

            def stop(leg: str, done: int, of: int, at: tuple[str, int] = STOPPED[name]) -> None:
                if (leg, done) == at:
                    raise Stop

            with suppress(Stop):
                made(name, out=Path(folder, name), every=0.0, progress=stop)
            assert Path(folder, f"{name}.run").is_dir()
        found = made(name, out=Path(folder, name))
        state = {k: v.contiguous().clone() for k, v in found.model.state_dict().items()}
        save_file(state, Path(folder, f"{name}.{rank}.safetensors"))
        if found.masks:
            found.masks.save(Path(folder, f"{name}.{rank}.masks.safetensors"))
    for error in (RecipeError, UnknownName):  # what the first one refuses, all do
        with pytest.raises(SecateurError, match="no way") as seen:
            decided(lambda e=error: refuse(e, rank))
        assert rank == 0 or type(seen.value) in (RecipeError, SecateurError)
    assert decided(lambda: {"rank": rank, "x": [0.1, None]}) == {"rank": 0, "x": [0.1, None]}
    torch.distributed.destroy_process_group()


def refuse(error: type[SecateurError], rank: int) -> None:
    assert rank == 0  # nobody else is asked
    raise UnknownName("way", "no way", ()) if error is UnknownName else error("no way")
