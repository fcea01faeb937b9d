"""Recoveries that work on one block while it is in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import RecipeError
from ..layers import Layer
from ..registry import register


class Block(Protocol):
    """A pruned block with its calibration input and the dense block's output."""

    block: nn.Module
    layers: Any
    masks: Mapping[str, Tensor]
    hidden: Tensor
    target: Tensor
    output: Tensor

    def call(self, x: Tensor) -> Tensor: ...
    def forward(self) -> Tensor: ...


@register("recovery", name="none")
def none() -> None:
    """Leave the pruned weights as they are.

    Choose it for the fastest result, or when training follows elsewhere.

    Source: none.
    """


@register("recovery", paper="2402.12419", data="block")
def blockwise(
    task: Block,
    *,
    epochs: int = 2,
    rate: float = 2e-4,
    batch: int = 2,
    norms: bool = True,
    teacher: str = "model",
    seed: int = 0,
) -> Tensor:
    """Fine-tune the surviving weights of each block so that its output matches the dense block's.

    :: min over w of || f(w * mask, x') - f(w_dense, x) ||^2,  x' = output of the pruned blocks before

    With ``teacher`` "model", x is what the dense model has there, so a block also corrects what the
    blocks before it lost; with "input", x = x', as in EBFT's code. Adam with a cosine decay, masks fixed;
    ``norms`` trains the block's vectors too. A block whose error did not fall keeps its old weights.

    Choose it for the lowest perplexity that the calibration data alone can give; one block's gradients
    fit where the model's do not.

    Beware: costs about ``3 * epochs + 2`` forward passes; with few tokens it fits their domain.

    Source: Guo et al., EBFT, arXiv 2402.12419, and the authors' code; the dense model's own activations as
    target, and the step relative to the size of a layer's weights, are ours.
    """
    if teacher not in ("model", "input"):
        raise RecipeError(f"recovery 'blockwise': teacher is model or input, not '{teacher}'")
    parameters, masks = _trainable(task, norms)
    before = [p.detach().clone() for p in parameters]
    flags = [p.requires_grad for p in task.block.parameters()]
    windows = task.hidden.shape[0]
    steps = max(1, epochs * -(-windows // batch))
    generator = torch.Generator().manual_seed(seed)
    error_before = _error(task.output, task.target)
    try:
        task.block.requires_grad_(False)
        for p in parameters:
            p.requires_grad_(True)
        # Steps relative to the size of the weights: layers of every scale move alike.
        groups = [{"params": [p], "lr": rate * _scale(p)} for p in parameters]
        optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        norm = task.target.square().mean().clamp_min(1e-12)
        with torch.enable_grad():
            for _ in range(epochs):
                for rows in torch.randperm(windows, generator=generator).split(batch):
                    loss = (task.call(task.hidden[rows]) - task.target[rows]).square().mean() / norm
                    optimizer.zero_grad(set_to_none=True)
                    loss.backward()
                    for p, mask in zip(parameters, masks, strict=True):
                        if mask is not None and p.grad is not None:
                            p.grad.mul_(mask)  # a masked weight and its moments stay exactly zero
                    optimizer.step()
                    schedule.step()
    finally:
        for p, flag in zip(task.block.parameters(), flags, strict=True):
            p.requires_grad_(flag)
            p.grad = None
    output = task.forward()
    if _error(output, task.target) < error_before:
        return output
    for p, old in zip(parameters, before, strict=True):
        p.data.copy_(old)
    return task.output


def _trainable(task: Block, norms: bool) -> tuple[list[nn.Parameter], list[Tensor | None]]:
    """The pruned parameters with their masks as stored, then the block's vectors."""
    whole: dict[int, tuple[nn.Parameter, Tensor]] = {}
    for layer in task.layers:
        parameter: nn.Parameter = getattr(layer.module, layer.parameter)
        mask = whole.setdefault(id(parameter), (parameter, torch.ones_like(parameter, dtype=torch.bool)))[1]
        _fill(mask, layer, task.masks[layer.name])
    parameters: list[nn.Parameter] = [p for p, _ in whole.values()]
    masks: list[Tensor | None] = [m for _, m in whole.values()]
    if norms:
        for p in task.block.parameters():
            if p.dim() == 1 and p.is_floating_point():
                parameters.append(p)
                masks.append(None)
    return parameters, masks


def _fill(mask: Tensor, layer: Layer, mask_oi: Tensor) -> None:
    place = mask if layer.index is None else mask[layer.index]
    place.copy_(layer.from_oi(mask_oi))


def _scale(p: Tensor) -> float:
    kept = p.detach()[p.detach() != 0]
    return float(kept.abs().mean()) / 0.02 if kept.numel() and p.dim() > 1 else 1.0


def _error(output: Tensor, target: Tensor) -> float:
    return float((output - target).square().sum(dtype=torch.float64))
