"""Gates and penalties of a training session, as the session calls them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .. import granularity as granularity_module
from ..errors import ModelError, RecipeError
from ..layers import Layer
from ..learned import Now, Penalty
from ..recipe import Recipe
from ..registry import get
from ..schedule import sparsity_at
from ..structured import StructuredPlan, plan_zeros
from .gates import Gates
from .pools import MatrixPool, Pool, Units, allocated, find_units, scale_pools


@dataclass(eq=False)
class _Held:
    """A penalty's hold on one pool, or on the gates.

    Attributes:
        keep: the fraction of the units that stays in the end.
        state: what the penalty remembers.
    """

    name: str
    pool: Pool | None
    keep: float
    state: dict[str, Tensor]


class Learning:
    """What a `Session` holds where the recipe has a gate or a penalty.

    Attributes:
        decides: the driver makes no masks: the gate's score makes them at the end, or units of the whole model are
            penalized, which `secateur.plan` ranks and cuts.
        cuts: gates close units of the whole model, so that `plan` says what can be cut away.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        layers: Sequence[Layer],
        *,
        optimizer: Optimizer | None,
        steps: int,
        example: Any = None,
        target: str | None = None,
        multiple: int = 8,
        progress: float = 0.0,
    ) -> None:
        self._model, self._recipe, self._optimizer, self._steps = model, recipe, optimizer, steps
        self._pattern = granularity_module.parse(recipe.granularity)
        self._at, self._sparsity = 0, recipe.sparsity
        part = None if recipe.penalty == "none" else get("penalty", recipe.penalty)
        self._on: str = "" if part is None else part.facts["on"]
        self._penalty: Penalty | None = None if part is None else part.function(**recipe.knobs_of("penalty"))
        self.decides = recipe.gate != "none" or bool(self._pattern.coupled)
        self.cuts = recipe.gate != "none" and bool(self._pattern.coupled)
        self._goal = {
            "target": target or f"params {100 * recipe.sparsity:g}%",
            "example": example,
            "multiple": multiple,
        }
        self._check(example)
        looked = recipe.gate != "none" or self._on in ("unit", "zero-invariant")
        units = find_units(model, recipe, example, target, multiple) if self._pattern.coupled and looked else None
        if units is not None and target is not None:
            self._sparsity = 1.0 - units.density
        self._keep = 1.0 - sparsity_at(recipe.schedule, progress, self._sparsity)
        self._held = self._pools(layers, units)
        self._gates: Gates | None = None
        if recipe.gate != "none":
            self._gates = Gates(recipe, layers, units, optimizer, steps, self._keep, self._on)
        for held in self._held:
            assert self._penalty is not None
            held.state = dict(self._penalty.start(self._seen(held).detach(), self._moment(held)))

    @staticmethod
    def of(model: nn.Module, recipe: Recipe, layers: Sequence[Layer], **more: Any) -> Learning | None:
        """What the recipe asks for; None where it has neither a gate nor a penalty."""
        return None if recipe.gate == recipe.penalty == "none" else Learning(model, recipe, layers, **more)

    def _check(self, example: Any) -> None:
        recipe, gate, penalty = self._recipe, self._recipe.gate, self._recipe.penalty
        what = f"gate '{gate}'" if gate != "none" else f"penalty '{penalty}'"
        if self._steps < 1:
            raise RecipeError(f"{what} works over a run: say how long it is, steps=")
        if isinstance(self._model, nn.parallel.DistributedDataParallel) and gate != "none":
            raise ModelError(
                f"{what} puts parameters into the model: attach to the model first, then wrap it in "
                "DistributedDataParallel"
            )
        if self._on in ("density", "regularizer") and gate == "none":
            raise RecipeError(f"penalty '{penalty}' acts on a gate, and this recipe has none: choose one with gate=")
        if self._penalty is not None and self._penalty.step is not None and self._optimizer is None:
            raise RecipeError(f"penalty '{penalty}' follows the optimizer's steps: pass optimizer=")
        if self._on == "zero-invariant" and not self._pattern.coupled:
            raise RecipeError(f"penalty '{penalty}' acts on units of the whole model: choose granularity coupled")
        if self._pattern.whole:
            raise RecipeError(f"{what} does not act on whole {self._pattern.coupled}: choose another granularity")
        if self._pattern.coupled and gate != "none" and not get("gate", gate).facts.get("units"):
            raise RecipeError(f"gate '{gate}' works on matrices, not on units: choose granularity element, row or N:M")
        if self._pattern.coupled and example is None and (gate != "none" or self._on in ("unit", "zero-invariant")):
            raise RecipeError(
                f"granularity '{recipe.granularity}' follows one forward pass: give inputs for it with example="
            )

    def _pools(self, layers: Sequence[Layer], units: Units | None) -> list[_Held]:
        """What the penalty looks at."""
        if not self._on:
            return []
        if self._on in ("density", "regularizer"):
            return [_Held(self._on, None, 1.0 - self._sparsity, {})]
        if self._on == "scale":
            return [_Held(p.name, p, 1.0, {}) for p in scale_pools(self._model, self._recipe.penalty)]
        if units is not None:
            pools = units.makers if self._on == "zero-invariant" else units.pools
            return [_Held(p.name, p, units.keeps[p.name], {}) for p in pools]
        matrices = [MatrixPool.of(x, self._pattern) for x in layers]
        sizes = {p.name: p.pattern.join(p.read().detach().abs(), p.form.shape) for p in matrices}
        keeps = allocated(self._recipe, [p.form for p in matrices], sizes, self._recipe.sparsity)
        return [_Held(p.name, p, keeps[p.name], {}) for p in matrices]

    def _moment(self, held: _Held) -> Now:
        """The moment as a penalty sees it."""
        if held.pool is None:
            return Now(self._at, self._steps, self._keep, final=held.keep)
        return Now(self._at, self._steps, held.keep, lr=self._rate(held.pool), final=held.keep)

    def _rate(self, pool: Pool) -> float:
        """The learning rate of the weights of a pool."""
        mine = {id(p) for p in pool.parameters}
        groups = [] if self._optimizer is None else self._optimizer.param_groups
        return max((float(g["lr"]) for g in groups if any(id(p) in mine for p in g["params"])), default=0.0)

    def _seen(self, held: _Held) -> Tensor:
        if held.pool is not None:
            return held.pool.read()
        assert self._gates is not None
        return self._gates.density() if self._on == "density" else self._gates.regularizer()

    def penalty(self) -> Tensor | None:
        """What is added to the loss; None where there is nothing."""
        if self._penalty is None or self._penalty.value is None or (self._gates is not None and not self.gated):
            return None
        values = [self._penalty.value(self._seen(h), h.state) for h in self._held]
        total = torch.stack([v.to(values[0].device) for v in values]).sum()
        if self._on == "density" and self._gates is not None:  # each gate feels the multiplier itself
            return total * sum(q.numel() for q in self._gates.learned)
        return total

    @torch.no_grad()
    def step(self, at: int, progress: float | None) -> None:
        """After a step of the optimizer; ``progress`` is what the driver says, None where it says nothing."""
        self._at = at
        if progress is not None:
            self._keep = 1.0 - sparsity_at(self._recipe.schedule, progress, self._sparsity)
        if self._gates is not None:
            if progress is not None:
                self._gates.aim(self._keep)
            self._gates.settle(at, self._keep)
        for held in self._held:
            assert self._penalty is not None
            now, x = self._moment(held), self._seen(held).detach()
            held.state = dict(self._penalty.update(x, held.state, now))
            if self._penalty.step is not None and held.pool is not None:
                held.pool.write(self._penalty.step(x, held.state, now))

    @property
    def gated(self) -> bool:
        """Whether there are gates in the model now."""
        return self._gates is not None and self._gates.inserted

    @property
    def density(self) -> float:
        """The fraction of the weights that is expected to stay, as the gates are now."""
        if self._gates is None or not self._gates.has("density"):
            return self._keep
        return float(self._gates.density().detach())

    def masks(self) -> dict[str, Tensor]:
        """Which weights would stay now, by layer name."""
        return {} if self._gates is None else self._gates.masks()

    def plan(self) -> StructuredPlan:
        """What the gates closed, with the proof that the model without it computes the same.

        Raises:
            ModelError: they closed nothing, or it is not proven.
        """
        return plan_zeros(self._model, self._recipe, **self._goal)

    def finish(self) -> dict[str, Tensor]:
        """Leave a plain model; returns the masks, by layer name, where gates made them."""
        return self._gates.finish() if self._gates is not None and self.gated else {}

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers, by name."""
        penalty = {h.name: {k: v.detach().cpu().clone() for k, v in h.state.items()} for h in self._held}
        return {
            "keep": self._keep,
            "gates": None if self._gates is None else self._gates.state_dict(),
            "penalty": penalty,
        }

    def load_state_dict(self, state: Mapping[str, Any], at: int) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            ModelError: it is of another model.
        """
        held = {h.name: h for h in self._held}
        if state["penalty"].keys() != held.keys():
            raise ModelError("this checkpoint is of another model: its penalty looks at other layers")
        self._at, self._keep = at, float(state["keep"])
        for name, values in state["penalty"].items():
            device = self._seen(held[name]).device
            held[name].state = {k: v.to(device, copy=True) for k, v in values.items()}
        if self._gates is not None:
            self._gates.load_state_dict(state["gates"], at, self._keep)
