"""The legs of a whole run, one after the other, and the record of it."""

from __future__ import annotations

import copy
import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..calibrate import recalibrate
from ..formats import OnGrid
from ..granularity import parse
from ..layers import find_layers
from ..masks import Masks
from ..measure import count_parameters
from ..processes import unequal, world
from ..prune import prune
from ..recipe import Recipe
from ..record import run_record
from ..recover.distill import lessons
from ..registry import get
from ..schedule import sparsity_at
from ..structured import plan_zeros
from ..tasks import Fitted, Live, Task, fit
from ..tasks.base import Split, placed
from ..tasks.loop import OFTEN, Leg
from .early import EarlyBird
from .healing import Healing, fitting, fresh_model
from .result import check_zeros, digest_of, layer_record, paced
from .session import attach

#: Called with what is being done, the steps done and their number.
Progress = Callable[[str, int, int], None]


def trains(recipe: Recipe) -> bool:
    """Whether its recovery trains on the task."""
    return get("recovery", recipe.recovery).facts.get("data") == "task"


def early(recipe: Recipe) -> bool:
    """Whether its driver watches the epochs of a dense run."""
    return "distances" in get("driver", recipe.driver).needs


def settled(recipe: Recipe) -> bool:
    """Whether training itself settles which units of the whole model go: gates, a penalty, or masks that change."""
    return bool(parse(recipe.granularity).coupled) and (
        recipe.learns or (recipe.driver != "once" and not early(recipe))
    )


