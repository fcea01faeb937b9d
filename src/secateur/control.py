"""What a mask before training is checked against: the same counts elsewhere, other weights, the other way round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from . import granularity
from .layers import Layer
from .recipe import Recipe
from .solve import layer_generator


def shuffled(mask: Tensor, pattern: str, generator: torch.Generator) -> Tensor:
    """A mask ``(o, i)`` with its units in another order, in each pool of the granularity: every count stays.

    >>> mask = torch.tensor([[True, False, False, True], [False, True, True, False]])
    >>> shuffled(mask, "2:4", torch.Generator().manual_seed(0)).sum(1).tolist()
    [2, 2]
    """
    cut = granularity.parse(pattern)
    units = cut.split(mask)[..., 0]  # a unit stays or goes as one
    order = torch.rand(units.shape, generator=generator, device=generator.device).argsort(1).to(units.device)
    return cut.unpool(units.gather(1, order), (mask.shape[0], mask.shape[1]))


def controlled(
    recipe: Recipe, layers: Sequence[Layer], masks: Mapping[str, Tensor], dense: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The masks that the recipe's control asks for, with the weights of ``dense``, or new ones, where they keep.

    After Frankle et al., Pruning neural networks at initialization: why are we missing the mark?, arXiv 2009.08576:
    a method whose accuracy survives both has chosen how much of each layer stays, and nothing more. Scores are
    inverted where they are made (`solve.Facts`).
    """
    found = dict(masks)
    if recipe.control not in ("shuffle", "reinitialize"):
        return found
    restore(layers, dense)
    for x in layers:
        generator = layer_generator(recipe.seed, f"{recipe.control} {x.name}", x.stored.device)
        if recipe.control == "shuffle":
            found[x.name] = shuffled(found[x.name], recipe.granularity, generator)
        else:
            x.redraw(generator)
        x.write(x.weight().masked_fill(~found[x.name], 0.0))
    return found


@torch.no_grad()
def restore(layers: Sequence[Layer], dense: Mapping[str, Tensor]) -> None:
    """Give layers the stored weights of ``dense``, by name."""
    for x in layers:
        x.stored.copy_(dense[x.name])
