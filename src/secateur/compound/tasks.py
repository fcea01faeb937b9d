"""A compound on a task: trained densely, then step by step."""

from __future__ import annotations

import copy
import inspect
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..disk import refuse
from ..tasks import Task, find
from ..tasks.base import Split, placed
from ..when import train
from ..when.healing import fresh_model
from .apply import Given, Progress
from .plan import CompoundPlan, preview
from .recipe import Compound
from .run import Compounded, finish, is_smallest, refuse_axes


def train_on(
    task: Any,
    compound: Compound,
    *,
    epochs: float | None = None,
    out: str | Path | None = None,
    model: nn.Module | None = None,
    calibration: int = 8,
    device: str | torch.device = "cpu",
    dense: str | Path | None = None,
    score: Split = "test",
    options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    command: str = "",
    seed: int | None = None,
    recovery_epochs: float | None = None,
    storage: str | None = None,
    **axes: Any,
) -> Compounded:
    """Train a task densely, and do all steps; what `secateur.train` does with a compound.

    Args:
        task, epochs, out, model, calibration, device, dense, score, options, progress, command: as `secateur.train` has
            them.
        seed: in place of the compound's.
        storage: see `Compounded.save`.
        recovery_epochs: of steps that train and say no epochs of their own.

    Raises:
        RecipeError: a step cannot be done on a task.
    """
    refuse_axes({k: v for k, v in axes.items() if v is not None})
    smallest = is_smallest(compound, storage)
    if seed is not None:
        compound = replace(compound, seed=seed)
    found: Task = find(task, **(options or {}))
    length = float(found.epochs if epochs is None else epochs)
    target = None if out is None else Path(out)
    folder = None if target is None else target.with_name(target.name + ".run")
    if target is not None:
        refuse(target)
    place = torch.device(device)
    if model is None:
        shared = dense if dense is not None or folder is None else folder
        net = train(
            task, None, epochs=length, seed=compound.seed, device=device, dense=shared, score="valid", options=options,
            progress=progress,
        ).model  # fmt: skip
    else:
        net = copy.deepcopy(model)
    net = net.to(place).eval()
    data = [placed(b, place) for b in islice(found.batches("train", compound.seed, 0), calibration)]
    own = Given(
        data, found.loss, placed(found.example_input(), place), task=found,
        epochs=length if recovery_epochs is None else recovery_epochs, folder=folder, device=place, seed=compound.seed,
        smallest=smallest, calibration=calibration, progress=progress or (lambda *_: None),
    )  # fmt: skip
    value = _measure(found)
    first = {"name": found.metric_name, "value": found.measure(net, score)}
    made = finish(net, compound, own, value)
    made.model.eval()
    made.run |= {
        "command": command, "task": found.describe(), "epochs": length, "score": score, "when": "after",
        "model": {"source": f"task {found.name}", "class": type(net).__name__},
    }  # fmt: skip
    made.run["metric"] = {
        "name": found.metric_name, "split": score, "before": first["value"], "after": found.measure(made.model, score),
    }  # fmt: skip
    if target is not None:
        made.save(target)
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
    return made


def train_method(task: Any, method: Any, *, target: str | None = None, **given: Any) -> Compounded:
    """A compound, or a decomposition by name with what it takes, on a task."""
    if not isinstance(method, str):
        return train_on(task, method, target=target, **given)
    run = {k: given.pop(k) for k in list(given) if k in _OF_A_RUN}
    step = {"method": method, **({} if target is None else {"target": target}), **given}
    return train_on(task, Compound.of({"steps": [{"decompose": step}], "name": method}), **run)


def plan_task(task: Task, compound: Compound, source: str = "") -> CompoundPlan:
    """What the steps should bring on a task, before it is trained: counts are those of its untrained network."""
    net = fresh_model(task, compound.seed).eval()
    return preview(net, compound, example=task.example_input(), source=source or f"task {task.name}")


_OF_A_RUN = frozenset(inspect.signature(train_on).parameters)


def _measure(task: Task) -> Callable[[nn.Module], dict[str, Any]]:
    """The metric on validation data, after each step: the test is measured once, at the end."""
    return lambda net: {"name": f"{task.metric_name}, valid", "value": task.measure(net, "valid")}
