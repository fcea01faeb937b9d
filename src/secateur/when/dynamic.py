"""Train a task's model together with gates that decide, for each input, what is left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Unpack, cast

import torch
from torch import Tensor, nn

from ..disk import beside
from ..errors import RecipeError
from ..masks import Masks
from ..measure import Peak, count_parameters, machine, versions
from ..record import dumps
from ..registry import get
from ..runtime import Learning, made
from ..runtime.base import answering
from ..runtime.measured import measured
from ..runtime.measured import table as compared
from ..runtime.store import write
from ..tasks import fit
from ..tasks.base import Task, placed
from ..tasks.checkpoint import generators, own_generators, set_generators
from ..tasks.loop import Leg
from .healing import fresh_model
from .own import Options, OwnRun

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
    target: str | None = None,
    knobs: Mapping[str, Any] | None = None,
    length: float = LENGTH,
    rate: float = 0.1,
    **given: Unpack[Options],
) -> TrainedDynamic:
    """Train a task densely, then with gates in it; what `train` does for a method of run time whose gates are learned.

    Args:
        knobs: of the method.
        length: of the run with gates, in lengths of the dense run.
        rate: of the run with gates: factor of the task's learning rate.
        given: see `train`; ``epochs`` are those of the dense run.

    Raises:
        RecipeError, DataError, ModelError, NumericalError, OutputError: with one sentence.
    """
    run = OwnRun(task, method, length, rate, given)
    found, part = run.task, get("transform", method)
    joint = part.facts.get("joint")
    loss = None if joint is None else partial(joint, found.loss)
    with own_generators(), Peak() as peak:
        own = dict(knobs or {})
        if target is not None:
            if own.get("target") is not None:
                raise RecipeError(f"'{method}' has one target: give --target, or --set {method}.target")
            own["target"] = target
        if "seed" in part.knobs:
            own.setdefault("seed", run.seed)

        def gated(net: nn.Module) -> Learning:
            example = placed(found.example_input(), run.device)
            return cast("Learning", made(net, method, example, _train(found, run.seed), **own))

        if given.get("model") is None:  # what cannot be is said before the dense run
            _try(found, gated(fresh_model(found, run.seed).to(run.device)), loss, run)
        model = run.dense()
        before = found.measure(model, run.score)
        gates = gated(model)
        module = cast("nn.Module", gates)
        leg = Leg(
            length * run.epochs, rate=rate, seed=run.seed, round=1, every=run.every, loss=loss,
            tags=run.tags(model, own) | {"leg": "gates"},
            file=None if run.work is None else run.work / "gates.safetensors",
        )  # fmt: skip
        with answering(gates):
            fitted = fit(
                found, module.train(), leg, attach=lambda optimizer, steps: _Keeper(gates, steps),
                progress=lambda done, of: run.say("gates", done, of),
            )  # fmt: skip
            module.eval()
            gates.advance(1.0)  # a run that was over is only read
            gates.settle(placed(b, run.device) for b in found.batches("valid", run.seed, 0))
            after = found.measure(module, run.score)
        batches = [placed(b, run.device) for b in islice(found.batches(run.score, 0, 0), _MEASURED)]
        beside_dense = measured(gates, batches, repeats=1)
    parameters = count_parameters(module)[0]
    record = {
        **gates.record, "task": found.describe(), "seed": run.seed, "epochs": run.epochs, "length": length,
        "rate": rate, "when": "runtime", "score": run.score, "target": target, "command": run.command,
        "before": {"metric": {"name": found.metric_name, "value": before}},
        "after": {"metric": {"name": found.metric_name, "value": after}, "parameters": parameters},
        "measured": beside_dense, "curves": run.curves + [{"leg": "gates", **row} for row in fitted.rows],
        "timings": {"total": run.seconds()}, "peak_memory": peak.bytes,
        "notes": gates.record.get("notes", []),
        "versions": versions(), "machine": machine(),
    }  # fmt: skip
    result = TrainedDynamic(module, record)
    run.write(result)
    return result


def _try(task: Task, gates: Learning, loss: Callable[[nn.Module, Any], Tensor] | None, run: OwnRun) -> None:
    """Ask a loss that is not the task's own of one batch, so that one that cannot be asked is refused."""
    if loss is None:
        return
    state = generators()
    if (batch := next(_train(task, run.seed), None)) is not None:
        with torch.no_grad():
            loss(cast("nn.Module", gates).train(), placed(batch, run.device))
    set_generators(state)


def _train(task: Task, seed: int) -> Iterator[Any]:
    return iter(task.batches("train", seed, 0))
