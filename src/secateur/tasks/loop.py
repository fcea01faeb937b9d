"""The loop: it trains a task's model, keeps a session's masks, and goes on exactly where it was stopped.

Under `processes` each process takes its share of every batch, and all have the same model after every step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import DataError, ModelError, NumericalError, RecipeError
from ..masks import Masks
from ..processes import agree, agree_on_chance, agree_on_model, average, rank, share, told, total, world
from .base import Task, placed
from .checkpoint import Checkpoint, generators, seed_generators, set_generators

#: Seconds between two checkpoints within an epoch.
OFTEN = 30.0


class Live(Protocol):
    """What keeps masks while a model trains; `when.Session` is one."""

    @property
    def sparsity(self) -> float: ...
    def step(self) -> None: ...
    def penalty(self) -> Tensor: ...
    def finish(self) -> Masks: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Watch(Protocol):
    """What looks at the model after each epoch and may end the run."""

    def at_epoch(self, model: nn.Module, step: int, steps: int) -> bool: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@dataclass(eq=False)
class Fitted:
    """A leg of a run that is over: its curve, a row for each epoch; the masks of its session; weights kept early."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    masks: Masks | None = None
    kept: dict[str, Tensor] | None = None
    at: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Leg:
    """One stretch of training.

    Attributes:
        epochs: how long the learning rate's schedule is; may be a fraction.
        begin: share of the schedule to start at; what lies before it is not trained.
        rate: factor of the learning rate.
        loss: in place of the task's.
        keep: share of the run whose weights are kept.
        seed, round: decide the order of the data; rounds after the first have orders of their own.
        file: the checkpoint; None to keep nothing.
        tags: what the run is; a checkpoint of another one is refused.
        every: seconds between checkpoints.
    """

    epochs: float
    begin: float = 0.0
    rate: float = 1.0
    loss: Callable[[nn.Module, Any], Tensor] | None = None
    keep: float | None = None
    seed: int = 0
    round: int = 0
    file: Path | None = None
    tags: Mapping[str, Any] = field(default_factory=dict)
    every: float = OFTEN

    def __post_init__(self) -> None:
        if not self.epochs > 0 or not math.isfinite(self.epochs):
            raise RecipeError(f"a run takes more than no time: epochs is {self.epochs:g}")
        if not 0 <= self.begin < 1 or not self.rate > 0:
            raise RecipeError(
                f"a run begins at a share of its schedule in [0, 1), at a rate above 0: not "
                f"{self.begin:g}, {self.rate:g}"
            )


