"""What a recipe measures on batches of data, with the whole model in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from . import granularity
from .data import Windows
from .errors import DataError, NumericalError, RecipeError
from .evidence import gather_flow, gather_gradients, gather_inputs, gather_meta, gather_products, gather_tangent
from .evidence.gradients import Directions
from .evidence.inputs import INPUT_FACTS
from .evidence.maps import gather_maps
from .facts import of_source
from .layers import Layer, evaluating, settling
from .models import eager_experts
from .recipe import Recipe
from .solve import layer_generator

Loss = Callable[[nn.Module, Any], Tensor]

#: Knobs of a criterion that say how gradients are measured.
_MEASURING = ("probes", "fisher_block", "fisher_damp")


def evidence_of(
    model: nn.Module,
    recipe: Recipe,
    layers: list[Layer],
    batches: list[Any],
    loss: Loss | None,
    directions: Directions | None = None,
) -> dict[str, Any]:
    """Layer name -> facts that the recipe's parts name, measured on the batches; ``loss`` where gradients are.

    Measuring has the knobs of the criterion that it names: ``probes``, say, is how many draws of random signs estimate
    curvature on each batch.
    """
    needs = recipe.needs()
    knobs = recipe.knobs_of("criterion") if recipe.criterion is not None else {}
    generator = layer_generator(recipe.seed, "gradients", next(model.parameters()).device)
    found: list[Mapping[str, Any]] = []  # later ones know better
    with evaluating(model):  # statistics of batch norms are the model's own, and stay so
        if needs & set(INPUT_FACTS):
            found.append(gather_inputs(model, layers, needs, batches, run_model))
        if maps := needs & set(of_source("maps")):
            found.append(gather_maps(model, layers, maps, batches, run_model))
        if "flow" in needs:
            eager_experts(model)  # fused products do not know float64
            found.append(gather_flow(model, layers, batches[0], run_model))
        if "tangent" in needs:
            options = _knobs(knobs, "draws", "epsilon", "samples")
            found.append(gather_tangent(model, layers, batches, run_model, generator=generator, **options))
        # A gate on a whole filter does nothing in front of a norm by the batch, so units are scored by what is there.
        with nullcontext() if granularity.parse(recipe.granularity).coupled else settling(model):
            if gradients := needs & set(of_source("gradients")):
                assert loss is not None
                options = {"generator": generator, "directions": directions, **_knobs(knobs, *_MEASURING)}
                found.append(gather_gradients(model, layers, gradients, batches, loss, **options))
                if "gradient" in needs and not any(bool(g["gradient"].any()) for g in found[-1].values()):
                    raise NumericalError(
                        "the gradient of the loss is zero in every layer: what is left connects the input with the "
                        "output no more; ask for less sparsity"
                    )
            if "hessian_gradient" in needs:
                assert loss is not None
                options = _knobs(knobs, "temperature")
                found.append(gather_products(model, layers, batches, loss, **options))
            if "meta_gradient" in needs:
                assert loss is not None
                options = _knobs(knobs, "unroll", "rate", "momentum")
                found.append(gather_meta(model, layers, batches, loss, **options))
    if len(found) == 1:
        return dict(found[0])
    return {x.name: _Joined([part[x.name] for part in reversed(found) if x.name in part]) for x in layers}


def _knobs(knobs: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {n: knobs[n] for n in names if n in knobs}


class _Joined:
    """Evidence of several kinds, as one: the first that knows a fact tells it."""

    def __init__(self, parts: list[Any]) -> None:
        self._parts = parts

    def __getitem__(self, fact: str) -> Any:
        for part in self._parts:
            try:
                return part[fact]
            except KeyError:
                continue
        raise KeyError(fact)


def run_model(model: nn.Module, batch: Any) -> Any:
    """One forward pass: a dict is passed as keywords, of a tuple the first item is the input."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch[0] if isinstance(batch, (tuple, list)) else batch)


def as_batch(example: Any) -> Any:
    """One batch of an example of inputs; None of none.

    Raises:
        RecipeError: the example is of several positional inputs, which a batch cannot hold.
    """
    if isinstance(example, (tuple, list)):
        if len(example) != 1:
            raise RecipeError("an example of several inputs is a dict of keywords here: give example={'name': tensor}")
        example = example[0]
    return None if example is None else [example]


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


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Sequence[Any]) -> None:
    """Measure the statistics of batch norms anew, as the mean over batches (EagleEye, arXiv 2007.02491)."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms:
        return
    modes = [(module, module.training) for module in model.modules()]
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    for batch in batches:
        run_model(model, batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    for module, training in modes:
        module.training = training
