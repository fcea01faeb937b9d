"""The masks of units of the whole model: channels, neurons and heads that can only go together, while it trains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .. import granularity
from ..drivers import Update
from ..errors import ModelError, RecipeError
from ..layers import Layer, located
from ..recipe import Recipe
from ..registry import get
from ..schedule import sparsity_at
from ..structured import StructuredPlan, Target, plan_structured
from ..structured.allocate import gone, meet
from ..structured.make import Case
from ..structured.score import Scores, unit_scores, weight_scores
from ..surgery.shrink import kept_by_name
from .history import History, Live


@dataclass(frozen=True)
class Whole:
    """A parameter that units run through."""

    name: str
    module: nn.Module
    parameter: str
    index: int | None = None

    @property
    def stored(self) -> Tensor:
        found: Tensor = getattr(self.module, self.parameter)
        return found


class Units:
    """Masks of units of a model, found and proven once on an example.

    A copy of the model, on which the proof is made, is kept until the end.

    Args:
        target: see `Target`; without it the recipe's sparsity is the share of the parameters that goes.
        multiple: sizes that remain are multiples of it.

    Attributes:
        cuts: `plan` says what can be cut away.

    Raises:
        RecipeError: no example, a criterion that scores no weights, or nothing that could go.
        ModelError: the model does not run on the example.
    """

    cuts = True

    def __init__(
        self, model: nn.Module, recipe: Recipe, layers: list[Layer], optimizer: Optimizer | None, history: History, *,
        example: Any, target: str | None, multiple: int,
    ) -> None:  # fmt: skip
        _check(recipe, example)
        self.model, self.layers, self._recipe, self._multiple = model, layers, recipe, multiple
        self._target = Target.parse(target if target is not None else f"params {100 * recipe.sparsity:g}%")
        self._where = granularity.parse(recipe.granularity).coupled
        self._soft = get("hold", recipe.hold).facts["weight"] == "free"
        self._case = Case(model, recipe, example)
        self._count = self._case.counting(self._target)
        # Which units may go is settled before training: those whose removal is proven, at the target itself.
        ranked = recipe.override(criterion="magnitude", driver="once", hold="zero", schedule="one-shot", steps=1)
        first = plan_structured(
            model, ranked, target=self._target, example=example, multiple=multiple, where=self._where
        )
        if not first.kept:
            raise RecipeError("nothing can go in units here: " + "; ".join(first.notes or [first.proof.reason]))
        self._left = {i: f.reason for i, f in enumerate(first.families) if f.reason}
        self._active = [i for i in range(len(first.families)) if i not in self._left]
        self._outputs = {name: output for _, name, output in located(model)}
        self._evidence = {x.name: Live(x, optimizer, history.past.get(x.name, {})) for x in layers}
        self._counts = [len(self._case.found.families[i]) for i in self._active]
        self._labels: frozenset[int] = frozenset()
        self._progress = 0.0
        self.dead: dict[str, Tensor] = {}
        self.places = self._places()

    def begin(self, model: nn.Module, data: Any, loss: Any) -> None:
        """The first mask, where it is made before training."""
        self.choose(Update(), self._recipe.seed)

    def take(self, masks: Mapping[str, Tensor]) -> None:
        """Units are masked by their plan alone."""
        raise RecipeError("masks of weights are held without units of the whole model: leave out example and target")

    def _places(self) -> list[Whole]:
        """Every parameter that a unit that may go runs through, once."""
        found = self._case.found
        everything = frozenset[int]().union(*(u.gone for i in self._active for u in found.families[i].units))
        places: dict[int, Whole] = {}
        for name in kept_by_name(found, everything):
            path, _, leaf = name.rpartition(".")
            module = self.model.get_submodule(path)
            if leaf in module._parameters:
                places.setdefault(id(getattr(module, leaf)), Whole(name, module, leaf))
        return list(places.values())

    def choose(self, update: Update, seed: int, criterion: str | None = None) -> None:
        """New masks for all units."""
        recipe = self._recipe if criterion is None else self._recipe.override(criterion=criterion)
        found = self._case.found
        families = [found.families[i] for i in self._active]
        each = weight_scores(self.model, recipe, self._evidence)
        scores = unit_scores(found, each, self._where, recipe.allocation == "standardized")
        mine = [scores[i] if len(scores[i]) else np.ones(len(found.families[i])) for i in self._active]
        if not update.fresh:  # what is gone stays gone
            mine = [_below(s, self._lost(i)) for i, s in zip(self._active, mine, strict=True)]
        before = self._count(frozenset())
        share = 1 - self._target.remaining(before) / before
        goal = Target(self._target.quantity, limit=before * (1 - sparsity_at(recipe.schedule, update.progress, share)))
        if goal.remaining(before) >= before:
            counts = [len(f) for f in families]
        else:
            _, counts = meet(families, mine, goal, recipe.allocation, self._multiple, self._count)
        if not update.fresh:
            counts = [min(a, b) for a, b in zip(counts, self._counts, strict=True)]
        self._counts, self._progress = counts, update.progress
        self._labels = gone(families, mine, counts)
        self.dead = self._masked(self._soft)

    def _lost(self, family: int) -> Any:
        """Which units of a family are gone."""
        return np.array([u.gone <= self._labels for u in self._case.found.families[family].units])

    def _masked(self, soft: bool) -> dict[str, Tensor]:
        """What is gone of each parameter; ``soft``: of the weights that compute a unit alone."""
        kept = kept_by_name(self._case.found, self._labels)
        dead = {}
        for place in self.places:
            gone_here = torch.zeros(place.stored.shape, dtype=torch.bool)
            axes: Mapping[int, Any] = kept.get(place.name, {})
            for axis, positions in axes.items():
                if not soft or self._outputs.get(place.name) == axis:
                    lost = np.setdiff1d(np.arange(gone_here.shape[axis]), positions)
                    gone_here.index_fill_(axis, torch.from_numpy(lost), True)
            dead[place.name] = gone_here.to(place.stored.device)
        return dead

    def harden(self) -> None:
        """Soft masks take all of a unit at the end: what computes it, its normalization, and what reads it."""
        self.dead = self._masked(False)

    def mask(self, layer: Layer) -> Tensor:
        """What stays of a layer, ``(o, i)``."""
        whole = getattr(layer.module, layer.parameter)
        name = next((p.name for p in self.places if p.stored is whole), None)
        if name is None or name not in self.dead:
            return torch.ones(layer.shape, dtype=torch.bool, device=layer.stored.device)
        dead = self.dead[name]
        return ~layer.to_oi(dead if layer.index is None else dead[layer.index])

    def plan(self) -> StructuredPlan:
        """The plan that takes exactly what is masked, with its proof.

        Raises:
            ModelError: the smaller model is not proven to compute what the masked one does.
        """
        case = self._case
        proof = case.prove(self._labels)
        if not proof.proven:
            raise ModelError(f"the smaller model is not proven to compute what the masked one does: {proof.reason}")
        return case.plan(self._target, self._labels, proof, self._left, self._multiple)

    def state_dict(self) -> dict[str, Any]:
        return {
            "progress": self._progress, "counts": list(self._counts),
            "gone": [self._lost(i).tolist() for i in self._active],
            "masks": {n: x.cpu().clone() for n, x in self.dead.items()},
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`.

        Raises:
            ModelError: it is of another model.
        """
        families = [self._case.found.families[i] for i in self._active]
        if [len(f) for f in families] != [len(lost) for lost in state["gone"]]:
            raise ModelError("this checkpoint is of another model: its units are others")
        self._progress, self._counts = float(state["progress"]), [int(n) for n in state["counts"]]
        taken = [f.units[k].gone for f, lost in zip(families, state["gone"], strict=True) for k in np.flatnonzero(lost)]
        self._labels = frozenset[int]().union(*taken)
        devices = {p.name: p.stored.device for p in self.places}
        self.dead = {n: x.to(devices[n]) for n, x in state["masks"].items()}


