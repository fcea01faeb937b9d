"""Diffusion models: on which steps of the noise a denoiser's units are judged."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DataError, RecipeError
from ..layers import evaluating


def denoising(model: nn.Module, batch: Any) -> Tensor:
    """The loss of a network that predicts the noise, ``mean (eps - model(x_t, t))^2``; a batch is of `diffusion_steps`.

    Source: Ho et al., Denoising diffusion probabilistic models, arXiv 2006.11239, eq. 14.
    """
    out = model(batch["sample"], batch["timestep"])
    noise: Tensor = batch["noise"]
    return nn.functional.mse_loss(getattr(out, "sample", out), noise)


def diffusion_steps(
    model: nn.Module,
    clean: Tensor,
    kept: Tensor,
    *,
    threshold: float = 0.05,
    stride: int = 1,
    seed: int = 0,
) -> list[dict[str, Tensor]]:
    """The steps that say what a unit of a denoiser is worth, as batches for gradients: one for each step.

    :: x_t = sqrt(a_t) x + sqrt(1 - a_t) eps,  t = 0, 1, ... while L_t >= threshold * max over s <= t of L_s

    Late steps are nearly noise alone: their losses are small and their gradients say little of the image. Steps are
    taken from the least noise on; the first whose loss is below the share of the largest loss so far is the last.

    Args:
        model: called as ``model(sample, timestep)``; gives the noise, or an object with it in ``sample``.
        clean: images or latents, ``(batch, channels, height, width)``.
        kept: how much of the image's variance is left at each step, the schedule's ``alphas_cumprod``, ``(steps,)``.
        threshold: 0 takes all steps, which is the Taylor expansion without a choice of steps.
        stride: only every so manieth step is tried.
        seed: of the noise, one draw for all steps.

    Returns:
        Dicts ``sample``, ``timestep`` and ``noise``; pass them as ``data`` with `denoising` as ``loss`` to a method
        that needs gradients, such as ``diff-pruning``.

    Raises:
        RecipeError, DataError: a threshold out of range; a schedule that is none.

    >>> steps = diffusion_steps(_Still(), torch.ones(2, 1, 4, 4), torch.tensor([0.99, 0.5, 0.01]), threshold=0.0)
    >>> [int(s["timestep"][0]) for s in steps]
    [0, 1, 2]

    Source: Fang et al., Structural pruning for diffusion models (Diff-Pruning), arXiv 2305.10924, section 4, and the
    official code, which ends at the first step below the threshold, that step included.
    """
    if not 0 <= threshold < 1:
        raise RecipeError(f"threshold is {threshold:g}: it is a share of the largest loss, in [0, 1)")
    if stride < 1:
        raise RecipeError(f"stride is {stride}: it is a number of steps, at least 1")
    if kept.dim() != 1 or not len(kept) or not bool(((kept >= 0) & (kept <= 1)).all()):
        raise DataError("the schedule is how much of the variance is left at each step: one number in [0, 1] for each")
    generator = torch.Generator(device="cpu").manual_seed(seed)
    noise = torch.randn(clean.shape, generator=generator).to(clean)
    found: list[dict[str, Tensor]] = []
    largest = 0.0
    with evaluating(model), torch.no_grad():
        for step in range(0, len(kept), stride):
            share = kept[step].to(clean)
            batch = {
                "sample": share.sqrt() * clean + (1 - share).sqrt() * noise,
                "timestep": torch.full((len(clean),), step, device=clean.device, dtype=torch.long),
                "noise": noise,
            }
            found.append(batch)
            if threshold:
                loss = float(denoising(model, batch))
                largest = max(largest, loss)
                if loss < threshold * largest:
                    break
    return found


class _Still(nn.Module):
    """Predicts no noise at all; for the example above."""

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return torch.zeros_like(sample)
