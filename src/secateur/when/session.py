"""Masks that live through a training run: the user's loop, and one call after each step of the optimizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .. import granularity as granularity_module
from ..calibrate import Loss
from ..drivers import Update
from ..errors import DataError, ModelError, NumericalError, RecipeError
from ..layers import Layer, find_layers
from ..masks import Masks
from ..prune import prune
from ..recipe import Recipe
from ..registry import get
from ..schedule import sparsity_at
from ..select import is_finite, keep_count, select
from ..solve import Facts, allocate, layer_facts, sketch_layer
from ..stream import find_blocks
from .learning import Learning


def attach(
    model: nn.Module,
    method: str | Recipe = "gmp",
    *,
    optimizer: Optimizer | None = None,
    steps: int = 0,
    data: Any = None,
    loss: Loss | None = None,
    example: Any = None,
    masks: Mapping[str, Tensor] | None = None,
    state: Mapping[str, Any] | None = None,
    **axes: Any,
) -> Session:
    """Prune a model while it trains.

    The model stays as it is: same modules, same parameters, same ``state_dict`` keys; weights that are removed are
    zero, and so is what the optimizer remembers of them.

    Args:
        model: any module; the first mask is applied at once.
        method: a named method (``secateur methods --when during`` or ``before``) or a `Recipe`.
        optimizer: whose state is kept clean of removed weights. Without it momentum may move them within a step, and
            they are zeroed again after it.
        steps: how many times the optimizer will step; not needed for methods whose mask does not change.
        data, loss: for methods whose first mask is measured on data, as for `prune`.
        example: for units of the whole model, inputs of one forward pass, as for `plan`.
        masks: held as they are in place of a method, e.g. the ``masks`` of `Pruned`: to fine-tune what was pruned.
        state: of a session to go on with, ``session.state_dict()``; the model and the optimizer have been loaded.
        axes: fields of the recipe that override the method's: ``sparsity``, ``granularity``, ``knobs``, ...

    Returns:
        A `Session`, also usable as a context manager.

    Raises:
        RecipeError: the method does not work on single weights while a model trains, or something is missing.

    >>> net = nn.Linear(10, 10)
    >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    >>> with attach(net, "rigl", optimizer=optimizer, sparsity=0.8, steps=1) as session:
    ...     net(torch.ones(1, 10)).sum().backward()
    ...     optimizer.step()
    ...     session.step()
    >>> int(net.weight.count_nonzero())
    20
    """
    if masks is not None:
        recipe = Recipe(method="given masks", only=tuple(masks), **axes)
    else:
        recipe = method.override(**axes) if isinstance(method, Recipe) else Recipe.of(method, **axes)
    given = {"data": data, "loss": loss, "example": example, "masks": masks, "state": state}
    return Session(model, recipe, optimizer=optimizer, steps=steps, **given)


class Session:
    """What `attach` returns: call `step` after each step of the optimizer.

    Attributes:
        model, recipe, steps: as they were given.
        at: steps taken so far.
        layers: the matrices that are pruned.
    """

    def __init__(
        self, model: nn.Module, recipe: Recipe, *, optimizer: Optimizer | None, steps: int, data: Any,
        loss: Loss | None, example: Any = None, masks: Mapping[str, Tensor] | None = None,
        state: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.model, self.recipe, self.steps, self.at = model, recipe, steps, 0
        self._pattern = granularity_module.parse(recipe.granularity)
        self._driver = get("driver", recipe.driver)
        self._knobs = recipe.knobs_of("driver")
        self._optimizer, self._done = optimizer, False
        self._check(data, loss)
        blocks = find_blocks(model)
        self.layers, _ = find_layers(model, recipe.only, recipe.skip, None if blocks is None else blocks.paths())
        recipe.check(() if self._pattern.coupled else self.layers)
        self._dead: dict[str, Tensor] = {}  # in the shape of the parameter; True where a weight is gone
        self._keeps: dict[str, float] = {}
        self._progress = 0.0
        self._due: Update | None = None
        first = self._asked()
        progress = 0.0 if first is None else first.progress
        more = {"optimizer": optimizer, "steps": steps, "example": example, "progress": progress}
        self._learning = Learning.of(model, recipe, self.layers, **more)
        if state is not None:
            self.load_state_dict(state)
        elif masks is not None:
            self._take(masks)
        elif progress > 0 and (self._learning is None or not self._learning.decides):
            self._begin(data, loss)

    def _take(self, masks: Mapping[str, Tensor]) -> None:
        """Hold masks that were made elsewhere."""
        for layer in self.layers:
            mask = masks[layer.name]
            if mask.dtype != torch.bool or tuple(mask.shape) != layer.shape:
                raise ModelError(f"the mask of {layer.name} is {tuple(mask.shape)}, the weight {layer.shape}")
            self._set(layer, mask.to(layer.stored.device))
        self._progress = 1.0
        self._hold()

    def _check(self, data: Any, loss: Loss | None) -> None:
        recipe = self.recipe
        if "distances" in self._driver.needs:
            raise RecipeError(f"driver '{recipe.driver}' watches whole epochs: use secateur.train(task, ...)")
        if self._pattern.coupled and recipe.gate == recipe.penalty == "none":
            raise RecipeError(
                f"granularity '{recipe.granularity}' is for prune() and plan(), which make the model smaller: "
                "attach() takes element, row, N:M or block"
            )
        if recipe.solver != "rank" or recipe.recovery != "none":
            raise RecipeError(
                f"attach() masks and the training heals: solver '{recipe.solver}' and recovery '{recipe.recovery}' "
                "are for prune()"
            )
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 0:
            raise RecipeError(f"steps is how often the optimizer will step, not {self.steps!r}")
        if recipe.driver == "once":
            return
        if self.steps == 0:
            raise RecipeError(f"method '{recipe.method}' spreads its work over the run: say how long it is, steps=")
        missing = recipe.needs() - {"gradient"}  # which the run shows by itself
        if missing:
            raise RecipeError(
                f"criterion '{recipe.criterion}' needs {sorted(missing)[0]}, which a training run does not show: "
                "choose magnitude, saliency or gradient"
            )

    def _wanted(self) -> set[str]:
        """Facts that criteria ask for while the model trains."""
        grow = self._knobs.get("grow")
        needs = set(get("criterion", grow).needs) if grow else set()
        return needs | set(self.recipe.needs())

    def _begin(self, data: Any, loss: Loss | None) -> None:
        """The first mask, made as `prune` makes it."""
        recipe = self.recipe.override(driver="once")
        if (start := self._knobs.get("start")) is not None:
            recipe = recipe.override(criterion=start)
        if recipe.schedule != "one-shot" and recipe.steps == 1:
            recipe = recipe.override(schedule="one-shot")
        made = prune(self.model, recipe, data=data, loss=loss)
        for layer in self.layers:
            self._set(layer, made.masks[layer.name].to(layer.stored.device))
        self._together()
        self._keeps = {x.name: 1.0 - float(self._dead[x.name].double().mean()) for x in self.layers}
        self._progress = 1.0
        self._hold()

    def step(self) -> None:
        """To be called after ``optimizer.step()`` and before the gradients are cleared.

        Raises:
            ModelError: the session is finished, or took more steps than it was promised.
            DataError: the driver looks at gradients, and there are none.
        """
        if self._done:
            raise ModelError("this session is finished: attach another one to go on")
        self.at += 1
        if (self.recipe.driver != "once" or self._learning is not None) and self.at > self.steps:
            raise ModelError(f"step {self.at} of a run of {self.steps}: attach with the steps that the run has")
        asked = self._asked()
        if self._learning is not None:
            self._learning.step(self.at, None if asked is None else asked.progress)
            if self._learning.decides:
                return
        self._due = asked or self._due
        if self._due is not None and self._ready():
            self._hold()  # the optimizer has just moved what is gone: what grows again begins at zero
            self._update(self._due)
            self._due = None
        self._hold()

    def penalty(self) -> Tensor:
        """What the method adds to the loss; zero for methods that only mask."""
        if self._learning is not None and (found := self._learning.penalty()) is not None:
            return found
        return torch.zeros((), device=next(self.model.parameters()).device)

    @property
    def sparsity(self) -> float:
        """Fraction of the weights of the pruned layers that is gone."""
        if self._learning is not None and self._learning.gated:
            return 1.0 - self._learning.density
        gone = sum(int(self._dead[x.name].sum()) for x in self.layers if x.name in self._dead)
        return gone / sum(x.numel for x in self.layers)

    @property
    def masks(self) -> Masks:
        """The masks ``(o, i)`` as they are now; True keeps."""
        if self._learning is not None and self._learning.gated:
            return Masks(self._learning.masks())
        return Masks({x.name: self._mask(x) for x in self.layers})

    def finish(self) -> Masks:
        """End the session: the model is a plain one with zeros in it; returns the masks."""
        if self._learning is not None and not self._done:
            made = self._learning.finish()
            for layer in self.layers:
                if layer.name in made:
                    self._set(layer, made[layer.name])
        self._hold()
        self._done = True
        return self.masks

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:  # fmt: skip
        if kind is None and not self._done:
            self.finish()

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs beside the model and the optimizer: tensors, numbers and text."""
        masks = {x.name: self._mask(x).cpu() for x in self.layers if x.name in self._dead}
        due = None if self._due is None else dataclasses.asdict(self._due)
        return {
            "at": self.at, "steps": self.steps, "digest": self.recipe.digest, "keeps": dict(self._keeps),
            "progress": self._progress, "due": due, "masks": masks,
            "learning": None if self._learning is None else self._learning.state_dict(),
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken; the model and the optimizer are loaded by the caller, before.

        Raises:
            ModelError: it is of another recipe, run or model.
        """
        if state["digest"] != self.recipe.digest or state["steps"] != self.steps:
            raise ModelError("this checkpoint is of another recipe, or of a run of another length")
        masks: Mapping[str, Tensor] = state["masks"]
        known = {x.name: x for x in self.layers}
        for name, mask in masks.items():
            if name not in known or mask.shape != known[name].shape or mask.dtype != torch.bool:
                raise ModelError(f"this checkpoint is of another model: it has a mask of {name}, {tuple(mask.shape)}")
        self.at, self._keeps = int(state["at"]), {str(k): float(v) for k, v in state["keeps"].items()}
        self._progress = float(state["progress"])
        self._due = None if state["due"] is None else Update(**state["due"])
        self._dead = {}
        for name, mask in masks.items():
            self._set(known[name], mask.to(known[name].stored.device))
        if self._learning is not None:
            self._learning.load_state_dict(state["learning"], self.at)
        self._hold()

    def _asked(self) -> Update | None:
        found: Update | None = self._driver({"step": self.at, "steps": self.steps}, **self._knobs)
        return found

    def _ready(self) -> bool:
        """Whether the gradients that are looked at are finite: a scaler of mixed precision skips such a step too."""
        grows = self._due is not None and self._due.swap > 0
        if "gradient" not in (self._wanted() if grows else self.recipe.needs()):
            return True
        for layer in self.layers:
            gradient = getattr(layer.module, layer.parameter).grad
            if gradient is None:
                raise DataError(
                    f"{layer.name} has no gradient: call session.step() after optimizer.step() and before zero_grad()"
                )
            if not is_finite(gradient):
                return False
        return True

    def _update(self, update: Update) -> None:
        """New masks for all layers."""
        # Draws differ from update to update, and do not depend on what was drawn before.
        recipe = dataclasses.replace(self.recipe, seed=self.recipe.seed + 7919 * self.at)
        sparsity = sparsity_at(recipe.schedule, update.progress, recipe.sparsity)
        evidence = {x.name: _Live(x) for x in self.layers}
        if update.progress == self._progress:
            keeps = self._keeps  # nobody asks for more: counts stay what they are
        else:
            facts = {}
            for x in self.layers:
                mask = self._mask(x) if x.name in self._dead else None
                facts[x.name] = layer_facts(x, None, sketch_layer(x, recipe, evidence[x.name], True, mask))
            keeps = allocate(recipe, facts, sparsity, self._keeps)
        for layer in self.layers:
            old = self._mask(layer)
            score = self._pooled(layer, recipe, evidence[layer.name], old)
            count = keep_count(keeps[layer.name], score.shape[1])
            out = min(round(update.swap * count), score.shape[1] - count)
            stay = select(score, count - out)
            if out:
                other = recipe.override(criterion=self._knobs["grow"])
                rival = self._pooled(layer, other, evidence[layer.name], None).masked_fill(stay, -torch.inf)
                stay = stay | select(rival, out)
            self._set(layer, self._pattern.unpool(stay, layer.shape))
        self._keeps, self._progress = dict(keeps), update.progress
        self._together()

    def _pooled(self, layer: Layer, recipe: Recipe, evidence: Mapping[str, Any], mask: Tensor | None) -> Tensor:
        """Scores of the units ``(pools, units)``; those that are gone by ``mask`` lie below all others."""
        pooled = self._pattern.pool(Facts(layer, recipe, evidence)["score"])
        if not bool(torch.isfinite(pooled).all()):
            raise NumericalError(
                f"criterion '{recipe.criterion}' is not finite in {layer.name}: has training diverged?"
            )
        if mask is None:
            return pooled
        return pooled.masked_fill(~self._pattern.split(mask).any(-1), -torch.inf)

    def _mask(self, layer: Layer) -> Tensor:
        if layer.name not in self._dead:
            return torch.ones(layer.shape, dtype=torch.bool, device=layer.stored.device)
        return ~layer.to_oi(self._dead[layer.name])

    def _set(self, layer: Layer, mask_oi: Tensor) -> None:
        self._dead[layer.name] = layer.from_oi(~mask_oi).contiguous()

    def _together(self) -> None:
        """One process decides for all, where several train together."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for dead in self._dead.values():
                sent = dead.to(torch.uint8)
                torch.distributed.broadcast(sent, src=0)
                dead.copy_(sent)

    @torch.no_grad()
    def _hold(self) -> None:
        """Zero what is gone: the weights, and what the optimizer remembers of them."""
        states: Mapping[Any, Mapping[str, Any]] = {} if self._optimizer is None else self._optimizer.state
        for layer in self.layers:
            dead = self._dead.get(layer.name)
            if dead is None:
                continue
            layer.stored.masked_fill_(dead, 0.0)
            whole = getattr(layer.module, layer.parameter)
            for kept in states.get(whole, {}).values():
                if isinstance(kept, Tensor) and kept.shape == whole.shape:
                    (kept if layer.index is None else kept[layer.index]).masked_fill_(dead, 0.0)


class _Live(Mapping[str, Any]):
    """Evidence about one layer that a training run shows by itself: the gradient of the last batch."""

    def __init__(self, layer: Layer) -> None:
        self._layer = layer

    def __getitem__(self, fact: str) -> Any:
        if fact != "gradient":
            raise KeyError(fact)
        return self._layer.gradient()

    def __iter__(self) -> Iterator[str]:
        return iter(("gradient",))

    def __len__(self) -> int:
        return 1