def _below(scores: Scores, lost: Any) -> Scores:
    """Scores in which those that are lost are lower than all others."""
    if not lost.any() or lost.all():
        return scores
    least = scores[~lost].min()
    found: Scores = np.where(lost, least / 2 if least > 0 else least - 1.0, scores)
    return found


def _check(recipe: Recipe, example: Any) -> None:
    """What units that are masked while a model trains cannot be."""
    pattern = granularity.parse(recipe.granularity)
    if pattern.whole:
        raise RecipeError(
            f"granularity '{recipe.granularity}' is for prune() and plan(): while a model trains, units are coupled, "
            "filter or channel"
        )
    if example is None:
        raise RecipeError(
            f"granularity '{recipe.granularity}' follows one forward pass: give inputs for it with example="
        )
    change = get("driver", recipe.driver).facts["change"]
    if change not in ("cut", "renew"):
        raise RecipeError(f"driver '{recipe.driver}' is for single weights: units take gradual, renew or once")
    if get("hold", recipe.hold).needs or get("hold", recipe.hold).facts["weight"] == "dense":
        raise RecipeError(f"hold '{recipe.hold}' is for single weights: units are held zero, or free")
    of = get("criterion", recipe.criterion or "").facts.get("of")
    if of is not None and of != "norm":
        raise RecipeError(f"criterion '{recipe.criterion}' is measured on data, not while a model trains: use prune()")
