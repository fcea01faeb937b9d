"""Train a task's model together with gates that decide, for each input, what is left out."""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..disk import beside, refuse
from ..masks import Masks
from ..measure import Peak, count_parameters, machine, versions
from ..record import dumps
from ..registry import get
from ..runtime import Learning, made
from ..runtime.base import answering
from ..runtime.measured import measured
from ..runtime.measured import table as compared
from ..runtime.store import write
from ..tasks import find, fit
from ..tasks.base import Split, Task, placed
from ..tasks.checkpoint import own_generators
from ..tasks.loop import OFTEN, Leg
from .course import Progress
from .healing import fresh_model
from .result import digest_of

#: How long the run with gates is, in lengths of the dense run.
LENGTH = 0.5
#: Batches that the result is measured on, beside the dense model.
_MEASURED = 4


@dataclass(eq=False)
class TrainedDynamic:
    """A model that decides while it runs, trained, with the record of what was done. Prints as a small table.

    Attributes:
        model: the gated module, in evaluation mode; ``model.model`` is the dense one.
        run: the content of ``run.json``.
    """

    model: nn.Module
    run: dict[str, Any] = field(repr=False)

    @property
    def gates(self) -> Learning:
        """The gated module, for what it says of itself."""
        return cast("Learning", self.model)

    @property
    def metric(self) -> float:
        """The task's metric, on the test data unless the run was scored on the validation data."""
        return float(self.run["after"]["metric"]["value"])

    @property
    def masks(self) -> Masks:
        """Empty: nothing is gone for all inputs."""
        return Masks({})

    @property
    def sparsity(self) -> float:
        """0: nothing is gone for all inputs."""
        return 0.0

    def save(self, out: str | Path) -> Path:
        """Write the dense weights, the gates and ``run.json``.

        Raises:
            OutputError: the directory exists and is not empty.
        """
        with beside(out) as part:
            write(self.gates, part)
            (part / "run.json").write_text(dumps(self.run), encoding="utf-8")
        return Path(out)

    def __str__(self) -> str:
        before, after = self.run["before"]["metric"], self.run["after"]["metric"]
        first = f"{self.gates.record['method']} on task {self.run['task']['name']}"
        score = f"{after['name'] + ', ' + self.run['score']:24}{before['value']:>12.4f} dense{after['value']:>12.4f}"
        return "\n".join((first, score, compared(self.gates, self.run["measured"])))


@dataclass(eq=False)
class _Keeper:
    """What the loop knows as the session of a run: it tells the gates how far the run is, and adds their penalty."""

    gates: Learning
    steps: int
    at: int = 0
    sparsity: float = 0.0

    def __post_init__(self) -> None:
        self.gates.advance(0.0)

    def step(self) -> None:
        self.at += 1
        self.gates.advance(self.at / self.steps)

    def penalty(self) -> Tensor:
        return self.gates.penalty()

    def finish(self) -> Masks:
        return Masks({})

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.at = int(state["at"])
        self.gates.advance(self.at / self.steps)


def train_dynamic(
    task: Any,
    method: str,
    *,
    epochs: float | None = None,
    length: float = LENGTH,
    rate: float = 0.1,
    out: str | Path | None = None,
    model: nn.Module | None = None,
    target: str | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    every: float = OFTEN,
    dense: str | Path | None = None,
    score: Split = "test",
    options: Mapping[str, Any] | None = None,
    knobs: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    command: str = "",
) -> TrainedDynamic:
    """Train a task densely, then with gates in it; what `train` does for a method of run time whose gates are learned.

    Args:
        epochs: of the dense run; the task's own by default.
        length: of the run with gates, in lengths of the dense run.
        rate: of the run with gates: factor of the task's learning rate.
        knobs: of the method.
        out, model, target, seed, device, every, dense, score, options, progress, command: see `train`.

    Raises:
        RecipeError, DataError, ModelError, NumericalError, OutputError: with one sentence.
    """
    from .train import train

    found = find(task, **(options or {}))
    whole = float(found.epochs if epochs is None else epochs)
    folder = None if out is None else Path(out)
    work = None if folder is None else folder.with_name(folder.name + ".run")
    if folder is not None:
        refuse(folder)
    say = progress or (lambda *_: None)
    begun = time.perf_counter()
    with own_generators(), Peak() as peak:
        curves: list[dict[str, Any]] = []
        given = dict(knobs or {}) | ({} if target is None else {"target": target})
        if "seed" in get("transform", method).knobs:
            given.setdefault("seed", seed)

        def gated(net: nn.Module) -> Learning:
            example = placed(found.example_input(), torch.device(device))
            return cast("Learning", made(net, method, example, _train(found, seed), **given))

        if model is None:
            gated(fresh_model(found, seed).to(device))  # what cannot be is said before the dense run
            own = None if work is None else work / "dense"
            run = train(
                found, epochs=whole, seed=seed, device=device, every=every, dense=dense or own, score=score,
                progress=progress,
            )  # fmt: skip
            model, curves = run.model, run.run["curves"]
        else:
            model = copy.deepcopy(model).to(device)
        before = found.measure(model, score)
        gates = gated(model)
        module = cast("nn.Module", gates)
        tags = {
            "task": {**found.describe(), "options": {k: str(v) for k, v in found.options.items()}},
            "method": method, "knobs": {k: str(v) for k, v in sorted(given.items())}, "epochs": whole,
            "length": length, "rate": rate, "leg": "gates", "seed": seed, "given": digest_of(model.state_dict()),
        }  # fmt: skip
        leg = Leg(
            length * whole, rate=rate, seed=seed, round=1, every=every, tags=tags,
            file=None if work is None else work / "gates.safetensors",
            loss=None if (joint := get("transform", method).facts.get("joint")) is None else partial(joint, found.loss),
        )  # fmt: skip
        place = torch.device(device)
        with answering(gates):
            fitted = fit(
                found, module.train(), leg, attach=lambda optimizer, steps: _Keeper(gates, steps),
                progress=lambda done, of: say("gates", done, of),
            )  # fmt: skip
            module.eval()
            gates.advance(1.0)  # a run that was over is only read
            gates.settle(placed(b, place) for b in found.batches("valid", seed, 0))
            after = found.measure(module, score)
        batches = [placed(b, place) for b in islice(found.batches(score, 0, 0), _MEASURED)]
        beside_dense = measured(gates, batches, repeats=1)
    parameters = count_parameters(module)[0]
    record = {
        **gates.record, "task": found.describe(), "seed": seed, "epochs": whole, "length": length, "rate": rate,
        "when": "runtime", "score": score, "target": target, "command": command,
        "before": {"metric": {"name": found.metric_name, "value": before}},
        "after": {"metric": {"name": found.metric_name, "value": after}, "parameters": parameters},
        "measured": beside_dense, "curves": curves + [{"leg": "gates", **row} for row in fitted.rows],
        "timings": {"total": time.perf_counter() - begun}, "peak_memory": peak.bytes,
        "notes": gates.record.get("notes", []),
        "versions": versions(), "machine": machine(),
    }  # fmt: skip
    result = TrainedDynamic(module, record)
    if folder is not None:
        result.save(folder)
        shutil.rmtree(folder.with_name(folder.name + ".run"), ignore_errors=True)
    return result


def _train(task: Task, seed: int) -> Iterator[Any]:
    return iter(task.batches("train", seed, 0))
