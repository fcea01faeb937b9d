"""Several processes that make one run, as ``torchrun`` starts them: each takes its share of every batch.

Gradients are averaged after the backward pass rather than by `DistributedDataParallel`, so that a loss may call the
model as it likes, and gates may come and go between two legs of a run. Where processes could differ, the first decides.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from . import errors
from .errors import DataError, ModelError, SecateurError

#: Bytes of gradients that are sent at once.
BUCKET = 25 << 20


class Part(NamedTuple):
    """What this process has of a batch: which rows, of how many, and how much they weigh in the mean over processes."""

    own: slice
    rows: int
    weight: float


#: Of the batch that was shared last.
_last = Part(slice(0), 0, 1.0)


def world() -> int:
    """How many processes make this run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is."""
    return dist.get_rank() if world() > 1 else 0


@contextmanager
def joined(device: str | torch.device = "cpu") -> Iterator[int]:
    """Join the processes that ``torchrun`` has started, and leave them at the end; what is given is `rank`.

    Alone, or where the group is there already, nothing is done. Every process has a GPU of its own.
    """
    if world() > 1 or int(os.environ.get("WORLD_SIZE", "1")) < 2 or "MASTER_ADDR" not in os.environ:
        yield rank()
        return
    backend = "gloo"
    if torch.device(device).type == "cuda":
        own, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if own >= there:
            raise ModelError(f"each process needs a GPU of its own: there are {there}, and this is process {own + 1}")
        torch.cuda.set_device(own)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend)
    try:
        yield rank()
    finally:
        leave()


def alone(what: str) -> None:
    """Refuse to be one of the processes that ``torchrun`` has started.

    Raises:
        ModelError: it is one.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "MASTER_ADDR" in os.environ:
        raise ModelError(f"{what} works in one process: start it without torchrun (a study has processes: N)")


def leave() -> None:
    """Go on alone."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def part(rows: int) -> slice:
    """Which of so many rows are this process's."""
    size, own = world(), rank()
    return slice(own * rows // size, (own + 1) * rows // size)


def share(batch: Any) -> tuple[Any, float]:
    """This process's part of a batch, and its weight, so that the mean over processes is that over the batch.

    Tensors with as many rows as the first one are cut, others stay whole. A process for which nothing is left takes
    the first row without weight.

    Raises:
        DataError: nothing in it has rows.
    """
    if (size := world()) == 1:
        return batch, 1.0
    rows = next((len(x) for x in tree_leaves(batch) if isinstance(x, Tensor) and x.dim()), 0)
    if not rows:
        raise DataError(f"{size} processes cannot share a batch without a tensor that has rows")
    global _last
    own = part(rows)
    count = own.stop - own.start
    taken = own if count else slice(0, 1)
    cut = tree_map(lambda x: x[taken] if isinstance(x, Tensor) and x.dim() and len(x) == rows else x, batch)
    _last = Part(taken, rows, count * size / rows)
    return cut, _last.weight


def mean(summed: Tensor, count: int) -> Tensor:
    """A sum over what this process has of the batch, as the mean over all of it, for a loss that is not a mean itself.

    Its gradient is that of this process's part, so that a loss times the weight of `share` adds up to the whole one.
    """
    if world() == 1:
        return summed / max(count, 1)
    weight = _last.weight
    counts = float(total(torch.tensor(float(count if weight else 0))))
    value = total(summed.detach() if weight else torch.zeros_like(summed)) / max(counts, 1.0)
    if not weight or not counts:
        return value
    own = summed * (world() / (counts * weight))
    return own + (value - own).detach()


def together(rows: Tensor) -> Tensor:
    """The rows that all processes have of the batch, one process after the other; without gradient."""
    if world() == 1:
        return rows
    rows = rows.detach() if _last.weight else rows.detach()[:0]
    counts = [int(total(torch.tensor(len(rows) if k == rank() else 0))) for k in range(world())]
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: len(rows)] = rows
    found = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(found, padded)
    return torch.cat([x[:n] for x, n in zip(found, counts, strict=True)])


def noise(like: Tensor, draw: Callable[[Tensor], Tensor]) -> Tensor:
    """What is drawn for each row: of several processes, each takes its rows of what one would draw for the batch."""
    own, rows, _ = _last
    if world() == 1 or len(like) != own.stop - own.start:
        return draw(torch.empty_like(like))
    return draw(like.new_empty(rows, *like.shape[1:]))[own]


