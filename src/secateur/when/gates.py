"""Gates in a training session: put into the model, settled before each step, taken out with exact counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .. import granularity as granularity_module
from ..errors import ModelError, NumericalError, RecipeError
from ..layers import Layer
from ..learned import Gate, Now
from ..learned.base import rows
from ..learned.gated import Along, Gated, Insertion, Stacked, Trained, form_of, spread, wide
from ..recipe import Recipe
from ..registry import Part, get
from ..select import keep_count, select
from ..solve import layer_generator
from .pools import Pool, Units, allocated

Inserted = list[tuple[nn.Module, str, nn.Module]]


@dataclass(eq=False)
class Place:
    """One gate: of a matrix, or of a family of units.

    Attributes:
        name: of the layer or the family.
        trained: what is learned and fixed.
        numel: weights that it stands for.
        layer, whole: how the matrix lies in its parameter; None of a family.
        pool: the family's weights; None of a matrix.
    """

    name: str
    trained: Trained
    numel: int
    layer: Layer | None = None
    whole: nn.Parameter | None = None
    pool: Pool | None = None

    @property
    def stored(self) -> Tensor:
        """The matrix as it lies in its parameter, behind the gate."""
        assert self.layer is not None and self.whole is not None
        return self.whole if self.layer.index is None else self.whole[self.layer.index]

    def weight(self) -> Tensor:
        """What is behind the gate, without gradient: ``(o, i)``, or the norms of a family's units, ``(1, units)``."""
        if self.pool is not None:
            return rows(self.pool.read().detach())
        assert self.layer is not None
        return wide(self.layer.to_oi(self.stored.detach()))


