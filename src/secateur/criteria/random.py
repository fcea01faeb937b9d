"""The control every criterion must beat."""

from __future__ import annotations

import torch
from torch import Tensor

from ..registry import register


@register("criterion", family="random")
def random(weight: Tensor, generator: torch.Generator) -> Tensor:
    """A uniform random number for each weight; only the weight's shape counts.

    :: s ~ U[0, 1)

    Choose it for a control: a criterion that does not beat it at the same sparsity has found nothing.

    Beware: the scores are drawn on the generator's device, so a CPU generator gives the same mask everywhere.

    >>> import torch
    >>> random(torch.ones(1, 3), torch.Generator().manual_seed(0)).shape
    torch.Size([1, 3])

    Source: Blalock et al., What is the state of neural network pruning?, arXiv 2003.03033 (random as a baseline).
    """
    return torch.rand(weight.shape, generator=generator, device=generator.device).to(weight.device)
