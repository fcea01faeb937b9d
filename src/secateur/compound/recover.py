"""A recovery as a step by itself: on the task, or on the data and the loss that were given for a model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..calibrate import batches_of, run_model
from ..data import Windows
from ..errors import RecipeError
from ..formats import OnGrid
from ..formats.grid import grids_of
from ..frozen import thawed
from ..layers import evaluating, find_layers
from ..recover.stored import Stored
from ..registry import get
from ..stream import find_blocks
from ..tasks import Task
from ..tasks.base import adamw
from ..tasks.checkpoint import own_generators
from ..tasks.loop import Leg
from ..when.healing import Healing
from .steps import Step

if TYPE_CHECKING:
    from .apply import Given, State

#: Windows of text in a batch, and the highest learning rate, where no task says them.
WINDOWS, RATE = 4, 1e-3


def recover(state: State, step: Step, given: Given, number: int) -> list[dict[str, Any]]:
    """Train what is left, zeros held; returns a row for each epoch."""
    options = thawed(step.options)
    options.pop("file", None)
    part = get("recovery", options.pop("method"))
    epochs = options.pop("epochs", None)
    task = given.task
    if task is None:
        if given.data is None or given.loss is None:
            raise RecipeError(f"step {number} ({step}) trains: give data= and loss= (of a language model, data alone)")
        task = on_batches(state.model, given.data, given.loss)
        epochs = 1.0 if epochs is None else epochs
    if epochs is not None and "length" in part.knobs:
        options.setdefault("length", 1.0)
    legs = iter(range(1, 100))

    def leg(length: float, **fields: Any) -> Leg:
        name = f"step-{number}-{next(legs)}"
        tags = {"step": str(step), "name": name, "epochs": length, "seed": given.seed}
        file = None if given.folder is None else given.folder / f"{name}.safetensors"
        return Leg(length, seed=given.seed, round=number, file=file, tags=tags, **fields)

    dense, rounds = state.dense, part.facts.get("trains") == "integers"
    masks = state.masks if state.grids or not rounds else _whole(state.model, state.masks)
    healing = Healing(
        task, state.model, masks, float(epochs if epochs is not None else given.epochs or task.epochs),
        given.seed, leg, None if dense is None else lambda: copy.deepcopy(dense), None,
        lambda done, of: given.progress(f"step {number}", done, of), stored=state.stored,
        grids=state.grids,
    )  # fmt: skip
    frozen = [p for p in state.model.parameters() if not p.requires_grad]
    with own_generators():
        part.function(healing, **part.knobs_with(options))
    if rounds and not state.grids:
        knobs = part.knobs_with(options)
        state.grids = _grids(state.model, masks, knobs["bits"], knobs["group"])
    state.model.eval()
    for p in frozen:
        p.requires_grad_(False)
    return healing.rows


def _whole(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Masks of all layers that a quantization would round; True where there are none."""
    blocks = find_blocks(model)
    layers = find_layers(model, inside=None if blocks is None else blocks.paths())[0]
    return {x.name: torch.ones(x.shape, dtype=torch.bool) for x in layers} | dict(masks)


def _grids(model: nn.Module, masks: Mapping[str, Tensor], bits: int, group: int) -> dict[str, OnGrid]:
    """What weights lie on that were trained on rounded ones, by their values."""
    layers = {x.name: x for x in find_layers(model, only=("*",))[0]}
    return {name: grids_of(layers[name].weight(), group, bits)[0] for name in masks}


def stored_teacher(model: nn.Module, steps: Sequence[Step], given: Given) -> Stored | None:
    """What the dense model says of the data, where that is all that steps want of it; None where they want more.

    Read from the file that a step names, where it is there; else computed, and written to it.
    """
    usual = float(get("recovery", "distill").knobs["temperature"])
    asked = {(s.options.get("top", 0), float(s.options.get("temperature", usual))) for s in steps}
    files = {str(s.options["file"]) for s in steps if s.options.get("file") is not None}
    if given.task is not None or len(asked) != 1 or len(files) > 1 or not all(top for top, _ in asked):
        if files:
            raise RecipeError("a file keeps one teacher, for steps on a model alone, with one top and one temperature")
        return None
    ((top, temperature),) = asked
    file = Path(files.pop()) if files else None
    if file is not None and file.is_file():
        known = Stored.load(file)
        if any(known.look(batch) is None for batch in batches_of(given.data)):
            raise RecipeError(f"{file} was made on other data: delete it, or name another")
        return known
    with evaluating(model):
        made = Stored.of(model, batches_of(given.data), _said, top, temperature)
    if file is not None:
        made.save(file)
    return made


def _said(model: nn.Module, batch: Any) -> Tensor:
    found = run_model(model, batch)
    answer: Tensor = getattr(found, "logits", found)
    return answer


def on_batches(model: nn.Module, data: Any, loss: Callable[[nn.Module, Any], Tensor]) -> Task:
    """A task of the batches that calibrate; the metric is the loss on these."""
    batches = list(data.ids.split(WINDOWS)) if isinstance(data, Windows) else batches_of(data)
    device = next(model.parameters()).device

    def drawn(split: str, seed: int, epoch: int) -> Iterable[Any]:
        order = torch.arange(len(batches))
        if split == "train":
            generator = torch.Generator().manual_seed(1000 * seed + epoch)
            order = torch.randperm(len(batches), generator=generator)
        return [batches[k] for k in order.tolist()]

    def mean(net: nn.Module, given: Iterable[Any]) -> float:
        found = [float(loss(net, b)) for b in given]
        return sum(found) / len(found)

    return Task(
        model=lambda seed: copy.deepcopy(model).to(device), batches=drawn, loss=loss, metric=mean,
        optimizer=lambda net: adamw(net, RATE), metric_name="loss", higher_is_better=False, name="calibration data",
    )  # fmt: skip
