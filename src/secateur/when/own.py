"""What runs of methods that train in a way of their own have in common: options, and the dense run at the start."""

from __future__ import annotations

import copy
import math
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict, get_args

import torch
from torch import nn

from ..disk import refuse
from ..errors import RecipeError
from ..tasks import find
from ..tasks.base import Split
from ..tasks.loop import OFTEN
from .course import Progress
from .result import digest_of


class Options(TypedDict, total=False):
    """Options of such a run, as `train` has them."""

    epochs: float | None
    out: str | Path | None
    model: nn.Module | None
    seed: int
    device: str | torch.device
    every: float
    dense: str | Path | None
    score: Split
    options: Mapping[str, Any] | None
    progress: Progress | None
    command: str


class OwnRun:
    """A run under way: what it was given, where it is kept, and the dense model.

    Args:
        length: how long what the method trains is, in lengths of the dense run; ``least`` says whether it may be 0.
        rate: factor of the task's learning rate in it.
        given: the other options.

    Attributes:
        curves: of the dense run, a row for each epoch.

    Raises:
        RecipeError, OutputError: an option makes no sense, or ``out`` is there.
    """

    def __init__(self, task: Any, method: str, length: float, rate: float, given: Options, least: bool = False) -> None:
        self.task = find(task, **(given.get("options") or {}))
        self.method, self.length, self.rate, self.given = method, length, rate, given
        epochs = given.get("epochs")
        self.epochs = float(self.task.epochs if epochs is None else epochs)
        self.seed, self.every = given.get("seed", 0), given.get("every", OFTEN)
        self.score: Split = given.get("score", "test")
        self.device, self.command = torch.device(given.get("device", "cpu")), given.get("command", "")
        self.say = given.get("progress") or (lambda *_: None)
        for name, value, zero in (("length", length, least), ("rate", rate, False)):
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if not number or value < 0 or (value == 0 and not zero):
                raise RecipeError(
                    f"{method}: {name} is {value!r}: it is a number {'of 0 or more' if zero else 'above 0'}"
                )
        if self.score not in get_args(Split)[1:]:
            raise RecipeError(f"score is valid or test, not '{self.score}'")
        out = given.get("out")
        self.folder = None if out is None else Path(out)
        self.work = None if self.folder is None else self.folder.with_name(self.folder.name + ".run")
        if self.folder is not None:
            refuse(self.folder)
        self.curves: list[dict[str, Any]] = []
        self.begun = time.perf_counter()

    def dense(self) -> nn.Module:
        """A copy of the model that was given; else the task's, trained densely."""
        from .train import train

        if (model := self.given.get("model")) is not None:
            return copy.deepcopy(model).to(self.device)
        shared = self.given.get("dense") or (None if self.work is None else self.work / "dense")
        made = train(
            self.task, epochs=self.epochs, seed=self.seed, device=self.device, every=self.every, dense=shared,
            score=self.score, progress=self.given.get("progress"),
        )  # fmt: skip
        self.curves = [*made.run["curves"]]
        net: nn.Module = made.model
        return net

    def tags(self, model: nn.Module, knobs: Mapping[str, Any]) -> dict[str, Any]:
        """What its checkpoints are of: those of another run are refused."""
        return {
            "task": {**self.task.describe(), "options": {k: str(v) for k, v in self.task.options.items()}},
            "method": self.method, "knobs": {k: str(v) for k, v in sorted(knobs.items())}, "epochs": self.epochs,
            "length": self.length, "rate": self.rate, "seed": self.seed, "given": digest_of(model.state_dict()),
        }  # fmt: skip

    def seconds(self) -> float:
        return time.perf_counter() - self.begun

    def write(self, result: Any) -> None:
        """Save what was made, and let go of the checkpoints."""
        if self.folder is not None and self.work is not None:
            result.save(self.folder)
            shutil.rmtree(self.work, ignore_errors=True)