def average(parameters: Iterable[nn.Parameter]) -> None:
    """The mean of the gradients over all processes; where no process has one, there stays none."""
    if (size := world()) == 1:
        return
    for bucket in _buckets([p for p in parameters if p.requires_grad]):
        has = torch.tensor([float(p.grad is not None) for p in bucket], dtype=bucket[0].dtype, device=bucket[0].device)
        flat = [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in bucket]
        sent = torch.cat([*flat, has])
        dist.all_reduce(sent)
        *found, has = sent.split([*(p.numel() for p in bucket), len(bucket)])
        for parameter, gradient, count in zip(bucket, found, has.tolist(), strict=True):
            if count:
                mean = (gradient / size).view_as(parameter)
                parameter.grad = mean if parameter.grad is None else parameter.grad.copy_(mean)


def agree(tensors: Iterable[Tensor]) -> None:
    """Let every process have the first one's values."""
    if world() == 1:
        return
    with torch.no_grad():
        for bucket in _buckets(list(tensors)):
            sent = torch.cat([x.detach().flatten() for x in bucket])
            dist.broadcast(sent.view(torch.uint8), src=0)  # bytes, which every type has
            for tensor, value in zip(bucket, sent.split([x.numel() for x in bucket]), strict=True):
                tensor.detach().copy_(value.view_as(tensor))


def agree_on_model(model: nn.Module) -> None:
    """Let every process begin with the first one's weights.

    Raises:
        ModelError: theirs have other sizes.
    """
    if world() == 1:
        return
    state = [*model.parameters(), *model.buffers()]
    sizes = "; ".join(str(tuple(x.shape)) for x in state)
    if told(sizes.encode()) != sizes.encode():
        raise ModelError(
            "the processes of this run have models of different sizes: its method is not deterministic here"
        )
    agree(state)


def agree_on_chance(device: torch.device) -> None:
    """Let every process draw what the first one draws."""
    if world() == 1:
        return
    state = torch.get_rng_state()
    agree([state])
    torch.set_rng_state(state)
    if device.type == "cuda":
        own = torch.cuda.get_rng_state(device)
        agree([own])
        torch.cuda.set_rng_state(own, device)


def total(value: Tensor) -> Tensor:
    """The sum over all processes."""
    if world() > 1:
        value = value.clone()
        dist.all_reduce(value)
    return value


def told(said: bytes) -> bytes:
    """What the first process says."""
    if world() == 1:
        return said
    size = torch.tensor([len(said)])
    dist.broadcast(size, src=0)
    sent = torch.empty(int(size), dtype=torch.uint8)
    if rank() == 0:
        sent.copy_(torch.frombuffer(bytearray(said), dtype=torch.uint8) if said else sent)
    if len(sent):
        dist.broadcast(sent, src=0)
    return sent.numpy().tobytes()


def decided(what: Callable[[], Any]) -> Any:
    """What the first process finds, as JSON data; the others wait for it, and fail with it.

    Raises:
        SecateurError: as the first process did.
    """
    if world() == 1:
        return what()
    said: dict[str, Any] = {}
    failure: SecateurError | None = None
    if rank() == 0:
        try:
            said = {"found": what()}
        except SecateurError as error:
            failure, said = error, {"failed": type(error).__name__, "why": str(error)}
    said = json.loads(told(json.dumps(said).encode()))
    if failure is not None:
        raise failure
    if "failed" in said:
        kind = getattr(errors, said["failed"], SecateurError)
        raise (SecateurError if kind is errors.UnknownName else kind)(said["why"])
    return said["found"]


def unequal(model: nn.Module) -> list[str]:
    """Why several processes do not quite make the run of one, as notes: what counts the rows of one process alone.

    A module says so of itself by the attribute ``counts_rows``; batch norms need not.
    """
    norms = nn.modules.batchnorm._BatchNorm
    if world() == 1 or not any(isinstance(m, norms) or getattr(m, "counts_rows", False) for m in model.modules()):
        return []
    return [f"batch norm counts the share of a batch that a process has: {world()} processes are not quite one"]


def _buckets(tensors: list[Any]) -> Iterator[list[Any]]:
    """Tensors of one type and device, so many together as `BUCKET` holds."""
    kinds: dict[tuple[torch.dtype, torch.device], list[Any]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for members in kinds.values():
        bucket: list[Any] = []
        held = 0
        for tensor in members:
            bucket.append(tensor)
            held += tensor.numel() * tensor.element_size()
            if held >= BUCKET:
                yield bucket
                bucket, held = [], 0
        if bucket:
            yield bucket
