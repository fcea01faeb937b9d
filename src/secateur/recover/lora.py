"""Low-rank adapters, trained beside the pruned weights and merged into them with their zeros kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RecipeError
from ..registry import register
from .training import Training


@register("recovery", paper="2106.09685", data="task")
def lora(run: Training, *, length: float = 0.5, rate: float = 1.0, rank: int = 8, alpha: float = 16.0) -> None:
    """Train a low-rank change of the linear layers alone, and merge it where their masks keep weights.

    :: y = (W + mask * (alpha / rank) B A) x

    The mask is applied while the adapters train, so merging changes nothing that was not trained.

    Choose it where gradients and optimizer state of all weights do not fit: only ``rank (o + i)`` numbers a layer are
    trained.

    Beware: needs the package peft; only linear layers have adapters, and everything else stays as it is.

    Source: Hu et al., LoRA, arXiv 2106.09685, section 4; the mask on the product as in sparse adapters that keep
    zeros, such as Munoz et al., SQFT, arXiv 2410.03750.
    """
    try:
        import peft
    except ImportError:
        raise RecipeError("recovery 'lora' needs the package peft: pip install peft") from None
    if rank < 1 or not alpha > 0:
        raise RecipeError(f"recovery 'lora': rank is at least 1, alpha above 0, not {rank}, {alpha:g}")
    model, masks = run.model, run.masks()
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and (n in masks or not masks)]
    if not names:
        raise RecipeError("recovery 'lora' adapts linear layers, and none was pruned: choose finetune or distill")
    flags = [(p, p.requires_grad) for p in model.parameters()]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        config = peft.LoraConfig(
            r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=names, init_lora_weights=True
        )
        peft.inject_adapter_in_model(config, model)
    adapted = [(n, _Adapted(model.get_submodule(n), masks.get(n))) for n in names]
    try:
        run.fit(length, rate=rate, masks=False)
        for name, one in adapted:
            one.merge()
            model.set_submodule(name, one.base)
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


class _Adapted:
    """A linear layer with an adapter whose product is masked."""

    def __init__(self, module: Any, mask: Tensor | None) -> None:
        self.module, self.base = module, module.get_base_layer()
        self.mask = None if mask is None else mask.to(self.base.weight.device)
        self.handle = module.register_forward_hook(self._forward)

    def _delta(self) -> Tensor:
        (name,) = self.module.active_adapters
        a, b = self.module.lora_A[name].weight, self.module.lora_B[name].weight
        delta: Tensor = self.module.scaling[name] * (b @ a)
        return delta if self.mask is None else delta * self.mask

    def _forward(self, module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return nn.functional.linear(args[0], self.base.weight + self._delta(), self.base.bias)

    @torch.no_grad()
    def merge(self) -> None:
        """Add the change to the layer's own weight."""
        self.handle.remove()
        self.base.weight += self._delta()
