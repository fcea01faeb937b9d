"""Masks that live through a training run: the user's loop, and one call after each step of the optimizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .. import granularity
from ..calibrate import Loss
from ..drivers import Update
from ..errors import ModelError, RecipeError
from ..formats import OnGrid
from ..layers import find_layers
from ..masks import Masks
from ..recipe import TRAINING, Recipe
from ..registry import get
from ..stream import find_blocks
from ..structured import StructuredPlan
from ..structured.choose import layer_globs
from .cost import Ledger, TrainingFlops
from .history import EVERY_STEP, History, check_momentum, finite_gradients
from .hold import Holding
from .learning import Learning
from .matrices import Matrices
from .units import Units


def attach(
    model: nn.Module,
    method: str | Recipe = "gmp",
    *,
    optimizer: Optimizer | None = None,
    steps: int = 0,
    data: Any = None,
    loss: Loss | None = None,
    example: Any = None,
    target: str | None = None,
    multiple: int = 8,
    masks: Mapping[str, Tensor] | None = None,
    grids: Mapping[str, OnGrid] | None = None,
    state: Mapping[str, Any] | None = None,
    **axes: Any,
) -> Session:
    """Prune a model while it trains.

    Modules, parameters and ``state_dict`` keys stay; what is removed is zero, and so is the optimizer's memory of it.

    Args:
        model: any module; the first mask is applied at once.
        method: a named method (``secateur methods --when during`` or ``before``) or a `Recipe`.
        optimizer: whose state is kept clean of removed weights. Without it momentum may move them within a step, and
            they are zeroed again after it. Methods that change gradients, or read momentum, need it.
        steps: how many times the optimizer will step; not needed for methods whose mask does not change.
        data, loss: for methods whose first mask is measured on data, as for `prune`.
        example: for units of the whole model (``sfp``, ``l0-units``, ...), inputs of one forward pass.
        target: for those, what goes, such as ``"flops 50%"``; without it ``sparsity`` is the share of the parameters.
        multiple: for those, sizes that remain are multiples of it.
        masks: held as they are in place of a method, e.g. the ``masks`` of `Pruned`: to fine-tune what was pruned.
        grids: for hold ``integers``, the grids that the weights of layers lie on, and stay on (`Pruned.grids`).
        state: of a session to go on with, ``session.state_dict()``; the model and the optimizer have been loaded.
        axes: fields of the recipe that override the method's: ``sparsity``, ``granularity``, ``knobs``, ...

    Returns:
        A `Session`, also usable as a context manager.

    Raises:
        RecipeError: the method does not work while a model trains, or something is missing.

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
    coupled = granularity.parse(recipe.granularity).coupled
    if not coupled and (example is not None or target is not None) and not recipe.learns:
        raise RecipeError(
            f"example and target are for units of the whole model, and method '{recipe.method}' masks by "
            f"'{recipe.granularity}': choose gradual-structured, sfp, or granularity coupled"
        )
    units = {"example": example, "target": target, "multiple": multiple} if coupled else None
    given = {"data": data, "loss": loss, "units": units, "masks": masks, "grids": grids, "state": state}
    return Session(model, recipe, optimizer=optimizer, steps=steps, **given)


