"""What a recipe measures on batches of data, with the whole model in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from .data import Windows
from .errors import DataError, RecipeError
from .evidence import gather_gradients, gather_inputs
from .evidence.gradients import Directions
from .evidence.inputs import INPUT_FACTS
from .evidence.maps import gather_maps
from .facts import of_source
from .layers import Layer, evaluating
from .recipe import GRADIENTS, Recipe
from .solve import layer_generator

Loss = Callable[[nn.Module, Any], Tensor]


def evidence_of(
    model: nn.Module,
    recipe: Recipe,
    layers: list[Layer],
    batches: list[Any],
    loss: Loss | None,
    directions: Directions | None = None,
) -> dict[str, Any]:
    """Layer name -> facts that the recipe's parts name, measured on the batches; ``loss`` where gradients are.

    A criterion's knob ``probes`` says how many draws of random signs estimate curvature on each batch.
    """
    needs = recipe.needs()
    found: dict[str, Any] = {}
    with evaluating(model):  # statistics of batch norms are the model's own, and stay so
        if needs & set(INPUT_FACTS):
            found = dict(gather_inputs(model, layers, needs, batches, run_model))
        if maps := needs & set(of_source("maps")):
            found = dict(gather_maps(model, layers, maps, batches, run_model))
        if needs & GRADIENTS:
            assert loss is not None
            generator = layer_generator(recipe.seed, "gradients", next(model.parameters()).device)
            knobs = recipe.knobs_of("criterion") if recipe.criterion is not None else {}
            options = {"generator": generator, "directions": directions, "probes": knobs.get("probes", 4)}
            gradients = gather_gradients(model, layers, needs & GRADIENTS, batches, loss, **options)
            found = {n: _Both(found.get(n), g) for n, g in gradients.items()}
    return found


class _Both:
    """Evidence of inputs and of gradients, as one."""

    def __init__(self, inputs: Any, gradients: Any) -> None:
        self.inputs, self.gradients = inputs, gradients

    def __getitem__(self, fact: str) -> Any:
        return self.gradients[fact] if fact in GRADIENTS or self.inputs is None else self.inputs[fact]


def run_model(model: nn.Module, batch: Any) -> Any:
    """One forward pass: a dict is passed as keywords, of a tuple the first item is the input."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch[0] if isinstance(batch, (tuple, list)) else batch)


def batches_of(data: Iterable[Any] | Tensor) -> list[Any]:
    """Batches of what a user gave: one tensor or dict is one batch, windows are one each.

    Raises:
        RecipeError, DataError: text, which only language models take, or nothing.
    """
    if isinstance(data, str):
        raise RecipeError("text data needs a language model with repeated blocks: give batches of tensors")
    if isinstance(data, Windows):
        return list(data.ids.split(1))
    batches = [data] if isinstance(data, (Tensor, Mapping)) else list(data)
    if not batches:
        raise DataError("the calibration data is empty: give at least one batch")
    return batches
