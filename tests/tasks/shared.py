"""A task without batch norm and dropout, on which two processes are one; and what the processes do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from secateur import Task, train


def network(seed: int) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 3)).double()


def batches(split: str, seed: int = 0, epoch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of nine, which two processes cannot halve, and a last one of a single row."""
    start = {"train": 1000 * seed + epoch, "valid": 10**6, "test": 10**7}[split]
    generator = torch.Generator().manual_seed(start)
    for rows in (9, 9, 9, 1):
        x = torch.randn(rows, 6, generator=generator, dtype=torch.double)
        yield x, (x[:, :2].sum(1) > 0).long() + (x[:, 2:4].sum(1) > 0).long()


TASK = Task(network, batches, epochs=2, name="shared")
METHODS: dict[str, dict[str, Any]] = {
    "dense": {},
    "rigl": {"method": "rigl", "sparsity": 0.5, "knobs": {"driver": {"every": 2}}},
    "snip": {"method": "snip", "sparsity": 0.5},
    "l0": {"method": "l0", "sparsity": 0.5},
    "lth-rewind": {"method": "lth-rewind", "sparsity": 0.5, "steps": 2, "knobs": {"recovery": {"to": 0.25}}},
    "magnitude-distill": {"method": "magnitude-distill", "sparsity": 0.5},
    "l1-norm": {"method": "l1-norm", "sparsity": 0.3, "recovery": "finetune", "multiple": 1},
}  # fmt: skip


class Stop(Exception):
    """In the middle of a run."""


def stop(name: str, done: int, of: int) -> None:
    if done == 5:
        raise Stop


def member(rank: int, world: int, folder: str) -> None:
    """One of the processes."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    for name, given in METHODS.items():
        if name == "rigl":  # and it goes on where it was
            with suppress(Stop):
                train(TASK, out=Path(folder, name), every=0.0, progress=stop, **given)
        made = train(TASK, out=Path(folder, name), **given)
        state = {k: v.contiguous() for k, v in made.model.state_dict().items()}
        save_file(state, Path(folder, f"{name}.{rank}.safetensors"))
        if made.masks:
            made.masks.save(Path(folder, f"{name}.{rank}.masks.safetensors"))
    torch.distributed.destroy_process_group()
