"""What gates on weights do to the neural tangent kernel, whatever the weights and the data: NTK-SAP's evidence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError, NumericalError, RecipeError
from ..layers import Layer
from .stand_ins import Run, call_with, names_of, part_of, reshaped, total


def gather_tangent(
    model: nn.Module, layers: Sequence[Layer], batches: Sequence[Any], run: Run, *, draws: int = 1,
    epsilon: float = 0.01, samples: int = 64, generator: torch.Generator,
) -> dict[str, dict[str, Tensor]]:  # fmt: skip
    """The fact ``tangent`` of every layer: the gradient by gates ``m`` of ``sum ||f(m w) - f(m (w + e))||^2``.

    Each draw takes weights ``w`` that are normal with each layer's own root mean square (of what is not zero), noise
    ``e`` of deviation ``epsilon``, and as input as many standard normal rows as ``samples`` says, of the shape of a
    batch; token ids are kept, row after row. Gates are 1, and 0 where a weight is zero now. Batch norms normalize by
    what the unperturbed network shows them. Divided by ``epsilon**2`` and averaged over draws, the sum is the nuclear
    norm of the neural tangent kernel.

    The model itself is not touched.

    Raises:
        RecipeError: a knob makes no sense.
        ModelError, NumericalError: the outputs do not depend on the layers, or are not finite.
    """
    if draws < 1 or samples < 1 or epsilon <= 0:
        raise RecipeError("tangent: draws and samples are at least 1, and epsilon is above 0")
    names = names_of(model, layers)
    fixed = {n: p.detach() for n, p in model.named_parameters()}
    gates = {n: (fixed[n] != 0).to(fixed[n].dtype).requires_grad_() for n in dict.fromkeys(names.values())}
    sums = {n: torch.zeros_like(g) for n, g in gates.items()}
    for k in range(draws):
        batch = batches[k % len(batches)]
        inputs = reshaped(batch, lambda x: _drawn(x, samples, generator))
        weights = {n: _normal(fixed[n], generator) * _spread(fixed[n]) for n in gates}
        noise = {n: epsilon * _normal(fixed[n], generator) for n in gates}
        buffers = {n: b.detach().clone() for n, b in model.named_buffers()}
        with torch.no_grad(), _measuring(model):
            call_with(model, {**fixed, **buffers, **{n: gates[n] * weights[n] for n in gates}}, run, inputs)
        with torch.enable_grad():
            plain, moved = (
                total(call_with(model, {**fixed, **buffers, **{n: gates[n] * w[n] for n in gates}}, run, inputs))
                for w in (weights, {n: weights[n] + noise[n] for n in gates})
            )
            distance = (plain - moved).square().sum()
            if not distance.requires_grad:
                raise ModelError("the outputs do not depend on the layers that are pruned")
            found = torch.autograd.grad(distance, list(gates.values()), allow_unused=True)
        for name, gradient in zip(gates, found, strict=True):
            if gradient is not None:
                sums[name] += gradient / draws
    if not all(bool(torch.isfinite(x).all()) for x in sums.values()):
        raise NumericalError("the outputs of weights drawn anew are not finite: is the network deep, and has no norms?")
    return {x.name: {"tangent": part_of(x, sums[names[x.name]])} for x in layers}


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, device=generator.device, dtype=torch.float32).to(like)


def _spread(weight: Tensor) -> Tensor:
    """Root mean square of what is not zero."""
    return (weight.square().sum() / weight.count_nonzero().clamp_min(1)).sqrt()


def _drawn(x: Tensor, samples: int, generator: torch.Generator) -> Tensor:
    if x.is_floating_point():
        return _normal(x.new_empty((samples, *x.shape[1:])), generator)
    return x[torch.arange(samples, device=x.device) % x.shape[0]]


@contextmanager
def _measuring(model: nn.Module) -> Iterator[None]:
    """Batch norms take the next batch's statistics as their own."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    kept = [(m, m.training, m.momentum) for m in norms]
    try:
        for m in norms:
            m.training, m.momentum = True, 1.0
        yield
    finally:
        for m, training, momentum in kept:
            m.training, m.momentum = training, momentum
