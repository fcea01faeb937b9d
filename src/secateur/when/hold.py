"""Parameters between the steps of an optimizer: zeroed, left free, or masked before a dense copy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import ModelError, RecipeError
from ..formats import OnGrid
from ..layers import Layer
from ..recipe import Recipe
from ..registry import get
from ..solve import layer_generator
from .history import History
from .rounded import Rounded, Tied


class Place(Protocol):
    """A stored tensor of a model that is masked: a `Layer`, or any other parameter."""

    @property
    def name(self) -> str: ...
    @property
    def module(self) -> nn.Module: ...
    @property
    def parameter(self) -> str: ...
    @property
    def index(self) -> int | None: ...
    @property
    def stored(self) -> Tensor: ...


class Holding:
    """How a recipe's hold treats the masked parameters of a model.

    Attributes:
        weight: ``zero``, ``free`` or ``dense``; see `secateur.holds`.
        dense: the weights behind the masks, by place, where the hold keeps them.
        reach: what gets gradients, in the stored shape, where the hold asks for it.
    """

    def __init__(
        self, recipe: Recipe, optimizer: Optimizer | None, places: Iterable[Place], steps: int,
        grids: Mapping[str, OnGrid] | None = None,
    ) -> None:  # fmt: skip
        part = get("hold", recipe.hold)
        self._part, self._knobs, self._recipe = part, recipe.knobs_of("hold"), recipe
        self._optimizer, self.places, self._steps = optimizer, list(places), steps
        self.weight: str = part.facts["weight"]
        self._forgets = part.facts["state"] == "zero"
        self.first = bool(part.facts.get("first"))
        self.backward: str = part.facts["backward"]
        self.finish: str | None = part.facts.get("finish")
        self.dense: dict[str, Tensor] = {}
        self.reach: dict[str, Tensor] = {}
        self._lifted = False
        self._remove: Callable[[], None] | None = None
        if (self.weight == "dense" or part.needs) and optimizer is None:
            raise RecipeError(f"method '{recipe.method}' works on what the optimizer is given: pass optimizer=")
        decays = optimizer is not None and any(g.get("weight_decay") for g in optimizer.param_groups)
        knob = part.facts.get("decays")
        if knob is not None and not decays and not self._knobs[knob] > 0:
            raise RecipeError(
                f"hold '{recipe.hold}' lets weights shrink by weight decay alone: give the optimizer a "
                f"weight_decay, or set hold.{knob}"
            )
        layers = [p for p in self.places if isinstance(p, Layer)]
        self._few: Rounded | Tied | None = None  # of weights that take few values
        if part.facts.get("rounds"):
            self._few = Rounded(layers, grids or {}, **self._knobs)
        elif part.facts.get("ties"):
            self._few = Tied(layers)
        if self.weight == "dense":
            self.dense = {p.name: p.stored.detach().clone() for p in self.places}

    @property
    def wanted(self) -> frozenset[str]:
        """Facts of a run that the hold names."""
        return frozenset(self._part.needs)

    def watch(self, before: Callable[[], None]) -> None:
        """Call ``before``, with dense weights in place, as soon as the optimizer has its gradients."""

        def ready() -> None:
            if getattr(self._optimizer, "grad_scale", None) is not None:
                raise ModelError(
                    "this optimizer unscales gradients by itself, and the session would read scaled ones: call "
                    "scaler.unscale_(optimizer) before scaler.step(optimizer)"
                )
            if self._lifted and self.weight == "dense":
                raise ModelError(
                    "the optimizer stepped twice without session.step(), which masks the weights again between steps"
                )
            self.lift()
            before()

        def hook(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
            if closure is None:
                ready()
                return None

            def closed() -> Any:  # gradients are made within the step, on the masked weights
                result = closure()
                ready()
                return result

            rest = {k: v for k, v in kwargs.items() if k != "closure"}
            return (args[0], closed, *args[2:]), rest

        assert self._optimizer is not None
        self._remove = self._optimizer.register_step_pre_hook(hook).remove

    @torch.no_grad()
    def lift(self) -> None:
        """Put the dense weights in place, unless they are."""
        if self.weight == "dense" and not self._lifted:
            for place in self.places:
                place.stored.copy_(self.dense[place.name])
        self._lifted = True

    @torch.no_grad()
    def turn(self, layers: Iterable[Layer], dead: Mapping[str, Tensor], history: History, seed: int) -> None:
        """What the hold makes of weights and gradients for the step that comes."""
        if not self._part.needs:
            return
        rates = self._rates()
        for layer in layers:
            whole = getattr(layer.module, layer.parameter)
            if whole.grad is None or layer.name not in dead:
                continue
            gradient = whole.grad if layer.index is None else whole.grad[layer.index]
            past = {f: layer.from_oi(x) for f, x in history.past.get(layer.name, {}).items()}
            facts = {
                "weight": layer.stored.detach(), "gradient": gradient, "mask": ~dead[layer.name],
                "reach": self.reach.get(layer.name), "rate": rates.get(id(whole), 0.0), "steps": self._steps,
                **past,
            }  # fmt: skip
            if isinstance(self._few, Tied):
                facts["cluster"] = layer.from_oi(self._few.cluster[layer.name])
            if "generator" in self._part.needs:
                facts["generator"] = layer_generator(seed, f"{layer.name} hold", layer.stored.device)
            weight, new = self._part(facts, **self._knobs)
            if weight is not facts["weight"]:
                layer.stored.copy_(weight)
            if new is not gradient:
                gradient.copy_(new)

    def _rates(self) -> dict[int, float]:
        groups = [] if self._optimizer is None else self._optimizer.param_groups
        return {id(p): float(g.get("lr", 0.0)) for g in groups for p in g["params"]}

    @torch.no_grad()
    def hold(self, dead: Mapping[str, Tensor], changed: bool) -> None:
        """Zero what is gone: the weights, and what the optimizer remembers of them where the hold says so."""
        if self.weight == "free" and not changed:
            return
        forget = self._forgets and self._optimizer is not None
        for place in self.places:
            if self.weight == "dense" and self._lifted:
                self.dense[place.name].copy_(place.stored)
            gone = dead.get(place.name)
            if gone is None:
                continue
            place.stored.masked_fill_(gone, 0.0)
            if forget:
                self._forget(place, gone)
        if self._few is not None:
            self._few.write()
        self._lifted = False

    def _forget(self, place: Place, gone: Tensor) -> None:
        assert self._optimizer is not None
        whole = getattr(place.module, place.parameter)
        if whole not in self._optimizer.state:
            return
        for kept in self._optimizer.state[whole].values():
            if isinstance(kept, Tensor) and kept.shape == whole.shape:
                (kept if place.index is None else kept[place.index]).masked_fill_(gone, 0.0)

    def settle(self) -> None:
        """From now on what is gone stays zero, where it was free."""
        self.weight, self._forgets, self.backward = "zero", True, "sparse"

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        return {"dense": _saved(self.dense), "reach": _saved(self.reach)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        for name, value in self.dense.items():
            value.copy_(state["dense"][name])
        devices = {p.name: p.stored.device for p in self.places}
        self.reach = {n: x.to(devices[n]) for n, x in state["reach"].items()}
        self._lifted = False

    def close(self) -> None:
        """Nothing is kept any more, and the optimizer and the model's modules are as they were."""
        if self._few is not None:
            self._few.close()
        if self._remove is not None:
            self._remove()
        self.dense, self.reach = {}, {}


def _saved(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n: x.cpu().clone() for n, x in tensors.items()}
