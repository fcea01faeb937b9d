"""Methods that train in a way of their own, as gates of run time and supernets do: what they are asked for, and how
all of them begin and end."""

from __future__ import annotations

import copy
import math
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, get_args

import torch
from torch import nn

from ..disk import refuse
from ..errors import RecipeError
from ..processes import agree_on_model, decided, rank
from ..registry import Part, get, parts
from ..tasks import find
from ..tasks.base import Split
from ..tasks.loop import OFTEN
from .course import Progress
from .result import digest_of

#: How long the run behind the dense one is, in lengths of that, where the part's fact ``length`` says nothing else.
LENGTH = 0.5
#: Options of `train` that are knobs of such a method.
_PLAIN = ("multiple", "calibration")


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What such a run is asked for, beside its task and its method.

    Attributes:
        epochs: of the dense run; the task's own by default.
        length, rate: of the last run: with gates in the model, or fine-tuning of what was found; shares of ``epochs``
            and of the task's learning rate.
        knobs: of the method.
        out, model, target, seed, device, every, dense, score, options, progress, command: see `train`.
    """

    epochs: float | None = None
    length: float | None = None
    rate: float = 0.1
    out: str | Path | None = None
    model: nn.Module | None = None
    target: str | None = None
    seed: int = 0
    device: str | torch.device = "cpu"
    every: float = OFTEN
    dense: str | Path | None = None
    score: Split = "test"
    options: Mapping[str, Any] | None = None
    knobs: Mapping[str, Any] | None = None
    progress: Progress | None = None
    command: str = ""


class _Result(Protocol):
    def save(self, out: str | Path) -> Any: ...


class Own:
    """One such run.

    Attributes:
        epochs: of the dense run.
        length: of the last one, as a share of that.
        knobs: of the method, with those that were not given.
        work: where checkpoints are kept; None for nowhere.
        curves: a row for each epoch of each leg.
        earlier: seconds of training that was read: before an interruption, or by another run with the same dense model.

    Raises:
        RecipeError: something cannot be so.
        OutputError: the directory is there.
    """

    def __init__(self, task: Any, method: str, asked: Asked) -> None:
        self.asked, self.part = asked, get("transform", method)
        self.task = find(task, **(asked.options or {}))
        self.knobs = self.part.knobs_with(asked.knobs or {})
        self.epochs = float(self.task.epochs if asked.epochs is None else asked.epochs)
        self.length = _length(self.part, asked.length)
        self.device = torch.device(asked.device)
        if asked.score not in get_args(Split)[1:]:
            raise RecipeError(f"score is valid or test, not '{asked.score}'")
        if not _number(asked.rate) > 0:
            raise RecipeError(f"{method}: rate is {asked.rate!r}: it is a number above 0")
        self.folder = None if asked.out is None else Path(asked.out)
        self.work = None if self.folder is None else self.folder.with_name(self.folder.name + ".run")
        if self.folder is not None:
            there = self.folder
            decided(lambda: refuse(there))
        self.curves: list[dict[str, Any]] = []
        self.earlier = 0.0
        self._begun = time.perf_counter()

    def dense(self) -> nn.Module:
        """The model that was given, copied, or a dense run."""
        from .train import train

        asked = self.asked
        if asked.model is not None:
            model = copy.deepcopy(asked.model).to(self.device)
            agree_on_model(model)
            return model
        begun = time.perf_counter()
        made = train(
            self.task, epochs=self.epochs, seed=asked.seed, device=asked.device, every=asked.every, score=asked.score,
            progress=asked.progress, dense=asked.dense or (None if self.work is None else self.work / "dense"),
        )  # fmt: skip
        self.earlier += max(0.0, made.run["timings"]["total"] - (time.perf_counter() - begun))
        self.curves += [{**row, "leg": "dense"} for row in made.run["curves"]]
        found: nn.Module = made.model
        return found

    def tags(self, model: nn.Module, knobs: Mapping[str, Any]) -> dict[str, Any]:
        """What a checkpoint says of the run: one of another run is refused."""
        return {
            "task": {**self.task.describe(), "options": {k: str(v) for k, v in self.task.options.items()}},
            "method": self.part.name, "knobs": {k: str(v) for k, v in sorted(knobs.items())}, "epochs": self.epochs,
            "length": self.length, "rate": self.asked.rate, "seed": self.asked.seed,
            "given": digest_of(model.state_dict()),
        }  # fmt: skip

    def say(self, name: str, done: int, of: int) -> None:
        """Tell what is being done."""
        if self.asked.progress is not None:
            self.asked.progress(name, done, of)

    def seconds(self) -> float:
        """What the run took until now, with what it took before."""
        return time.perf_counter() - self._begun + self.earlier

    def write(self, made: _Result) -> None:
        """What was made, in place of the checkpoints."""
        if self.folder is not None and self.work is not None and rank() == 0:
            made.save(self.folder)
            shutil.rmtree(self.work, ignore_errors=True)


def _length(part: Part, given: Any) -> float:
    found = _number(part.facts.get("length", LENGTH) if given is None else given)
    if not found >= 0:
        raise RecipeError(f"{part.name}: length is {given!r}: it is a number of 0 or more")
    return found


def _number(given: Any) -> float:
    """What is given as a finite number; else not a number."""
    right = isinstance(given, (int, float)) and not isinstance(given, bool) and math.isfinite(given)
    return float(given) if right else math.nan


def own_options(method: str, axes: Mapping[str, Any]) -> dict[str, Any]:
    """The options of such a run: a seed and the method's own knobs, ``{"fbs": {...}}`` or plain; axes are refused.

    Raises:
        RecipeError: with the first that such a method does not have.
    """
    given = {k: v for k, v in axes.items() if v not in (None, [], ())}
    part = parts("transform")[method]
    plain = {k: given.pop(k) for k in _PLAIN if k in given and k in part.knobs}
    if unused := sorted(set(given) - {"seed", "knobs", "length", "rate"}):
        raise RecipeError(f"'{method}' has no {unused[0]}: give --target, or --set {method}.KNOB=VALUE")
    knobs = given.pop("knobs", {})
    if others := sorted(k for k, v in knobs.items() if k != method and isinstance(v, Mapping)):
        raise RecipeError(f"'{method}' has no part '{others[0]}': write --set {method}.KNOB=VALUE")
    own = {**plain, **knobs.get(method, knobs)}
    for name in {"length", "rate"} & (own.keys() - part.knobs.keys()):  # of the run, also as --set METHOD.length
        given[name] = own.pop(name)
    part.knobs_with(own)
    return {**given, "knobs": own}


def training_runs(method: str, options: Mapping[str, Any]) -> float:
    """How many dense runs all training of such a method takes, that one included.

    The part's fact ``span`` names the knob that says how long its own training is, in lengths of the dense run.

    Args:
        options: as `own_options` gives them.

    >>> training_runs("fbs", {"length": 0.25}), training_runs("fbs", {})
    (1.25, 1.5)
    """
    part = parts("transform")[method]
    span = part.knobs_with(options.get("knobs") or {})[part.facts["span"]] if "span" in part.facts else 0.0
    return 1.0 + float(span) + _length(part, options.get("length"))
