"""Train a task with a method: before, during or after training, in rounds, with recovery; one loop for all of them."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RecipeError
from ..granularity import parse
from ..layers import find_layers
from ..masks import Masks
from ..measure import Peak, count_parameters
from ..prune import prune
from ..recipe import Recipe
from ..record import run_record
from ..recover.distill import lessons
from ..registry import get, parts
from ..schedule import sparsity_at
from ..tasks import Fitted, Live, Task, find, fit
from ..tasks.base import placed
from ..tasks.checkpoint import own_generators
from ..tasks.loop import OFTEN, Leg
from .early import EarlyBird
from .healing import NO_WAY_BACK, Healing, fitting, fresh_model
from .result import Trained, check_zeros, digest_of, layer_record, paced, refuse
from .session import attach

#: Called with what is being done, the steps done and their number.
Progress = Callable[[str, int, int], None]


def train(
    task: Any,
    method: str | Recipe | None = None,
    *,
    epochs: float | None = None,
    out: str | Path | None = None,
    model: nn.Module | None = None,
    masks: Mapping[str, Tensor] | None = None,
    when: str | None = None,
    calibration: int = 8,
    device: str | torch.device = "cpu",
    every: float = OFTEN,
    dense: str | Path | None = None,
    options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    command: str = "",
    **axes: Any,
) -> Trained:
    """Train a task, and prune it as the method says.

    Without a method the training is dense. A method of before or during training keeps its masks through the whole
    run (`attach`). One of after training trains densely first; then each of its rounds (``steps``) prunes and recovers:
    by fine-tuning, distillation, rewinding, or from scratch.

    Args:
        task: the name of a ready task (``secateur tasks``), ``FILE.py:NAME``, or an object with ``model`` and
            ``batches``; see `tasks.Task`.
        method: a named method or a `Recipe`.
        epochs: of a whole training run; the task's own by default.
        out: a directory to write. The run's checkpoints lie beside it (``OUT.run``) until it is there: the same call
            goes on where it was stopped, and ends with the same weights, bit by bit.
        model: trained already: the dense run is left out. It stays as it is.
        masks: held from the first step on in place of a method: a ticket found on another task.
        when: ``before``, ``during`` or ``after``; the named method's own by default.
        calibration: training batches for methods that measure on data.
        device: where it is trained.
        every: seconds between two checkpoints within an epoch.
        dense: a folder where dense runs are kept, for all calls that begin with the same one.
        options: sizes of a ready task.
        progress: called with what is being done, the steps done and their number.
        axes: fields of the recipe: ``sparsity``, ``steps`` (rounds), ``recovery``, ``seed``, ``knobs``, ...

    Raises:
        RecipeError, DataError, ModelError, NumericalError, OutputError: with one sentence.

    >>> made = train("digits", "gmp", sparsity=0.8, epochs=0.25, knobs={"driver": {"every": 2}})
    >>> round(made.sparsity, 2)
    0.8
    """
    found = find(task, **(options or {}))
    recipe, moment = _recipe(method, axes, masks, when)
    target = None if out is None else Path(out)
    length = float(found.epochs if epochs is None else epochs)
    rewinds = "keeps" in get("recovery", recipe.recovery).facts and recipe.knobs_of("recovery")["weights"]
    if rewinds and (moment != "after" or model is not None or parse(recipe.granularity).coupled):
        raise RecipeError(NO_WAY_BACK)
    if target is not None:
        refuse(target)
    with own_generators(), Peak() as peak:
        run = _Course(
            found, recipe, moment, length, target, model, masks, calibration, torch.device(device), every,
            progress or (lambda *_: None), None if dense is None else Path(dense),
        )  # fmt: skip
        made = run.go()
    record = run.record(made, peak.bytes, command)
    result = Trained(made.eval(), recipe, Masks(run.masks), record)
    if target is not None:
        result.save(target)
        shutil.rmtree(run.folder, ignore_errors=True)  # type: ignore[arg-type]
    return result


def _recipe(
    method: str | Recipe | None, axes: dict[str, Any], masks: Any, when: str | None
) -> tuple[Recipe, str]:  # fmt: skip
    """The recipe, and when it prunes."""
    if when not in (None, "before", "during", "after"):
        raise RecipeError(f"when is before, during or after, not '{when}'")
    if method is None:
        if extra := sorted(set(axes) - {"seed"}):
            raise RecipeError(f"{extra[0]} belongs to a method, and none is named: say which")
        return Recipe(method="dense" if masks is None else "given masks", sparsity=0.0, **axes), "before"
    if masks is not None:
        raise RecipeError("masks stand in place of a method: leave one of them out")
    if isinstance(method, Recipe):
        base, recipe = method, method.override(**axes)
    else:
        base, recipe = Recipe.of(method), Recipe.of(method, **axes)
    if _trains(recipe) and recipe.schedule == "geometric" and base.steps > 1 and axes.get("steps") is None:
        share = (1 - base.sparsity) ** (1 / base.steps)  # what a round leaves: another target takes more rounds of it
        rounds = math.ceil(math.log(1 - recipe.sparsity) / math.log(share) - 1e-6) if recipe.sparsity > 0 else 1
        recipe = recipe.override(steps=max(1, rounds))
    named = parts("method").get(recipe.method)
    own = named.facts["when"] if named is not None else "after"
    early = "distances" in get("driver", recipe.driver).needs
    asked = early or _gated(recipe)
    if recipe.driver != "once" and not (early or (own == "after" and asked)):
        own = "during"
    moment = when or own
    if moment == "after" and recipe.driver != "once" and not asked:
        raise RecipeError(f"driver '{recipe.driver}' works while the model trains, not after: choose driver once")
    return recipe, moment


def _trains(recipe: Recipe) -> bool:
    return get("recovery", recipe.recovery).facts.get("data") == "task"


def _gated(recipe: Recipe) -> bool:
    """Whether gates say which units of the whole model go."""
    return recipe.gate != "none" and bool(parse(recipe.granularity).coupled)


class _Course:
    """A whole run: its legs, one after the other. Legs that a checkpoint says are over are read, not trained."""

    def __init__(
        self, task: Task, recipe: Recipe, moment: str, epochs: float, out: Path | None, model: nn.Module | None,
        masks: Mapping[str, Tensor] | None, calibration: int, device: torch.device, every: float, progress: Progress,
        shared: Path | None,
    ) -> None:  # fmt: skip
        self.task, self.recipe, self.moment, self.epochs = task, recipe, moment, epochs
        self.folder = None if out is None else out.with_name(out.name + ".run")
        self.given, self.ticket, self.calibration, self.device = model, masks, calibration, device
        self.every, self.progress, self.shared = every, progress, shared
        self.masks: dict[str, Tensor] = {}
        self.curves: list[dict[str, Any]] = []
        self.rounds: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.before: dict[str, Any] | None = None
        self.early: Mapping[str, Tensor] | None = None
        self.watch: EarlyBird | None = None
        self._dense: nn.Module | None = None
        self.begun = time.perf_counter()
        self.tags = {
            "task": {**task.describe(), "options": {k: str(v) for k, v in task.options.items()}},
            "recipe": recipe.digest, "epochs": epochs, "when": moment,
            "given": [digest_of(x) for x in (masks, None if model is None else model.state_dict())],
        }  # fmt: skip

    def go(self) -> nn.Module:
        made = self._after() if self.moment == "after" else self._along()
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
        if name == "dense" and self.shared is not None and watch is None:
            leg = self._shared(leg)
        made = fit(self.task, model, leg, attach=attach, watch=watch, progress=self._doing(name))
        self.curves += [{"leg": name, **row} for row in made.rows]
        return made

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

    def _batches(self) -> list[Any]:
        found = self.task.batches("train", self.recipe.seed, 0)
        return [placed(b, self.device) for b in islice(found, self.calibration)]

    def _evidence(self) -> dict[str, Any]:
        return {"data": self._batches(), "loss": self.task.loss} if self.recipe.needs_data else {}

    # -- before and during -------------------------------------------------------------------------

    def _along(self) -> nn.Module:
        model, recipe = self._fresh(), self.recipe.override(recovery="none") if _trains(self.recipe) else self.recipe
        session: Callable[[Any, int], Live] | None = None
        if _gated(self.recipe):
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

    def _healed(self, model: nn.Module) -> nn.Module:
        if _trains(self.recipe):
            self._heal(model, "recovery", 1)
        return model

    def _learned(self, name: str, model: nn.Module) -> nn.Module:
        """Train gates on units, with the dense model as their teacher where it teaches, and cut what they close."""
        recipe, teaches = self.recipe, get("recovery", self.recipe.recovery).facts.get("teacher")
        example = placed(self.task.example_input(), self.device)
        alone = recipe.override(recovery="none")
        session = lambda optimizer, steps: attach(  # noqa: E731
            model, alone, optimizer=optimizer, steps=steps, example=example
        )
        loss = lessons(self._healing(model, name, 1), **recipe.knobs_of("recovery")) if teaches else None
        self._fit(name, model, attach=session, loss=loss)
        closed = Recipe(
            method=recipe.method, granularity="filter", allocation="global", sparsity=recipe.sparsity, only=recipe.only,
            skip=recipe.skip, knobs={"criterion": {"p": 2.0}},
        )  # fmt: skip
        return self._cut(prune(copy.deepcopy(model), closed, example=example))

    def _smaller(self, model: nn.Module) -> nn.Module:
        """Take coupled units away; what training heals is not healed by anything else first."""
        recipe = self.recipe.override(driver="once", **({"recovery": "none"} if _trains(self.recipe) else {}))
        evidence = self._evidence()
        if recipe.recovery != "none":
            evidence = {"data": self._batches(), "loss": self.task.loss}
        example = placed(self.task.example_input(), self.device)
        return self._cut(prune(copy.deepcopy(model), recipe, example=example, **evidence))

    def _cut(self, plan: Any) -> nn.Module:
        self.notes += plan.notes
        small: nn.Module = plan.shrink()
        return small

    # -- after ---------------------------------------------------------------------------------------

    def _after(self) -> nn.Module:
        model = self._trained()
        self.before = self._figures(model)
        if "distances" in get("driver", self.recipe.driver).needs:
            self.before = None  # the dense run ended early: it is not what dense training reaches
        part = get("recovery", self.recipe.recovery)
        if part.facts.get("teacher"):
            self._dense = copy.deepcopy(model)
        if parse(self.recipe.granularity).coupled:
            return self._healed(self._learned("gates", model) if _gated(self.recipe) else self._smaller(model))
        recipe = self.recipe.override(driver="once")
        if not _trains(recipe):
            self.masks = dict(prune(model, recipe, **self._evidence()).masks)
            return model
        for k in range(1, recipe.steps + 1):
            share = sparsity_at(recipe.schedule, k / recipe.steps, recipe.sparsity)
            one = recipe.override(steps=1, schedule="one-shot", recovery="none", sparsity=share)
            done = prune(model, one, masks=self.masks or None, **self._evidence())
            self.masks = dict(done.masks)
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
        if "distances" in get("driver", self.recipe.driver).needs:
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
            None if self.early is None else lambda to: self.early or {}, self._doing(name),
        )  # fmt: skip

    def _heal(self, model: nn.Module, name: str, number: int) -> None:
        part, healing = get("recovery", self.recipe.recovery), self._healing(model, name, number)
        part.function(healing, **self.recipe.knobs_of("recovery"))
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
        value = self.task.measure(model, "test")
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
            timings={"total": time.perf_counter() - self.begun}, peak_memory=memory, command=command,
            before=self.before, after=self._figures(model), notes=self.notes,
        )  # fmt: skip
        distances = self.watch.distances if self.watch is not None else None
        return {
            **run, "task": self.task.describe(), "epochs": self.epochs, "when": self.moment, "curves": self.curves,
            "rounds": self.rounds, **({"distances": distances} if distances else {}),
        }  # fmt: skip


def supermask(task: Any, masks: Mapping[str, Tensor], *, seed: int = 0, signed: bool = False) -> float:
    """The metric on the test data of masked initial weights, without any training.

    Args:
        seed: of the initial weights, as the run had that found the masks.
        signed: each weight that stays becomes its sign times the standard deviation of its layer.

    Source: Zhou et al., Deconstructing lottery tickets, arXiv 1905.01067, section 4.
    """
    found = find(task)
    model = fresh_model(found, seed)
    held, _ = fitting(masks, model)
    if signed:
        for layer in find_layers(model, only=tuple(held))[0]:
            weight = layer.weight()
            layer.write(weight.sign() * weight.std())
    Masks(held).apply(model)
    return found.measure(model, "test")