class Session:
    """What `attach` returns: call `step` after each step of the optimizer.

    Attributes:
        model, recipe, steps: as they were given.
        at: steps taken so far.
        layers: the matrices that are pruned.
    """

    def __init__(
        self, model: nn.Module, recipe: Recipe, *, optimizer: Optimizer | None, steps: int, data: Any = None,
        loss: Loss | None = None, units: Mapping[str, Any] | None = None, masks: Mapping[str, Tensor] | None = None,
        grids: Mapping[str, OnGrid] | None = None, state: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.model, self.recipe, self.steps, self.at = model, recipe, steps, 0
        self._driver = get("driver", recipe.driver)
        self._knobs = recipe.knobs_of("driver")
        self._done = False
        self._due: Update | None = None
        self._check(optimizer)
        blocks = None if units is not None else find_blocks(model)
        only, skip = (recipe.only, recipe.skip) if units is None else map(layer_globs, (recipe.only, recipe.skip))
        self.layers, _ = find_layers(model, only, skip, None if blocks is None else blocks.paths())
        first = self._asked(0)
        hold = get("hold", recipe.hold)
        knobs = recipe.knobs_of("criterion") if recipe.criterion is not None else {}
        history = History(self.layers, frozenset(self._wanted(True) | set(hold.needs)), knobs)
        if units is not None and not recipe.learns:
            self._masks: Matrices | Units = Units(model, recipe, self.layers, optimizer, history, **units)
        else:
            recipe.check(self.layers if units is None else ())
            self._masks = Matrices(recipe, self.layers, optimizer, history, "reach" in hold.needs)
        self._history, self._holding = history, Holding(recipe, optimizer, self._masks.places, steps, grids)
        self._ledger, self._ever = Ledger(self.layers), dict[str, Tensor]()
        soft = self._holding.weight == "free" and not self._holding.first
        self._settles = int(self._knobs.get("until", 1.0) * steps) if soft else None
        if self._holding.weight == "dense" or self._holding.wanted or history.asks(before=True):
            self._holding.watch(self._before)
        progress = 0.0 if first is None else first.progress
        more = {"optimizer": optimizer, "steps": steps, "progress": progress, **(units or {})}
        self._learning = Learning.of(model, recipe, self.layers, **more) if recipe.learns else None
        if state is not None:
            self.load_state_dict(state)
        elif masks is not None:
            self._masks.take(masks)
            self._begun()
        elif first is not None and progress > 0 and not self._decided:
            # What only training shows, and soft masks, begin with the first steps.
            if first.fresh and (recipe.needs() or self._holding.weight == "free"):
                return
            if first.fresh:
                self._change(first)
            else:
                self._masks.begin(model, data, loss)
            self._begun()

    def _begun(self) -> None:
        """Masks are there, and hold."""
        self._changed()
        self._holding.lift()
        self._holding.hold(self._masks.dead, True)

    @property
    def _decided(self) -> bool:
        """Whether what is learned makes the masks, at the end, and no driver does."""
        return self._learning is not None and self._learning.decides

    def _check(self, optimizer: Optimizer | None) -> None:
        recipe = self.recipe
        if "distances" in self._driver.needs:
            raise RecipeError(f"driver '{recipe.driver}' watches whole epochs: use secateur.train(task, ...)")
        if recipe.solver != "rank" or recipe.recovery != "none":
            raise RecipeError(
                f"attach() masks and the training heals: solver '{recipe.solver}' and recovery '{recipe.recovery}' "
                "are for prune()"
            )
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 0:
            raise RecipeError(f"steps is how often the optimizer will step, not {self.steps!r}")
        wanted = self._wanted(True)
        if "momentum" in wanted:
            check_momentum(optimizer, f"method '{recipe.method}'")
        if recipe.driver == "once":
            if only := sorted(wanted & TRAINING):
                raise RecipeError(
                    f"criterion '{recipe.criterion}' needs {only[0]}, which only steps of training show: choose a "
                    "driver that changes masks in steps, such as renew"
                )
            return
        if self.steps == 0:
            raise RecipeError(f"method '{recipe.method}' spreads its work over the run: say how long it is, steps=")
        missing = recipe.needs() - {"gradient"} - TRAINING  # which the run shows by itself
        if missing:
            raise RecipeError(
                f"criterion '{recipe.criterion}' needs {sorted(missing)[0]}, which a training run does not show: "
                "choose magnitude, saliency, gradient or movement"
            )

    def _wanted(self, exchange: bool) -> set[str]:
        """Facts that criteria ask for while the model trains; those that grow among them."""
        named = (self._knobs.get("grow"), self._knobs.get("spread")) if exchange else ()
        needs = {f for n in named if n not in (None, "none", "count") for f in get("criterion", str(n)).needs}
        return needs | set(self.recipe.needs())

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
        if self._learning is not None:
            asked = self._asked(self.at)
            self._learning.step(self.at, None if asked is None else asked.progress)
            if self._decided:
                return
        self._holding.lift()
        self._history.gather(before=False)
        changed = False if self._holding.first else self._turn(self.at)
        if self.at == self._settles and self.at < self.steps:
            self._settle()
        self._holding.hold(self._masks.dead, changed)

    def _before(self) -> None:
        """The optimizer is about to step: its gradients are there, and dense weights are in place."""
        if self._done:
            return
        self._history.gather(before=True)
        if self._holding.first:
            self._turn(self.at + 1)
        self._holding.turn(self.layers, self._masks.dead, self._history, self._seed(self.at + 1))

    def _turn(self, step: int) -> bool:
        """Change the masks if that is due at this step and can be done; whether they have changed."""
        self._due = self._asked(step) or self._due
        if self._due is None or not self._ready(self._due):
            return False
        if not self._due.fresh and self._holding.weight == "zero":
            # The optimizer has just moved what is gone: what grows again begins at zero.
            self._holding.hold(self._masks.dead, False)
        self._change(self._due)
        self._due = None
        return True

    def _settle(self) -> None:
        """Masks that were soft change no more: they hold what is gone for the rest of the run."""
        self._masks.harden()
        self._holding.settle()
        self._changed()

    def _asked(self, step: int) -> Update | None:
        found: Update | None = self._driver({"step": step, "steps": self.steps}, **self._knobs)
        return found

    def _ready(self, update: Update) -> bool:
        """Whether the gradients that are looked at are finite: a scaler of mixed precision skips such a step too."""
        looks = self._wanted(update.swap > 0) & (EVERY_STEP | {"gradient"})
        return not looks or finite_gradients(self.layers)

    def _change(self, update: Update, criterion: str | None = None) -> None:
        grows = self._wanted(True) - self.recipe.needs() if update.swap > 0 else set()
        if self.at and "gradient" in (self.recipe.needs() if update.fresh else grows):
            self._ledger.peek()
        self._masks.choose(update, self._seed(self.at), criterion)
        self._changed()

    def _seed(self, step: int) -> int:
        return self.recipe.seed + 7919 * step

    def _changed(self) -> None:
        """Bring all processes together, and note how much is there and has been there."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for dead in self._masks.dead.values():
                sent = dead.to(torch.uint8)
                torch.distributed.broadcast(sent, src=0)
                dead.copy_(sent)
        self._holding.reach = getattr(self._masks, "reach", {})
        always = bool(self._wanted(True) & EVERY_STEP) or self._holding.backward == "dense"
        densities = {}
        for layer in self.layers:
            mask = self._masks.mask(layer)
            if self.recipe.driver != "once":
                self._ever[layer.name] = self._ever[layer.name] | mask if layer.name in self._ever else mask
            weight = 1.0 if self._holding.weight == "free" else float(mask.sum()) / mask.numel()
            reach = self._holding.reach.get(layer.name)
            gradient = 1.0 if always else weight if reach is None else float(reach.sum()) / reach.numel()
            densities[layer.name] = (weight, gradient)
        self._ledger.enter(self.at, densities)

    def penalty(self) -> Tensor:
        """What the method adds to the loss; zero for methods that only mask."""
        if self._learning is not None and (found := self._learning.penalty()) is not None:
            return found
        return torch.zeros((), device=next(self.model.parameters()).device)

    @property
    def sparsity(self) -> float:
        """Fraction of the weights of the pruned layers that is gone; with gates, that is expected to go."""
        if self._learning is not None and self._learning.gated:
            return 1.0 - self._learning.density
        kept = sum(int(self._masks.mask(x).sum()) for x in self.layers)
        return 1.0 - kept / sum(x.numel for x in self.layers)

    @property
    def explored(self) -> float:
        """Fraction of the weights of the pruned layers that have been there at some time: ITOP's R_s."""
        seen = self._ever or {x.name: self._masks.mask(x) for x in self.layers}
        return sum(int(x.sum()) for x in seen.values()) / sum(x.numel() for x in seen.values())

    @property
    def masks(self) -> Masks:
        """The masks ``(o, i)`` as they are now; True keeps."""
        if self._learning is not None and self._learning.gated:
            return Masks(self._learning.masks())
        return Masks({x.name: self._masks.mask(x) for x in self.layers})

    def flops(self, *args: Any, **kwargs: Any) -> TrainingFlops:
        """What the steps so far have cost, on batches like these inputs of the model.

        Layers whose weights are read in no module of their own count as dense.
        """
        return self._ledger.flops(self.at, self.model, args, kwargs)

    def finish(self) -> Masks:
        """End the session: the model is a plain one with zeros in it; returns the masks."""
        if not self._done and self._learning is not None and (made := self._learning.finish()):
            self._masks.take(made)
            self._changed()
        if not self._done:
            self._holding.lift()
            if self._holding.finish is not None:
                self._masks.choose(Update(fresh=True), self._seed(self.at), self._holding.finish)
                self._changed()
            self._masks.harden()
            self._holding.hold(self._masks.dead, True)
            self._holding.close()
            self._done = True
        return self.masks

    def plan(self) -> StructuredPlan:
        """What the units that went leave, with the proof that the masked model and the smaller one are the same.

        Raises:
            RecipeError: the method masks weights, and no units of the whole model.
        """
        by = self._masks if isinstance(self._masks, Units) else self._learning
        if by is None or not by.cuts:
            way = "finish, then secateur.plan(model, ...)" if self.recipe.learns else "nothing is smaller"
            raise RecipeError(f"method '{self.recipe.method}' masks by '{self.recipe.granularity}': {way}")
        self.finish()
        return by.plan()

    def shrink(self) -> nn.Module:
        """Finish, and return a really smaller copy of the model, proven to compute the same.

        Raises:
            ModelError: the smaller model is not proven.
        """
        return self.plan().shrink()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is None:
            self.finish()

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs beside the model and the optimizer: tensors, numbers and text."""
        due = None if self._due is None else dataclasses.asdict(self._due)
        return {
            "at": self.at, "steps": self.steps, "digest": self.recipe.digest, "due": due, **self._masks.state_dict(),
            "hold": self._holding.state_dict(), "history": self._history.state_dict(),
            "learning": None if self._learning is None else self._learning.state_dict(),
            "ever": {n: x.cpu().clone() for n, x in self._ever.items()}, "cost": self._ledger.state_dict(),
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken; the model and the optimizer are loaded by the caller, before.

        Raises:
            ModelError: it is of another recipe, run or model.
        """
        if state["digest"] != self.recipe.digest or state["steps"] != self.steps:
            raise ModelError("this checkpoint is of another recipe, or of a run of another length")
        self._masks.load_state_dict(state)
        self.at = int(state["at"])
        self._due = None if state["due"] is None else Update(**state["due"])
        if self._learning is not None:
            self._learning.load_state_dict(state["learning"], self.at)
        self._holding.load_state_dict(state["hold"])
        self._history.load_state_dict(state["history"])
        devices = {x.name: x.stored.device for x in self.layers}
        self._ever = {n: x.to(devices[n]) for n, x in state["ever"].items()}
        self._ledger.load_state_dict(state["cost"])
        if self._settles is not None and self._settles <= self.at < self.steps:
            self._holding.settle()
        self._holding.lift()
        self._holding.hold(self._masks.dead, self._holding.weight != "free")
