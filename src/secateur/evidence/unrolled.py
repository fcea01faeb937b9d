"""Gradients that take all batches together: the Hessian-gradient product, and gradients through steps of SGD."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..errors import DataError, ModelError, NumericalError, RecipeError
from ..layers import Layer
from .gradients import _left_alone
from .stand_ins import call_with, names_of, part_of

Loss = Callable[[nn.Module, Any], Tensor]


def gather_products(
    model: nn.Module, layers: Sequence[Layer], batches: Sequence[Any], loss: Loss, *, temperature: float = 200.0
) -> dict[str, dict[str, Tensor]]:
    """The fact ``hessian_gradient`` of every layer: ``H g``, with ``g`` and ``H`` summed over the batches.

    Derivatives are by the weights of ``layers`` alone. What the model returns is divided by ``temperature`` first.

    Raises:
        DataError, ModelError, NumericalError: as `gather_gradients`.
    """
    if temperature <= 0:
        raise RecipeError(f"a temperature divides the outputs: it is above 0, not {temperature:g}")
    parameters = list({id(p): p for p in (getattr(x.module, x.parameter) for x in layers)}.values())
    products: list[Tensor] = [torch.zeros_like(p) for p in parameters]
    with _left_alone(model, parameters), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), _cooled(model, temperature):
        total: list[Tensor] = [torch.zeros_like(p) for p in parameters]
        for batch in batches:
            for kept, g in zip(total, _gradients(_one(loss(model, batch)), parameters), strict=True):
                kept += g
        for batch in batches:
            graph = _gradients(_one(loss(model, batch)), parameters, create_graph=True)
            along = sum((g * v).sum() for g, v in zip(graph, total, strict=True) if g.requires_grad)
            if isinstance(along, Tensor):
                for kept, h in zip(products, _gradients(along, parameters), strict=True):
                    kept += h
    return _by_layer("hessian_gradient", layers, {id(p): h for p, h in zip(parameters, products, strict=True)})


def gather_meta(
    model: nn.Module, layers: Sequence[Layer], batches: Sequence[Any], loss: Loss, *, unroll: int = 3,
    rate: float = 0.1, momentum: float = 0.0,
) -> dict[str, dict[str, Tensor]]:  # fmt: skip
    """The fact ``meta_gradient`` of every layer: of the loss after ``unroll`` steps of SGD, by the weights before them.

    Every parameter that requires a gradient takes the steps, each on the next batch, over and over; the loss at the
    end is that of the batch which would be next.

    Raises:
        DataError, ModelError, NumericalError: as `gather_gradients`.
    """
    if unroll < 0:
        raise RecipeError(f"steps of SGD are counted from 0, not {unroll}")
    names = names_of(model, layers)
    start = {
        n: p.detach().clone().requires_grad_(p.requires_grad or n in names.values())
        for n, p in model.named_parameters()
    }
    fast: dict[str, Tensor] = {n: p for n, p in start.items() if p.requires_grad}
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    speed: dict[str, Tensor] = {}
    *inner, outer = islice(cycle(batches), unroll + 1) if batches else [None]
    if not batches:
        raise DataError("there are no batches to take gradients of; give calibration data")
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        for batch in inner:
            value = _one(call_with(model, {**start, **fast, **buffers}, loss, batch))
            graph = torch.autograd.grad(value, list(fast.values()), create_graph=True, allow_unused=True)
            for (name, p), g in zip(fast.items(), graph, strict=True):
                if g is not None:
                    speed[name] = g + momentum * speed[name] if name in speed else g
                    fast[name] = p - rate * speed[name]
        value = _one(call_with(model, {**start, **fast, **buffers}, loss, outer))
        wanted = {n: start[n] for n in dict.fromkeys(names.values())}
        found = torch.autograd.grad(value, list(wanted.values()), allow_unused=True)
    by_name = dict(zip(wanted, found, strict=True))
    return _by_layer(
        "meta_gradient", layers, {id(getattr(x.module, x.parameter)): by_name[names[x.name]] for x in layers}
    )


def _one(value: Any) -> Tensor:
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise DataError("the loss of a batch must be a tensor of one element; average it over the batch")
    return value.sum()


def _gradients(value: Tensor, parameters: Sequence[Tensor], create_graph: bool = False) -> list[Tensor]:
    """Gradients, zeros where there is none."""
    if not value.requires_grad:
        return [torch.zeros_like(p) for p in parameters]
    found = torch.autograd.grad(value, parameters, create_graph=create_graph, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def _by_layer(
    fact: str, layers: Sequence[Layer], found: Mapping[int, Tensor | None]
) -> dict[str, dict[str, Tensor]]:  # fmt: skip
    result = {}
    for layer in layers:
        part = part_of(layer, found[id(getattr(layer.module, layer.parameter))])
        part = part if part.dtype == torch.float64 else part.float()
        if not bool(torch.isfinite(part).all()):
            raise NumericalError(f"{fact} of {layer.name} is NaN or infinite: check the loss and the data")
        result[layer.name] = {fact: part}
    if not any(bool(x[fact].any()) for x in result.values()):
        raise ModelError(f"{fact} is zero everywhere: does the loss depend on the layers that are pruned?")
    return result


@contextmanager
def _cooled(model: nn.Module, temperature: float) -> Iterator[None]:
    """What the model returns, or its logits, divided by ``temperature``."""

    def cool(_: nn.Module, __: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return output / temperature
        if isinstance(output, Mapping) and "logits" in output:
            changed: Any = output
            changed["logits"] = output["logits"] / temperature
            return changed
        return output

    hook = model.register_forward_hook(cool)
    try:
        yield
    finally:
        hook.remove()
