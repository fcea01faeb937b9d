"""What a training run shows of a layer: the last gradient, the optimizer's momentum, and what gathers over steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..errors import DataError, RecipeError
from ..layers import Layer
from ..select import is_finite
from ..solve import layer_generator

#: Facts that take the gradients of all weights in each step, of those that are gone too.
EVERY_STEP = frozenset({"momentum", "movement", "sensitivity", "uncertainty"})


def _moved(past: dict[str, Tensor], weight: Tensor, gradient: Tensor, knobs: Mapping[str, Any]) -> None:
    past["movement"].sub_(weight * gradient)


def _sensed(past: dict[str, Tensor], weight: Tensor, gradient: Tensor, knobs: Mapping[str, Any]) -> None:
    now = (weight * gradient).abs()
    past["sensitivity"].lerp_(now, 1 - knobs.get("beta1", 0.85))
    past["uncertainty"].lerp_((now - past["sensitivity"]).abs(), 1 - knobs.get("beta2", 0.95))


@dataclass(frozen=True)
class Gathered:
    """Facts that one function brings up to date in each step.

    Attributes:
        before: with the weight as it was before the optimizer moved it, or as it is after.
        add: ``(past, weight, gradient, the criterion's knobs)``; changes ``past`` in place.
    """

    facts: tuple[str, ...]
    before: bool
    add: Callable[[dict[str, Tensor], Tensor, Tensor, Mapping[str, Any]], None]


GATHERED = (
    Gathered(("movement",), True, _moved),
    Gathered(("sensitivity", "uncertainty"), False, _sensed),
)


class History:
    """What gathers over the steps of a run, by layer and fact; only what is wanted is kept.

    Args:
        wanted: facts that criteria and holds ask for.
        knobs: the criterion's.
    """

    def __init__(self, layers: Sequence[Layer], wanted: frozenset[str], knobs: Mapping[str, Any]) -> None:
        self._layers, self._knobs = layers, knobs
        self._live = [g for g in GATHERED if wanted & set(g.facts)]
        self.past: dict[str, dict[str, Tensor]] = {}
        for layer in layers:
            mine = {f: torch.zeros_like(layer.weight()) for g in self._live for f in g.facts}
            if "sign" in wanted:
                mine["sign"] = layer.weight() >= 0
            if mine:
                self.past[layer.name] = mine

    def asks(self, before: bool) -> bool:
        """Whether something gathers at that moment of a step."""
        return any(g.before == before for g in self._live)

    @torch.no_grad()
    def gather(self, before: bool) -> None:
        """One more step; one whose gradients are not finite counts nothing."""
        if not self.asks(before) or not finite_gradients(self._layers):
            return
        for layer in self._layers:
            weight, gradient = layer.weight(), layer.gradient()
            for gathered in self._live:
                if gathered.before == before:
                    gathered.add(self.past[layer.name], weight, gradient, self._knobs)

    def born(self, layer: Layer, grown: Tensor, seed: int) -> None:
        """Weights that have just grown get a random sign, where signs are kept."""
        sign = self.past.get(layer.name, {}).get("sign")
        if sign is not None:
            generator = layer_generator(seed, f"{layer.name} sign", sign.device)
            drawn = torch.rand(sign.shape, generator=generator, device=sign.device) < 0.5
            sign.copy_(torch.where(grown, drawn, sign))

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        return {n: {f: x.cpu().clone() for f, x in mine.items()} for n, mine in self.past.items()}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        for name, mine in self.past.items():
            for fact, value in mine.items():
                value.copy_(state[name][fact])


def finite_gradients(layers: Sequence[Layer]) -> bool:
    """Whether all gradients are finite: a scaler of mixed precision skips a step where they are not.

    Raises:
        DataError: there are none.
    """
    for layer in layers:
        gradient = getattr(layer.module, layer.parameter).grad
        if gradient is None:
            raise DataError(
                f"{layer.name} has no gradient: call session.step() after optimizer.step() and before zero_grad()"
            )
        if not is_finite(gradient):
            return False
    return True


class Live(Mapping[str, Any]):
    """Evidence about one layer that a training run shows by itself."""

    def __init__(self, layer: Layer, optimizer: Optimizer | None, past: Mapping[str, Tensor]) -> None:
        self._layer, self._optimizer, self._past = layer, optimizer, past

    def __getitem__(self, fact: str) -> Any:
        if fact == "gradient":
            return self._layer.gradient()
        return self._momentum() if fact == "momentum" else self._past[fact]

    def __iter__(self) -> Iterator[str]:
        return iter(("gradient", "momentum", *self._past))

    def __len__(self) -> int:
        return 2 + len(self._past)

    def _momentum(self) -> Tensor:
        whole = getattr(self._layer.module, self._layer.parameter)
        state: Mapping[str, Any] = {} if self._optimizer is None else self._optimizer.state.get(whole, {})
        if "exp_avg" in state:
            found = state["exp_avg"] / (state["exp_avg_sq"].sqrt() + 1e-8)
        elif isinstance(state.get("momentum_buffer"), Tensor):
            found = state["momentum_buffer"]
        else:  # before the first step
            found = torch.zeros_like(whole)
        found = self._layer.to_oi((found if self._layer.index is None else found[self._layer.index]).detach())
        return found if found.dtype == torch.float64 else found.float()


def check_momentum(optimizer: Optimizer | None, who: str) -> None:
    """Refuse an optimizer that remembers no momentum."""
    groups = [] if optimizer is None else optimizer.param_groups
    if not any(g.get("momentum", 0) or "betas" in g for g in groups):
        raise RecipeError(f"{who} needs the optimizer's momentum: pass optimizer=, SGD with momentum or an Adam")
