"""Train a task's model together with gates that decide, for each input, what is left out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..disk import beside
from ..errors import RecipeError
from ..masks import Masks
from ..measure import Peak, count_parameters, machine, versions
from ..processes import decided, unequal, world
from ..record import dumps
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
from .own import Asked, Own

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


def train_dynamic(task: Any, method: str, asked: Asked) -> TrainedDynamic:
    """Train a task densely, then with gates in it; what `train` does for a method of run time whose gates are learned.

    Raises:
        RecipeError, DataError, ModelError, NumericalError, OutputError: with one sentence.
    """
    own = Own(task, method, asked)
    if not own.length > 0:
        raise RecipeError(f"the gates of '{method}' are learned: length is above 0, not {own.length:g}")
    found, seed, place = own.task, asked.seed, own.device
    given = dict(asked.knobs or {})
    if asked.target is not None:
        if given.get("target") is not None:
            raise RecipeError(f"'{method}' has one target: give --target, or --set {method}.target")
        given["target"] = asked.target
    if "seed" in own.part.knobs:
        given.setdefault("seed", seed)

    loss = None if (joint := own.part.facts.get("joint")) is None else partial(joint, found.loss)

    def gated(net: nn.Module) -> Learning:
        return cast("Learning", made(net, method, placed(found.example_input(), place), _train(found, seed), **given))

    with own_generators(), Peak() as peak:
        if asked.model is None:  # what cannot be is said before the dense run
            _try(found, gated(fresh_model(found, seed).to(place)), loss, own)
        model = own.dense()
        before = found.measure(model, asked.score)
        gates = gated(model)
        module = cast("nn.Module", gates)
        leg = Leg(
            own.length * own.epochs, rate=asked.rate, seed=seed, round=1, every=asked.every,
            tags={**own.tags(model, given), "leg": "gates"},
            file=None if own.work is None else own.work / "gates.safetensors",
            loss=loss,
        )  # fmt: skip
        with answering(gates):
            begun = time.perf_counter()
            fitted = fit(
                found, module.train(), leg, attach=lambda optimizer, steps: _Keeper(gates, steps),
                progress=lambda done, of: own.say("gates", done, of),
            )  # fmt: skip
            own.earlier += max(0.0, fitted.seconds - (time.perf_counter() - begun))
            module.eval()
            gates.advance(1.0)  # a run that was over is only read
            gates.settle(placed(b, place) for b in found.batches("valid", seed, 0))
            after = found.measure(module, asked.score)
        batches = [placed(b, place) for b in islice(found.batches(asked.score, 0, 0), _MEASURED)]
        beside_dense = decided(lambda: measured(gates, batches, repeats=1))
    parameters = count_parameters(module)[0]
    record = {
        **gates.record, "task": found.describe(), "seed": seed, "epochs": own.epochs, "length": own.length,
        "rate": asked.rate, "when": "runtime", "score": asked.score, "target": asked.target, "command": asked.command,
        "before": {"metric": {"name": found.metric_name, "value": before}},
        "after": {"metric": {"name": found.metric_name, "value": after}, "parameters": parameters},
        "measured": beside_dense, "curves": own.curves + [{"leg": "gates", **row} for row in fitted.rows],
        "timings": {"total": own.seconds()}, "peak_memory": peak.bytes, "processes": world(),
        "notes": [*gates.record.get("notes", []), *unequal(module)],
        "versions": versions(), "machine": machine(),
    }  # fmt: skip
    result = TrainedDynamic(module, record)
    own.write(result)
    return result


def _try(task: Task, gates: Learning, loss: Callable[[nn.Module, Any], Tensor] | None, own: Own) -> None:
    """Ask a loss that is not the task's own of one batch, so that one that cannot be asked is refused."""
    if loss is None:
        return
    state = generators()
    if (batch := next(_train(task, own.asked.seed), None)) is not None:
        with torch.no_grad():
            loss(cast("nn.Module", gates).train(), placed(batch, own.device))
    set_generators(state)


def _train(task: Task, seed: int) -> Iterator[Any]:
    return iter(task.batches("train", seed, 0))