class Gates:
    """All gates of a session.

    Args:
        keep: the target at this moment.
        on: what a penalty looks at; the gates must have it.

    Attributes:
        places: one for each matrix, or family.
        inserted: whether they are in the model.
    """

    def __init__(
        self,
        recipe: Recipe,
        layers: Sequence[Layer],
        units: Units | None,
        optimizer: Optimizer | None,
        steps: int,
        keep: float,
        on: str = "",
    ) -> None:
        self._recipe, self._optimizer, self._steps = recipe, optimizer, steps
        self._pattern = granularity_module.parse(recipe.granularity)
        self._part, self._knobs = get("gate", recipe.gate), recipe.knobs_of("gate")
        if optimizer is not None and hasattr(optimizer.step, "_wrapped_by_lr_sched"):
            raise ModelError(
                "the optimizer already has a learning-rate scheduler: attach first, since what gates learn becomes a "
                "parameter group of the optimizer, then make the scheduler"
            )
        self.places: list[Place] = []
        self._keeps: dict[str, float] = {}
        self._counts = None if units is None else units.counts
        self._group: dict[str, Any] | None = None
        self._frozen: list[nn.Parameter] = []
        made = self._of_layers(layers) if units is None else self._of_units(units)
        self.learned = [q for p in self.places for q in p.trained.parameters(recurse=False)]
        if self.learned and optimizer is None:
            raise RecipeError(f"gate '{recipe.gate}' learns numbers of its own: pass optimizer=")
        if on in ("density", "regularizer") and not self.has(on):
            lacks = "sets the count itself" if on == "density" else "has no regularizer of its own"
            raise RecipeError(f"gate '{recipe.gate}' {lacks}: leave penalty '{recipe.penalty}' out")
        self._insertion = Insertion(made)
        self.inserted = True
        self._enter()
        self.aim(keep)
        self.settle(0, keep)

    @property
    def _gates(self) -> list[Gate]:
        return [p.trained.gate for p in self.places]

    def _made(self, part: Part, name: str, weight: Tensor, pool_shape: Sequence[int]) -> Gate:
        facts = {
            "weight": weight,
            "granularity": self._pattern,
            "pool_shape": tuple(pool_shape),
            "generator": layer_generator(self._recipe.seed, f"gate {name}", weight.device),
        }
        made: Gate = part(facts, **self._knobs)
        return made

    def _of_layers(self, layers: Sequence[Layer]) -> Inserted:
        made: Inserted = []
        stacks: dict[tuple[nn.Module, str], dict[int, Gated]] = {}
        for layer in layers:
            form, whole, weight = form_of(layer), getattr(layer.module, layer.parameter), layer.weight()
            gate = self._made(self._part, layer.name, weight, self._pattern.pool_shape(*form.shape)[:2])
            gated = Gated(gate, form, self._pattern, weight)
            self.places.append(Place(layer.name, gated, weight.numel(), form, whole))
            if layer.index is None:
                made.append((layer.module, layer.parameter, gated))
            else:
                stacks.setdefault((layer.module, layer.parameter), {})[layer.index] = gated
        return made + [(module, name, Stacked(gated)) for (module, name), gated in stacks.items()]

    def _of_units(self, units: Units) -> Inserted:
        made: Inserted = []
        for pool, maker in zip(units.pools, units.makers, strict=True):
            self._keeps[pool.name] = units.keeps[pool.name]
            x = pool.read().detach()
            gate = self._made(self._part, pool.name, x[0], (1, x.shape[1]))
            if gate.frozen:
                raise RecipeError(
                    f"gate '{self._recipe.gate}' leaves weights untrained, and those of units belong to several: set "
                    "its knob train_weights"
                )
            trained = Trained(gate, x)
            self.places.append(Place(pool.name, trained, x.numel(), pool=pool))
            for p in maker.parts:
                assert p.owner is not None
                made.append((*p.owner, Along(trained, p.axis, p.places.to(p.whole.device))))
        return made

    def _enter(self) -> None:
        """What gates learn becomes a group of the optimizer; weights that are not to be trained are left out."""
        first = self._gates[0]
        if self.learned and self._optimizer is not None:
            group: dict[str, Any] = {"params": self.learned, "weight_decay": first.weight_decay}
            self._optimizer.add_param_group(group if first.lr is None else {**group, "lr": first.lr})
            self._group = self._optimizer.param_groups[-1]
        for place in self.places if first.frozen else ():
            if place.whole is not None and place.whole.requires_grad:
                self._frozen.append(place.whole)
                place.whole.requires_grad_(False).grad = None  # the optimizer leaves it alone

    def aim(self, keep: float) -> None:
        """A new target: what each layer keeps at this moment, for gates that set the count themselves."""
        if self.places[0].layer is not None and not self.has("density"):
            self._keeps = allocated(self._recipe, self._bare(), self._scores(), 1.0 - keep)

    def _bare(self) -> list[Layer]:
        """The layers as the dense model has them, whose shapes cost nothing to ask for."""
        return [p.layer for p in self.places if p.layer is not None]

    @torch.no_grad()
    def settle(self, at: int, keep: float) -> None:
        """What holds for the passes of the next step."""
        for place in self.places:
            weight = place.weight()
            generator = layer_generator(self._recipe.seed, f"{at} {place.name}", weight.device)
            now = Now(at, self._steps, self._keeps.get(place.name, keep), generator)
            place.trained.settle(weight, now)

    def has(self, what: str) -> bool:
        """Whether the gates have a ``density`` or a ``regularizer``."""
        return all(getattr(g, what) is not None for g in self._gates)

    def density(self) -> Tensor:
        """The expected fraction of the weights that stays, differentiable."""
        total = sum(p.numel for p in self.places)
        return self._summed("density", lambda p, x: x.mean() * (p.numel / total))

    def regularizer(self) -> Tensor:
        """The sum of what the gate's paper adds to the loss."""
        return self._summed("regularizer", lambda p, x: x)

    def _summed(self, what: str, each: Any) -> Tensor:
        found = []
        for p in self.places:
            function = getattr(p.trained.gate, what)
            found.append(each(p, function(p.weight(), p.trained.learned, p.trained.fixed).float()))
        return torch.stack([x.to(found[0].device) for x in found]).sum()

    def _scores(self) -> dict[str, Tensor]:
        """The gates' scores as matrices, or of units ``(1, units)``."""
        found = {}
        for p in self.places:
            score = p.trained.gate.score(p.weight(), p.trained.learned).detach().float()
            if not bool(torch.isfinite(score).all()):
                raise NumericalError(f"the gate of {p.name} is not finite: has training diverged?")
            if p.trained.gate.factor is not None and p.layer is not None:
                score = spread(score, self._pattern, p.layer.shape)
            found[p.name] = score
        return found

    @torch.no_grad()
    def masks(self) -> dict[str, Tensor]:
        """Which weights would stay now, by layer name, with the exact count of the target; nothing of units."""
        if self.places[0].layer is None:
            return {}
        scores = self._scores()
        keeps = allocated(self._recipe, self._bare(), scores, self._recipe.sparsity)
        made = {}
        for name, score in scores.items():
            pooled = self._pattern.pool(score)
            kept = select(pooled, keep_count(keeps[name], pooled.shape[1]))
            made[name] = self._pattern.unpool(kept, (score.shape[0], score.shape[1]))
        return made

    @torch.no_grad()
    def finish(self) -> dict[str, Tensor]:
        """Leave a plain model with plain weights; returns the masks, by layer name.

        A weight stays as the gate gives it in evaluation, or as it is behind the gate where the count wants a weight
        that the gate had closed.
        """
        made = self.masks()
        values = self._final_matrices(made) if made else self._final_units()
        self._insertion.remove()
        self.inserted = False
        for stored, value in values:
            stored.copy_(value)
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._leave()
        return made

    def _final_matrices(self, masks: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
        values = []
        for place in self.places:
            gated = place.trained
            assert place.layer is not None and isinstance(gated, Gated)
            values.append((place.stored, place.layer.from_oi(self._left(place, gated, masks[place.name]))))
        return [(stored, value.to(stored.dtype)) for stored, value in values]

    def _left(self, place: Place, gated: Gated, mask: Tensor) -> Tensor:
        """The weights of a layer that stay, ``(o, i)``."""
        gate, weight = gated.gate, place.weight()
        if gate.factor is not None:
            kept = self._pattern.split(mask).any(-1)
            return weight * spread(self._factor(place, kept), self._pattern, gated.form.shape) * mask
        if gate.final is not None:
            return gate.final(weight, gated.learned, gated.fixed, mask) * mask
        assert gate.weight is not None
        found = gate.weight(weight, gated.learned, gated.fixed, False)
        return torch.where(found == 0, weight, found) * mask

    def _factor(self, place: Place, kept: Tensor) -> Tensor:
        """What is left of a gate on units, where they stay."""
        trained, gate = place.trained, place.trained.gate
        if gate.final is not None:
            return gate.final(place.weight(), trained.learned, trained.fixed, kept)
        assert gate.factor is not None
        found = gate.factor(trained.learned, trained.fixed, False)
        return torch.where(found == 0, 1.0, found)

    def _final_units(self) -> list[tuple[Tensor, Tensor]]:
        final = {}
        scores = [torch.sigmoid(self._scores()[p.name].double()) for p in self.places]  # above 0, in the same order
        assert self._counts is not None
        counts = self._counts([s[0].cpu().numpy() for s in scores])
        for place, score, count in zip(self.places, scores, counts, strict=True):
            kept = select(score, int(count))
            final[id(place.trained)] = (self._factor(place, kept) * kept)[0]
        values: list[tuple[Tensor, Tensor]] = []
        for whole, gates in self._insertion.plain():
            value = wide(whole)
            for gate in gates:
                value = gate.times(value, final[id(gate.units)])
            values.append((whole, value.to(whole.dtype)))
        return values

    def _leave(self) -> None:
        """Take what gates learned out of the optimizer."""
        if self._optimizer is None or self._group is None:
            return
        for parameter in self._group["params"]:
            self._optimizer.state.pop(parameter, None)
        if hasattr(self._optimizer.step, "_wrapped_by_lr_sched"):
            self._group["params"] = []  # a scheduler counts the groups: an empty one stays
        else:
            self._optimizer.param_groups[:] = [g for g in self._optimizer.param_groups if g is not self._group]
        self._group = None

    def state_dict(self) -> dict[str, Any]:
        """What is learned, and what each layer keeps."""
        learned = {
            p.name: {k: v.detach().cpu().clone() for k, v in p.trained.learned.items()} for p in self.places
        }  # fmt: skip
        return {"keeps": dict(self._keeps), "learned": learned}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any], at: int, keep: float) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            ModelError: it is of another model.
        """
        places = {p.name: p for p in self.places}
        if state["learned"].keys() != places.keys():
            raise ModelError("this checkpoint is of another model: it has gates of other layers")
        self._keeps = {str(k): float(v) for k, v in state["keeps"].items()}
        for name, values in state["learned"].items():
            for key, value in values.items():
                mine = places[name].trained.learned[key]
                if mine.shape != value.shape:
                    raise ModelError(f"this checkpoint is of another model: {key} of {name} is {tuple(value.shape)}")
                mine.copy_(value)
        self.settle(at, keep)
