"""Early-bird tickets: masks that would be drawn, compared from epoch to epoch."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RecipeError
from ..granularity import parse
from ..prune import prune
from ..recipe import Recipe
from ..registry import get
from ..select import select

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class EarlyBird:
    """Watches a dense run, and ends it when the driver says that the mask has been found.

    Attributes:
        distances: a row for each epoch: how far its mask is from those of the epochs before, the oldest first.
        data, loss: what the criterion of single weights measures on.
    """

    def __init__(self, recipe: Recipe, data: Any = None, loss: Any = None) -> None:
        self.recipe, self.data, self.loss = recipe, data, loss
        self._driver, self._knobs = get("driver", recipe.driver), recipe.knobs_of("driver")
        self.masks: list[Tensor] = []
        self.distances: list[list[float]] = []

    def at_epoch(self, model: nn.Module, step: int, steps: int) -> bool:
        """Draw the mask of this epoch and ask the driver."""
        mask = self._drawn(model).cpu()
        self.distances.append([float((mask != old).double().mean()) for old in self.masks])
        window = int(self._knobs["window"])
        self.masks = [*self.masks, mask][-(window - 1) :]
        facts = {"step": step, "steps": steps, "distances": tuple(self.distances[-1])}
        return self._driver(facts, **self._knobs) is not None

    def _drawn(self, model: nn.Module) -> Tensor:
        if parse(self.recipe.granularity).coupled:
            return channel_mask(model, self.recipe.sparsity)
        copied = copy.deepcopy(model)
        recipe = self.recipe.override(driver="once", recovery="none")
        masks = prune(copied, recipe, data=self.data, loss=self.loss).masks
        return torch.cat([masks[n].flatten() for n in masks])

    def state_dict(self) -> dict[str, Any]:
        return {"masks": self.masks, "distances": self.distances}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.masks, self.distances = list(state["masks"]), list(state["distances"])


def channel_mask(model: nn.Module, sparsity: float) -> Tensor:
    """Which channels of all batch norms would stay if the smallest scales went, ranked together.

    >>> net = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2))
    >>> _ = net[0].weight.data.copy_(torch.tensor([0.1, -3.0])), net[1].weight.data.copy_(torch.tensor([0.5, 0.2]))
    >>> channel_mask(net, 0.5).tolist()
    [False, True, True, False]
    """
    scales = [m.weight.detach().abs() for m in model.modules() if isinstance(m, _NORMS) and m.weight is not None]
    if not scales:
        raise RecipeError("early-bird tickets of channels look at the scales of batch norms, and the model has none")
    return select(torch.cat(scales).double()[None], 1.0 - sparsity)[0]
