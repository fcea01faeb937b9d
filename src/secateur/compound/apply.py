"""What each kind of step does to the model that the steps before it made."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from ..calibrate import batches_of
from ..errors import RecipeError
from ..formats import OnGrid
from ..frozen import thawed
from ..fuse import decompose
from ..granularity import parse
from ..layers import find_layers
from ..masks import Masks
from ..prune import MEMORY, prune
from ..recipe import Recipe
from ..recover.stored import Stored
from ..runtime import made as gated
from ..structured import WholePlan
from ..tasks import Task
from ..tasks.checkpoint import own_generators
from ..when.course import Course
from ..when.train import recipe_and_moment
from .figures import sparse_terms
from .recover import recover
from .steps import Step, trains

Progress = Callable[[str, int, int], None]


@dataclass(eq=False)
class Given:
    """What the steps of a compound are given.

    Attributes:
        data: batches, or windows of text.
        task, epochs: of a compound that trains a task; None for a model alone.
        folder: where training leaves its checkpoints; None to keep none.
        seed: of steps that name none.
        element: bytes that a float takes on disk, where that is not what it takes now.
        smallest: whether each matrix is to be stored in the fewest bytes.
    """

    data: Any = None
    loss: Any = None
    example: Any = None
    memory: int = MEMORY
    task: Task | None = None
    epochs: float | None = None
    folder: Path | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    seed: int = 0
    element: int | None = None
    smallest: bool = False
    calibration: int = 8
    progress: Progress = lambda *_: None


@dataclass(eq=False)
class State:
    """The model between two steps.

    Attributes:
        masks: layer -> what earlier steps kept of its weights.
        grids: layer -> the integers, or the shared values, that it has.
        dense: the model as it was, where a later step learns from it.
        stored: what it said of the data, where that is enough.
        curves: of what trained.
    """

    model: nn.Module
    masks: dict[str, Tensor] = field(default_factory=dict)
    grids: dict[str, OnGrid] = field(default_factory=dict)
    dense: nn.Module | None = None
    stored: Stored | None = None
    curves: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def apply(state: State, step: Step, given: Given, number: int) -> dict[str, Any]:
    """Do a step; returns its record."""
    return _APPLY[step.kind](state, step, given, number)


def _prune(state: State, step: Step, given: Given, number: int) -> dict[str, Any]:
    recipe = step.recipe(given.seed)
    if trains(recipe):
        return _trained(state, recipe, step, given, number)
    if parse(recipe.granularity).coupled:
        return _units(state, recipe, step, given)
    shape = {"example": given.example} if recipe.needs_shape and given.data is None else {}
    made = prune(
        state.model, recipe, data=given.data if recipe.needs_data else None, loss=given.loss, memory=given.memory,
        masks=state.masks or None, **shape,
    )  # fmt: skip
    for name, mask in made.masks.items():
        if name in state.masks or not bool(mask.all()):
            state.masks[name] = mask
    state.grids |= made.grids
    record: dict[str, Any] = made.run
    return record


def _units(state: State, recipe: Recipe, step: Step, given: Given) -> dict[str, Any]:
    plan = prune(
        state.model, recipe, target=step.options.get("target"), example=given.example, loss=given.loss,
        data=None if given.data is None else batches_of(given.data), multiple=step.options.get("multiple", 8),
    )  # fmt: skip
    small = plan.shrink()
    if state.masks:
        state.masks = cut(state.masks, state.model, small, {} if isinstance(plan, WholePlan) else plan.kept)
    state.model = small.eval()
    record: dict[str, Any] = plan.to_dict()
    return record


def cut(
    masks: Mapping[str, Tensor], model: nn.Module, small: nn.Module, kept: Mapping[str, Mapping[int, Any]]
) -> dict[str, Tensor]:
    """Masks of a model's layers for the smaller one that keeps these positions of its tensors."""
    before = {x.name: x for x in find_layers(model, only=("*",))[0]}
    after = {x.name: x for x in find_layers(small, only=("*",))[0]}
    found = {}
    for name, mask in masks.items():
        layer = before[name]
        stored = layer.from_oi(mask.to(layer.stored.device)).cpu().numpy()
        axes = kept.get(f"{name}.{layer.parameter}", {})
        index = np.ix_(*[np.asarray(axes.get(a, np.arange(n))) for a, n in enumerate(stored.shape)])
        found[name] = after[name].to_oi(torch.from_numpy(stored[index]))
    return found


def _decompose(state: State, step: Step, given: Given, number: int) -> dict[str, Any]:
    made = decompose(state.model, data=given.data, **thawed(step.options))
    state.masks |= dict(Masks.of_zeros(state.model, sparse_terms(state.model)))
    return made.run


def _recover(state: State, step: Step, given: Given, number: int) -> dict[str, Any]:
    rows = recover(state, step, given, number)
    state.curves += [{"leg": f"step-{number}", **row} for row in rows]
    return {"method": step.method, "curves": rows}


def _runtime(state: State, step: Step, given: Given, number: int) -> dict[str, Any]:
    options = thawed(step.options)
    gates = gated(state.model, options.pop("method"), given.example, **options)
    state.model = cast("nn.Module", gates)
    return dict(gates.record)


def _trained(state: State, recipe: Recipe, step: Step, given: Given, number: int) -> dict[str, Any]:
    """A method that trains, on the task, from the weights that the model has."""
    if given.task is None or given.epochs is None:
        raise RecipeError(
            f"step {number} ({step}) trains: give a task to secateur.train, or choose a method without training and "
            "add {recover: finetune}"
        )
    recipe, moment = recipe_and_moment(recipe, {}, None, None)
    course = Course(
        given.task, recipe, moment, given.epochs, None if given.folder is None else given.folder / f"step-{number}",
        given=state.model, device=given.device, calibration=given.calibration, progress=given.progress,
        target=step.options.get("target"), multiple=step.options.get("multiple", 8), score="valid",
    )  # fmt: skip
    with own_generators():
        state.model = course.go().eval()
    state.masks = dict(course.masks)
    state.curves += [{**row, "leg": f"step-{number} {row['leg']}"} for row in course.curves]
    return course.record(state.model, 0, "")


def dense_copy(model: nn.Module) -> nn.Module:
    """The model as it is, to learn from later."""
    return copy.deepcopy(model).eval().requires_grad_(False)


_APPLY: dict[str, Callable[[State, Step, Given, int], dict[str, Any]]] = {
    "prune": _prune, "decompose": _decompose, "quantize": _prune, "recover": _recover, "runtime": _runtime,
}  # fmt: skip