def fit(
    task: Task,
    model: nn.Module,
    leg: Leg,
    *,
    attach: Callable[[Optimizer, int], Live] | None = None,
    watch: Watch | None = None,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Fitted:
    """Train a model in place.

    A checkpoint of the same leg is gone on with: the weights, masks and curve at the end are those of a run that was
    never stopped, bit by bit. A leg that was over is only read.

    Args:
        attach: makes the session that keeps the masks, given the optimizer and the number of steps.
        progress: called with the steps that are done and their number; what it raises ends the run at that step.

    Raises:
        DataError: there is no training batch.
        NumericalError: the loss is not finite.
        ModelError: the checkpoint is of another run.
    """
    file = None if leg.file is None else Checkpoint(leg.file)
    saved = None if file is None else _read(file)
    if saved is not None and saved["tags"] != dict(leg.tags):
        raise ModelError(f"{leg.file} is of another run: choose another --out, or delete it")
    if saved is not None and saved["done"]:
        model.load_state_dict(saved["model"])
        masks = None if saved["masks"] is None else Masks(saved["masks"])
        return Fitted(saved["rows"], masks, saved["kept"], saved["at"], saved["seconds"])
    return _Run(task, model, leg, file, attach, watch, progress).go(saved)


def _read(file: Checkpoint) -> dict[str, Any] | None:
    """What is there; of several processes the first one reads: the file may be another one a moment later."""
    if world() == 1:
        return file.read() if file.exists() else None
    found = told(file.path.read_bytes() if rank() == 0 and file.exists() else b"")
    return file.parsed(found) if found else None


class _Run:
    """A leg under way."""

    def __init__(
        self, task: Task, model: nn.Module, leg: Leg, file: Checkpoint | None,
        attach: Callable[[Optimizer, int], Live] | None, watch: Watch | None, progress: Callable[[int, int], None],
    ) -> None:  # fmt: skip
        self.task, self.model, self.leg, self.file, self.watch, self.progress = task, model, leg, file, watch, progress
        self.loss = leg.loss or task.loss
        self.device = next(model.parameters()).device
        self.per = _count(task.batches("train", leg.seed, 0))
        self.steps = max(1, math.ceil(leg.epochs * self.per - 1e-9))
        self.at = self.start = round(leg.begin * self.steps)
        agree_on_model(model)
        self.optimizer = task.optimizer(model)
        self.session = None if attach is None else attach(self.optimizer, self.steps - self.start)
        self.out = Fitted(at=self.at)
        self.sum, self.seen = torch.zeros((), dtype=torch.float64), 0

    def go(self, saved: Mapping[str, Any] | None) -> Fitted:
        seed_generators(self.leg.seed * 1009 + self.leg.round)
        if saved is not None:
            self._resume(saved)
        elif self.leg.keep is not None and self._kept_at() <= self.start:
            self._keep()
        begun, written = time.perf_counter() - self.out.seconds, time.perf_counter()
        over = False
        while self.at < self.steps and not over:
            epoch, offset = divmod(self.at, self.per)
            before = generators()
            batches = iter(self.task.batches("train", self.leg.seed, self._epoch(epoch)))
            for _ in islice(batches, offset):
                pass
            if offset:  # what the data drew on the way here has been drawn before
                set_generators(before)
            for _ in range(offset, self.per):
                if self.at == self.steps or over:
                    break
                batch = next(batches, None)
                if batch is None:
                    raise DataError(
                        f"task '{self.task.name}' gave fewer training batches in an epoch than in the first"
                    )
                self._step(placed(batch, self.device))
                self.out.at = self.at
                self.out.seconds = time.perf_counter() - begun
                last = self.at % self.per == 0 or self.at == self.steps
                if last:
                    over = self._end_epoch()
                due = last or time.perf_counter() - written >= self.leg.every
                if self.file is not None and due and not over and self.at < self.steps:
                    self._write(self._state)
                    written = time.perf_counter()
                self.progress(self.at - self.start, self.steps - self.start)
        if self.session is not None:
            self.out.masks = self.session.finish()
        self._write(self._finished)
        return self.out

    def _write(self, state: Callable[[], dict[str, Any]]) -> None:
        if self.file is not None and rank() == 0:
            self.file.write(state())

    def _epoch(self, epoch: int) -> int:
        """The number of an epoch in all that a run has: rounds do not see the data in the same order."""
        return epoch + self.leg.round * math.ceil(self.steps / self.per)

    def _step(self, batch: Any) -> None:
        factor = self.leg.rate * self.task.schedule(self.at / self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
        self.model.train()
        own, weight = share(batch)
        loss = self.loss(self.model, own)
        whole = loss if self.session is None else loss + self.session.penalty()
        if world() > 1:
            loss, whole = loss * weight, whole * weight
        self.optimizer.zero_grad()
        whole.backward()
        average(self._trained())
        self.optimizer.step()
        if self.session is not None:
            self.session.step()
        agree(self.model.buffers())
        agree_on_chance(self.device)
        self.sum += loss.detach().double().cpu()
        self.seen += 1
        self.at += 1
        if self.leg.keep is not None and self.at == self._kept_at():
            self._keep()

    def _trained(self) -> list[nn.Parameter]:
        """All that has a gradient: of the model, and what else the optimizer moves, such as gates."""
        known = {id(p): p for p in self.model.parameters()}
        known |= {id(p): p for group in self.optimizer.param_groups for p in group["params"]}
        return list(known.values())

    def _end_epoch(self) -> bool:
        self.sum = total(self.sum) / world()
        loss = float(self.sum) / self.seen
        if not math.isfinite(loss):
            raise NumericalError(
                f"the loss of task '{self.task.name}' is not finite at step {self.at}: lower its learning rate"
            )
        state = generators()  # a metric may draw, and must not change the run
        metric = self.task.measure(self.model)
        set_generators(state)
        self.out.rows.append({
            "epoch": self.at / self.per, "step": self.at, "loss": loss, "metric": metric,
            "sparsity": 0.0 if self.session is None else self.session.sparsity,
            "rate": self.optimizer.param_groups[0]["lr"],
        })  # fmt: skip
        self.sum, self.seen = torch.zeros((), dtype=torch.float64), 0
        return self.watch is not None and self.watch.at_epoch(self.model, self.at, self.steps)

    def _kept_at(self) -> int:
        return round((self.leg.keep or 0.0) * self.steps)

    def _keep(self) -> None:
        self.out.kept = {k: v.detach().cpu().clone() for k, v in self.model.state_dict().items()}

    def _state(self) -> dict[str, Any]:
        return {
            "tags": dict(self.leg.tags), "done": False, "at": self.at, "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "session": None if self.session is None else self.session.state_dict(),
            "watch": None if self.watch is None else self.watch.state_dict(),
            "generators": generators(), "rows": self.out.rows, "kept": self.out.kept,
            "seconds": self.out.seconds, "sum": self.sum, "seen": self.seen,
        }  # fmt: skip

    def _finished(self) -> dict[str, Any]:
        masks = None if self.out.masks is None else dict(self.out.masks)
        return {
            "tags": dict(self.leg.tags), "done": True, "at": self.at, "model": self.model.state_dict(),
            "masks": masks, "rows": self.out.rows, "kept": self.out.kept, "seconds": self.out.seconds,
        }  # fmt: skip

    def _resume(self, saved: Mapping[str, Any]) -> None:
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        if self.session is not None:
            self.session.load_state_dict(saved["session"])
        if self.watch is not None:
            self.watch.load_state_dict(saved["watch"])
        set_generators(saved["generators"])
        self.at, self.sum, self.seen = saved["at"], saved["sum"], saved["seen"]
        self.out = Fitted(saved["rows"], None, saved["kept"], saved["at"], saved["seconds"])


def _count(batches: Any) -> int:
    count = len(batches) if hasattr(batches, "__len__") else sum(1 for _ in batches)
    if count < 1:
        raise DataError("a task gave no training batches")
    return count
