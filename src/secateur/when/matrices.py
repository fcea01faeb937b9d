"""The masks of single matrices: what a session changes where units are weights, rows or blocks of a layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .. import granularity
from ..drivers import Update
from ..errors import ModelError
from ..layers import Layer
from ..prune import prune
from ..recipe import Recipe
from ..registry import get
from ..schedule import sparsity_at
from ..select import keep_count, select
from ..solve import allocate, layer_facts, sketch_layer
from .change import CHANGES, Turn, check_change
from .history import History, Live


class Matrices:
    """Masks of the layers of a model, each by itself.

    Attributes:
        dead: layer name -> what is gone, in the stored shape.
        keeps: layer name -> the fraction that stays.
    """

    def __init__(
        self, recipe: Recipe, layers: list[Layer], optimizer: Optimizer | None, history: History, reach: bool
    ) -> None:  # fmt: skip
        self.layers = self.places = layers
        self.dead: dict[str, Tensor] = {}
        self.keeps: dict[str, float] = {}
        self.reach: dict[str, Tensor] = {}
        self._recipe, self._knobs = recipe, recipe.knobs_of("driver")
        self._pattern = granularity.parse(recipe.granularity)
        self._change: str = get("driver", recipe.driver).facts["change"]
        self._history, self._reaches, self._progress = history, reach, 0.0
        self._evidence = {x.name: Live(x, optimizer, history.past.get(x.name, {})) for x in layers}
        check_change(recipe, self._change, self._knobs, self._pattern)

    def begin(self, model: nn.Module, data: Any, loss: Any) -> None:
        """The first mask, made as `prune` makes it."""
        recipe = self._recipe.override(driver="once", hold="zero")
        if (start := self._knobs.get("start")) is not None:
            recipe = recipe.override(criterion=start)
        if recipe.schedule != "one-shot" and recipe.steps == 1:
            recipe = recipe.override(schedule="one-shot")
        made = prune(model, recipe, data=data, loss=loss)
        for layer in self.layers:
            self._set(layer, made.masks[layer.name].to(layer.stored.device))
        self.keeps = {x.name: 1.0 - float(self.dead[x.name].double().mean()) for x in self.layers}
        self._progress = 1.0

    def take(self, masks: Mapping[str, Tensor]) -> None:
        """Masks ``(o, i)`` that were made elsewhere; layers that they do not name stay as they are.

        Raises:
            ModelError: they are of another model.
        """
        for layer in self.layers:
            if layer.name not in masks:
                continue
            mask = masks[layer.name]
            if mask.dtype != torch.bool or tuple(mask.shape) != layer.shape:
                raise ModelError(f"the mask of {layer.name} is {tuple(mask.shape)}, the weight {layer.shape}")
            self._set(layer, mask.to(layer.stored.device))
        self._progress = 1.0

    def choose(self, update: Update, seed: int, criterion: str | None = None) -> None:
        """New masks for all layers; draws are made from ``seed``."""
        # Draws differ from update to update, and do not depend on what was drawn before.
        recipe = dataclasses.replace(self._recipe, seed=seed)
        if criterion is not None:
            recipe = recipe.override(criterion=criterion)
        sparsity = sparsity_at(recipe.schedule, update.progress, recipe.sparsity)
        old = {x.name: self.mask(x) for x in self.layers}
        keeps = self.keeps
        measured = get("allocation", recipe.allocation).facts.get("measure") is not None
        if update.progress != self._progress or (update.fresh and measured) or not keeps:
            facts = {}
            for x in self.layers:
                mask = None if update.fresh or x.name not in self.dead else old[x.name]
                facts[x.name] = layer_facts(x, None, sketch_layer(x, recipe, self._evidence[x.name], True, mask))
            keeps = allocate(recipe, facts, sparsity, None if update.fresh else self.keeps)
        change = "renew" if update.fresh else self._change
        turn = Turn(self.layers, self._pattern, recipe, self._knobs, update, self._evidence, old, dict(keeps))
        stay = CHANGES[change](turn)
        if self._reaches:
            self._widen(turn)
        for layer in self.layers:
            new = self._pattern.unpool(stay[layer.name], layer.shape)
            if layer.name in turn.born:
                born = self._pattern.unpool(turn.born[layer.name], layer.shape)
                layer.stored.detach().masked_fill_(layer.from_oi(born), 0.0)
                self._history.born(layer, born, seed)
            self._set(layer, new)
        self.keeps, self._progress = dict(turn.keeps), update.progress

    def _widen(self, turn: Turn) -> None:
        """The larger set that gets gradients: the best of all, and so those of the mask among them."""
        size = float(self._recipe.knobs_of("hold")["size"])
        for layer in self.layers:
            score = turn.score(layer)
            count = keep_count(min(1.0, size * turn.keeps[layer.name]), score.shape[1])
            count = max(count, keep_count(turn.keeps[layer.name], score.shape[1]))
            self.reach[layer.name] = layer.from_oi(self._pattern.unpool(select(score, count), layer.shape)).contiguous()

    def mask(self, layer: Layer) -> Tensor:
        """What stays of a layer, ``(o, i)``."""
        if layer.name not in self.dead:
            return torch.ones(layer.shape, dtype=torch.bool, device=layer.stored.device)
        return ~layer.to_oi(self.dead[layer.name])

    def _set(self, layer: Layer, mask_oi: Tensor) -> None:
        self.dead[layer.name] = layer.from_oi(~mask_oi).contiguous()

    def harden(self) -> None:
        """Nothing else goes at the end."""

    def state_dict(self) -> dict[str, Any]:
        masks = {x.name: self.mask(x).cpu() for x in self.layers if x.name in self.dead}
        return {"keeps": dict(self.keeps), "progress": self._progress, "masks": masks}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`.

        Raises:
            ModelError: it is of another model.
        """
        masks: Mapping[str, Tensor] = state["masks"]
        known = {x.name: x for x in self.layers}
        for name, mask in masks.items():
            if name not in known or mask.shape != known[name].shape or mask.dtype != torch.bool:
                raise ModelError(f"this checkpoint is of another model: it has a mask of {name}, {tuple(mask.shape)}")
        self.keeps = {str(k): float(v) for k, v in state["keeps"].items()}
        self._progress, self.dead = float(state["progress"]), {}
        for name, mask in masks.items():
            self._set(known[name], mask.to(known[name].stored.device))