@dataclass(eq=False)
class Course:
    """A whole run: its legs, one after the other. Legs that a checkpoint says are over are read, not trained.

    Attributes:
        moment: ``before``, ``during`` or ``after``.
        folder: of the checkpoints; None to keep none.
        given: a trained model in place of the dense run.
        ticket: masks that are held in place of a method.
        shared: a folder of dense runs.
        target, multiple: of units of the whole model.
        score: the split that the figures before and after are measured on.
        grids: what weights were rounded to, where the recipe's solver does that.
        earlier: seconds of training that was read: before an interruption, or by another run with the same dense model.
    """

    task: Task
    recipe: Recipe
    moment: str
    epochs: float
    folder: Path | None = None
    given: nn.Module | None = None
    ticket: Mapping[str, Tensor] | None = None
    calibration: int = 8
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    every: float = OFTEN
    progress: Progress = lambda *_: None
    shared: Path | None = None
    target: str | None = None
    multiple: int = 8
    score: Split = "test"
    masks: dict[str, Tensor] = field(default_factory=dict)
    grids: dict[str, OnGrid] = field(default_factory=dict)
    curves: list[dict[str, Any]] = field(default_factory=list)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    before: dict[str, Any] | None = None
    early: Mapping[str, Tensor] | None = None
    watch: EarlyBird | None = None
    earlier: float = 0.0
    _dense: nn.Module | None = None

    def __post_init__(self) -> None:
        given, task = self.given, self.task
        self.begun = time.perf_counter()
        self.tags = {
            "task": {**task.describe(), "options": {k: str(v) for k, v in task.options.items()}},
            "recipe": self.recipe.digest, "epochs": self.epochs, "when": self.moment,
            "given": [digest_of(x) for x in (self.ticket, None if given is None else given.state_dict())],
            **({} if self.target is None else {"target": self.target}),
            **({} if self.multiple == 8 else {"multiple": self.multiple}),
        }  # fmt: skip

    def go(self) -> nn.Module:
        made = self._after() if self.moment == "after" else self._along()
        self.notes += unequal(made)
        check_zeros(made, self.masks)
        return made

    # -- legs --------------------------------------------------------------------------------------

    def _leg(self, name: str, epochs: float, number: int, **fields: Any) -> Leg:
        return Leg(
            epochs, seed=self.recipe.seed, round=number, every=self.every, tags={**self.tags, "leg": name},
            file=None if self.folder is None else self.folder / f"{name}.safetensors", **fields,
        )  # fmt: skip

    def _fit(self, name: str, model: nn.Module, number: int = 0, attach: Any = None, **fields: Any) -> Fitted:
        watch = fields.pop("watch", None)
        leg = self._leg(name, self.epochs, number, **fields)
        if self.shared is not None and watch is None and (name == "dense" or self._plain):
            leg = self._shared(leg)
        begun = time.perf_counter()
        made = fit(self.task, model, leg, attach=attach, watch=watch, progress=self._doing(name))
        self.earlier += max(0.0, made.seconds - (time.perf_counter() - begun))
        self.curves += [{"leg": name, **row} for row in made.rows]
        return made

    @property
    def _plain(self) -> bool:
        """Whether all of it is the dense run."""
        return self.recipe.method == "dense" and self.ticket is None and self.given is None

    def _shared(self, leg: Leg) -> Leg:
        """The dense run, which does not depend on what comes after it, in a place of its own."""
        tags = {k: v for k, v in self.tags.items() if k in ("task", "epochs")}
        tags |= {"seed": leg.seed, "keep": leg.keep, "leg": "dense"}
        name = hashlib.sha256(json.dumps(tags, sort_keys=True).encode()).hexdigest()[:16]
        assert self.shared is not None
        return replace(leg, tags=tags, file=self.shared / f"dense-{name}.safetensors")

    def _doing(self, name: str) -> Callable[[int, int], None]:
        return lambda done, of: self.progress(name, done, of)

    def _fresh(self) -> nn.Module:
        return fresh_model(self.task, self.recipe.seed).to(self.device)

    def _start(self) -> nn.Module:
        """What training begins with: the model that was given, or fresh weights."""
        return self._fresh() if self.given is None else copy.deepcopy(self.given).to(self.device)

    def _batches(self) -> list[Any]:
        found = self.task.batches("train", self.recipe.seed, 0)
        return [placed(b, self.device) for b in islice(found, self.calibration)]

    def _evidence(self) -> dict[str, Any]:
        return {"data": self._batches(), "loss": self.task.loss} if self.recipe.needs_data else {}

    # -- before and during -------------------------------------------------------------------------

    def _along(self) -> nn.Module:
        model, recipe = self._start(), self._unhealed()
        session: Callable[[Any, int], Live] | None = None
        if settled(recipe):
            return self._healed(self._learned("train", model))
        if self.ticket is not None:
            held, lost = fitting(self.ticket, model)
            self.notes += (
                [f"{len(lost)} masks fit no layer of this model and were left out, e.g. {lost[0]}"] if lost else []
            )
            self.masks = {n: m.to(self.device) for n, m in held.items()}
            session = lambda optimizer, steps: attach(model, optimizer=optimizer, masks=self.masks)  # noqa: E731
        elif parse(recipe.granularity).coupled:
            model = self._smaller(model)
        elif recipe.method != "dense":
            data = self._batches()
            session = lambda optimizer, steps: attach(  # noqa: E731
                model, paced(recipe, steps), optimizer=optimizer, steps=steps, data=data, loss=self.task.loss
            )
        made = self._fit("train", model, attach=session)
        if made.masks is not None:
            self.masks = dict(made.masks)
        return self._healed(model)

    def _unhealed(self) -> Recipe:
        """The recipe without what heals by training: that comes after, in legs of its own."""
        return self.recipe.override(recovery="none") if trains(self.recipe) else self.recipe

    def _healed(self, model: nn.Module) -> nn.Module:
        if trains(self.recipe):
            self._heal(model, "recovery", 1)
        return model

    @property
    def _goal(self) -> dict[str, Any]:
        return {"target": self.target, "multiple": self.multiple}

    def _example(self) -> Any:
        return placed(self.task.example_input(), self.device)

    def _learned(self, name: str, model: nn.Module) -> nn.Module:
        """Train while gates, a penalty or masks settle which units go, and cut those.

        The dense model is the teacher of gates where it teaches.
        """
        recipe, teaches = self._unhealed(), get("recovery", self.recipe.recovery).facts.get("teacher")
        gated, example = recipe.gate != "none", self._example()
        penalized = recipe.penalty != "none" and not gated
        alone = recipe.override(recovery="none") if penalized else recipe
        session = lambda optimizer, steps: attach(  # noqa: E731
            model, paced(alone, steps), optimizer=optimizer, steps=steps, example=example, **self._goal
        )
        loss = lessons(self._healing(model, name, 1), **self.recipe.knobs_of("recovery")) if gated and teaches else None
        self._fit(name, model, attach=session, loss=loss)
        if penalized:
            return self._smaller(model)
        goal = self.target if self.target is not None else f"params {100 * recipe.sparsity:g}%"
        small = self._cut(plan_zeros(model, recipe, target=goal, example=example, multiple=self.multiple))
        if gated and get("gate", recipe.gate).facts.get("mixes"):  # batch norms have seen other widths than are left
            recalibrate(small, self._batches())
        return small

    def _smaller(self, model: nn.Module) -> nn.Module:
        """Take coupled units away; what training heals is not healed by anything else first."""
        recipe = self._unhealed().override(driver="once")
        evidence = self._evidence()
        if recipe.recovery != "none":
            evidence = {"data": self._batches(), "loss": self.task.loss}
        example = self._example()
        return self._cut(prune(copy.deepcopy(model), recipe, example=example, **self._goal, **evidence))

    def _cut(self, plan: Any) -> nn.Module:
        self.notes += plan.notes
        small: nn.Module = plan.shrink()
        return small

    # -- after ---------------------------------------------------------------------------------------

    def _after(self) -> nn.Module:
        model = self._trained()
        self.before = self._figures(model)
        if early(self.recipe):
            self.before = None  # the dense run ended early: it is not what dense training reaches
        part = get("recovery", self.recipe.recovery)
        if part.facts.get("teacher"):
            self._dense = copy.deepcopy(model)
        if parse(self.recipe.granularity).coupled:
            if not settled(self.recipe):
                return self._healed(self._smaller(model))
            return self._healed(self._learned("gates" if self.recipe.gate != "none" else "penalty", model))
        recipe = self.recipe.override(driver="once")
        if not trains(recipe):
            done = prune(model, recipe, **self._evidence())
            self.masks, self.grids = dict(done.masks), done.grids
            return model
        for k in range(1, recipe.steps + 1):
            share = sparsity_at(recipe.schedule, k / recipe.steps, recipe.sparsity)
            one = recipe.override(steps=1, schedule="one-shot", recovery="none", sparsity=share)
            done = prune(model, one, masks=self.masks or None, **self._evidence())
            self.masks, self.grids = dict(done.masks), done.grids
            self._heal(model, f"round-{k}", k)
        return model

    def _trained(self) -> nn.Module:
        """The dense model, trained to the end, or until its early-bird ticket shows."""
        if self.given is not None:
            return copy.deepcopy(self.given).to(self.device)
        model = self._fresh()
        part, keep = get("recovery", self.recipe.recovery), None
        if "keeps" in part.facts:
            keep = float(self.recipe.knobs_of("recovery")[part.facts["keeps"]])
        if early(self.recipe):
            self.watch = EarlyBird(self.recipe, **self._evidence())
        made = self._fit("dense", model, keep=keep, watch=self.watch)
        self.early = made.kept
        if self.watch is not None:
            self.notes.append(f"the ticket was drawn after step {made.at} of the dense run")
        return model

    def _healing(self, model: nn.Module, name: str, number: int) -> Healing:
        legs = iter(range(1, 100))

        def leg(epochs: float, **fields: Any) -> Leg:
            count = next(legs)
            return self._leg(name if count == 1 else f"{name}-{count}", epochs, number, **fields)

        return Healing(
            self.task, model, self.masks, self.epochs, self.recipe.seed, leg, self._teacher,
            None if self.early is None else lambda to: self.early or {}, self._doing(name), grids=self.grids,
        )  # fmt: skip

    def _heal(self, model: nn.Module, name: str, number: int) -> None:
        part, healing = get("recovery", self.recipe.recovery), self._healing(model, name, number)
        part.function(healing, **self.recipe.knobs_of("recovery"))
        self.earlier += healing.earlier
        self.curves += [{"leg": name, **row} for row in healing.rows]
        self.rounds.append({
            "leg": name, "sparsity": Masks(self.masks).sparsity, "untrained": healing.untrained,
            "metric": self.task.measure(model),
        })  # fmt: skip

    def _teacher(self) -> nn.Module:
        if self._dense is None:  # a method of before or during training has no dense model of its own
            self._dense = self._fresh()
            self._fit("dense", self._dense)
        return copy.deepcopy(self._dense)

    # -- the record --------------------------------------------------------------------------------

    def _figures(self, model: nn.Module) -> dict[str, Any]:
        parameters, nonzero = count_parameters(model)
        value = self.task.measure(model, self.score)
        return {
            "metric": {"name": self.task.metric_name, "value": value}, "parameters": parameters, "nonzero": nonzero,
        }  # fmt: skip

    def record(self, model: nn.Module, memory: int, command: str) -> dict[str, Any]:
        """The content of ``run.json``."""
        layers, skipped = find_layers(model, only=("*",))
        records = [layer_record(x.name, x.shape, self.masks[x.name]) for x in layers if x.name in self.masks]
        run = run_record(
            recipe=self.recipe,
            model={"source": f"task {self.task.name}", "class": type(model).__name__,
                   "parameters": count_parameters(model)[0], "blocks": 0},
            records=records, skipped=skipped, data={"source": f"task {self.task.name}"},
            timings={"total": time.perf_counter() - self.begun + self.earlier}, peak_memory=memory, command=command,
            before=self.before, after=self._figures(model), notes=self.notes,
        )  # fmt: skip
        distances = self.watch.distances if self.watch is not None else None
        return {
            **run, "task": self.task.describe(), "epochs": self.epochs, "when": self.moment, "score": self.score,
            "target": self.target, "processes": world(), "curves": self.curves, "rounds": self.rounds,
            **({"distances": distances} if distances else {}),
        }  # fmt: skip
