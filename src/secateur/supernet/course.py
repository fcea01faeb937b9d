"""A run that ends in a sub-network: its legs, its checkpoints, and what it has to say."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..calibrate import recalibrate
from ..errors import ModelError
from ..processes import decided, rank
from ..search.explore import Trial, explore
from ..search.run import Log
from ..search.space import Counts, Space
from ..structured.targets import Target
from ..tasks import Task, fit
from ..tasks.base import placed
from ..tasks.loop import OFTEN, Leg


@dataclass(eq=False)
class Course:
    """What a search over sub-networks has to work with.

    Attributes:
        model: the whole one, trained as far as the user wants it to be; it is trained on in place.
        epochs: the length of the task's runs.
        length, rate: of the fine-tuning of what is found, as shares of ``epochs`` and of the task's learning rate.
        folder: of the checkpoints; None to keep none.
        tags: what the run is; a checkpoint of another one is refused.
        curves: a row for each epoch of each leg.
        found: the record of the search, as JSON data.
        passes: leg -> how many networks see each sample of it, where these are several.
        tried: how many sub-networks were judged in searches.
        earlier: seconds of work that was read: before an interruption.
    """

    task: Task
    model: nn.Module
    target: Target
    epochs: float
    seed: int = 0
    length: float = 0.25
    rate: float = 0.1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    folder: Path | None = None
    every: float = OFTEN
    tags: Mapping[str, Any] = field(default_factory=dict)
    progress: Callable[[str, int, int], None] = lambda *_: None
    curves: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    found: dict[str, Any] = field(default_factory=dict)
    passes: dict[str, int] = field(default_factory=dict)
    tried: int = 0
    earlier: float = 0.0

    def train(
        self, name: str, model: nn.Module, epochs: float, number: int, *, rate: float = 1.0,
        loss: Callable[[nn.Module, Any], Tensor] | None = None, passes: int = 1,
    ) -> None:  # fmt: skip
        """A leg of training, or what a checkpoint has of it."""
        if epochs <= 0:
            return
        if passes != 1:
            self.passes[name] = passes
        leg = Leg(
            epochs, rate=rate, loss=loss, seed=self.seed, round=number, every=self.every,
            tags={**self.tags, "leg": name}, file=self.file(f"{name}.safetensors"),
        )  # fmt: skip
        begun = time.perf_counter()
        made = fit(self.task, model, leg, progress=lambda done, of: self.progress(name, done, of))
        self.earlier += max(0.0, made.seconds - (time.perf_counter() - begun))
        self.curves += [{"leg": name, **row} for row in made.rows]

    def file(self, name: str) -> Path | None:
        """Where something is kept until the run is over."""
        return None if self.folder is None else self.folder / name

    def kept(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """JSON data that an interrupted run has made already, or that is made now.

        Raises:
            ModelError: it is of another run.
        """
        file = self.file(name)
        known = decided(lambda: json.loads(file.read_text("utf-8")) if file is not None and file.exists() else None)
        if known is not None:
            if known["tags"] != json.loads(json.dumps(self.tags)):
                raise ModelError(f"{file} is of another run: choose another --out, or delete it")
            return dict(known)
        made = {**make(), "tags": self.tags}
        if file is not None and rank() == 0:
            file.parent.mkdir(parents=True, exist_ok=True)
            part = file.with_name(f".{file.name}.tmp")
            part.write_text(json.dumps(made), encoding="utf-8")
            part.replace(file)
        return made

    def example(self) -> Any:
        """Inputs of one forward pass."""
        return placed(self.task.example_input(), next(self.model.parameters()).device)

    def few(self, count: int) -> list[Any]:
        """Training batches."""
        return [placed(b, self.device) for b in islice(self.task.batches("train", self.seed, 0), count)]

    def value(self, model: nn.Module, batches: Sequence[Any]) -> float:
        """The metric on the validation data, higher being better, with statistics of batch norms of its own."""
        recalibrate(model, batches)
        found = self.task.measure(model, "valid")
        return found if self.task.higher_is_better else -found

    def search(
        self, name: str, space: Space, value: Callable[[Counts], float], strategy: str, budget: int
    ) -> list[Trial]:
        """Sub-networks that meet the target and what they are worth; goes on with those that were tried before.

        Of several processes the first one judges and writes, and all go on by what it says.
        """
        header = {
            **self.tags, "search": name, "strategy": strategy, "budget": budget, "limit": space.limit,
            "names": [n.name for n in space.nodes],
        }  # fmt: skip
        file = self.file(f"{name}.jsonl")
        log = None if file is None or rank() else Log(file, header)
        before = decided(lambda: [] if log is None else log.rows[:])

        def done(trial: Trial) -> None:
            if trial.number < len(before):
                self.earlier += trial.seconds
            elif log is not None:
                log.add(trial)
            self.progress(name, trial.number + 1, budget)

        trials = explore(
            space, strategy, lambda counts: decided(lambda: value(counts)), budget=budget, seed=self.seed,
            record=before, done=done,
        )  # fmt: skip
        self.tried += len(trials)
        return trials


def in_order(trials: Sequence[Trial]) -> list[Trial]:
    """The best first; of several that are as good, the earlier."""
    return sorted(trials, key=lambda t: (-t.value, t.number))
