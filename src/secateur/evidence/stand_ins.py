"""Run a model with other values in place of its parameters and buffers, and with inputs of a given shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..errors import DataError
from ..layers import Layer

#: Runs the model on a batch, as `calibrate.run_model` does.
Run = Callable[[nn.Module, Any], Any]


class _Called(nn.Module):
    def __init__(self, model: nn.Module, call: Run) -> None:
        super().__init__()
        self.model, self._call = model, call

    def forward(self, batch: Any) -> Any:
        return self._call(self.model, batch)


def call_with(model: nn.Module, values: Mapping[str, Tensor], call: Run, batch: Any) -> Any:
    """``call(model, batch)`` with ``values`` in place of the parameters and buffers of these names."""
    wrapped = _Called(model, call)
    wrapped.training = model.training
    return functional_call(wrapped, {f"model.{n}": v for n, v in values.items()}, (batch,))


def names_of(model: nn.Module, layers: Sequence[Layer]) -> dict[str, str]:
    """Layer name -> the name of its parameter in the model."""
    names = {id(p): n for n, p in model.named_parameters()}
    return {x.name: names[id(getattr(x.module, x.parameter))] for x in layers}


def part_of(layer: Layer, whole: Tensor | None) -> Tensor:
    """The layer's ``(o, i)`` part of a tensor of its parameter's shape; zeros where there is none."""
    if whole is None:
        return torch.zeros(layer.shape, device=layer.stored.device)
    return layer.to_oi((whole if layer.index is None else whole[layer.index]).detach())


def total(output: Any) -> Tensor:
    """What a model computes, as one tensor: of a mapping the logits, else the first floating tensor.

    Raises:
        DataError: there is none.
    """
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        found = [output["logits"]] if "logits" in output else list(output.values())
    else:
        found = list(output) if isinstance(output, (tuple, list)) else []
    for value in found:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    raise DataError(f"the model returns {type(output).__name__}, in which there is no tensor of numbers to sum")


def reshaped(batch: Any, make: Callable[[Tensor], Tensor]) -> Any:
    """A batch whose tensors ``make`` replaces; labels are left out, as nothing is compared with them."""
    if isinstance(batch, Mapping):
        return {k: make(v) if isinstance(v, Tensor) else v for k, v in batch.items() if k != "labels"}
    first = batch[0] if isinstance(batch, (tuple, list)) else batch
    if not isinstance(first, Tensor):
        raise DataError(f"an input is a tensor or a dict of tensors, not {type(first).__name__}")
    return make(first)
