"""What a recovery that trains is given: a pruned model, its masks, the task, and the dense run behind it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RecipeError
from ..formats import OnGrid
from ..layers import find_layers
from ..masks import Masks
from ..measure.flops import effective_flops
from ..recover.stored import Stored
from ..structured.plan import inputs
from ..tasks import Fitted, Live, Task, fit
from ..tasks.checkpoint import own_generators, seed_generators
from ..tasks.loop import Leg
from .session import attach

#: Why weights cannot be rewound.
NO_WAY_BACK = (
    "recovery 'rewind' goes back in the dense run, and there is none here for this model: train the task from its "
    "start, and prune single weights (granularity element, row, N:M or block), or set the knob weights to false"
)
#: Makes a leg of the run: ``leg(epochs, **fields)``.
MakeLeg = Callable[..., Leg]


@dataclass(eq=False)
class Healing:
    """See `recover.training.Training`, whose promises it keeps.

    Attributes:
        model: as it is healed; a smaller one has no masks.
        kept: masks of its layers.
        dense: makes the dense model, trained; None where there is none.
        early: weights of the dense run at the point that the recovery goes back to.
        leg: makes the next leg.
        rows: what was seen on the way, a row for each epoch.
        stored: what a teacher said, where that was kept.
        grids: what weights lie on, and stay on, where they were quantized.
        earlier: seconds of training that was done before an interruption.
    """

    task: Task
    model: nn.Module
    kept: Mapping[str, Tensor]
    epochs: float
    seed: int
    leg: MakeLeg
    dense: Callable[[], nn.Module] | None = None
    early: Callable[[float], Mapping[str, Tensor]] | None = None
    progress: Callable[[int, int], None] = lambda done, of: None
    rows: list[dict[str, Any]] = field(default_factory=list)
    untrained: float | None = None
    stored: Stored | None = None
    grids: Mapping[str, OnGrid] = field(default_factory=dict)
    earlier: float = 0.0

    @property
    def loss(self) -> Callable[[nn.Module, Any], Tensor]:
        return self.task.loss

    def masks(self) -> dict[str, Tensor]:
        return dict(self.kept)

    def fit(
        self, length: float, *, begin: float = 0.0, rate: float = 1.0,
        loss: Callable[[nn.Module, Any], Tensor] | None = None, masks: bool = True, hold: str = "zero", **knobs: Any,
    ) -> None:  # fmt: skip
        """Train with the masks held; without ``masks`` whoever asks keeps the zeros.

        A hold that rounds works on all layers where there are no masks, and on those that have grids.
        """
        self.untrained = self.task.measure(self.model)
        kept = self.kept
        if hold != "zero" and not kept:
            kept = {x.name: torch.ones(x.shape, dtype=torch.bool) for x in find_layers(self.model)[0]}
        if hold != "zero" and self.grids:
            layers = {x.name: x for x in find_layers(self.model, only=("*",))[0]}
            whole = {n: torch.ones(layers[n].shape, dtype=torch.bool) for n in self.grids if n in layers}
            kept = {**whole, **kept}

        def held(optimizer: Any, steps: int) -> Live:
            axes = {"hold": hold, "knobs": {"hold": knobs}} if knobs else {"hold": hold}
            return attach(self.model, optimizer=optimizer, masks=kept, seed=self.seed, grids=self.grids or None, **axes)

        leg = self.leg(length * self.epochs, begin=begin, rate=rate, loss=loss)
        begun = time.perf_counter()
        made: Fitted = fit(self.task, self.model, leg, attach=held if masks and kept else None, progress=self.progress)
        self.earlier += max(0.0, made.seconds - (time.perf_counter() - begun))
        self.rows += made.rows

    def rewind(self, to: float) -> None:
        if self.early is None:
            raise RecipeError(NO_WAY_BACK)
        self.model.load_state_dict(self.early(to))
        Masks(self.kept).apply(self.model)

    def fresh(self, seed: int) -> None:
        """New weights: the task's own where the model has its sizes, else what each module draws for itself."""
        new = fresh_model(self.task, seed).state_dict()
        old = self.model.state_dict()
        if all(new[k].shape == v.shape for k, v in old.items() if k in new) and new.keys() == old.keys():
            self.model.load_state_dict(new)
        else:
            with own_generators():
                seed_generators(seed)
                _redrawn(self.model)
        Masks(self.kept).apply(self.model)

    def teacher(self) -> nn.Module:
        if self.dense is None:
            raise RecipeError("recovery 'distill' learns from the dense model, and this run has none: see when='after'")
        return self.dense().eval().requires_grad_(False)

    def cost(self) -> float:
        args, kwargs = inputs(self.task.example_input())
        whole = effective_flops(fresh_model(self.task, self.seed), *args, **kwargs).total
        return effective_flops(self.model, *args, **kwargs).total / max(whole, 1)


def fresh_model(task: Task, seed: int) -> nn.Module:
    """The task's network with the weights of that seed."""
    with own_generators():
        seed_generators(seed)
        return task.model(seed)


def _redrawn(model: nn.Module) -> None:
    """Every module draws its own weights again."""
    owners = [m for m in model.modules() if list(m.parameters(recurse=False))]
    silent = [type(m).__name__ for m in owners if not callable(getattr(m, "reset_parameters", None))]
    if silent:
        raise RecipeError(
            f"recovery 'scratch': {silent[0]} has no reset_parameters(), so the smaller model cannot be drawn anew"
        )
    for module in owners:
        module.reset_parameters()  # type: ignore[operator]


def fitting(masks: Mapping[str, Tensor], model: nn.Module) -> tuple[dict[str, Tensor], list[str]]:
    """The masks whose layers the model has in that shape, and the names of those it has not.

    Raises:
        RecipeError: it has none of them.
    """
    shapes = {x.name: x.shape for x in find_layers(model, only=("*",))[0]}
    found = {n: m for n, m in masks.items() if shapes.get(n) == tuple(m.shape)}
    if not found:
        raise RecipeError("no layer of this model has the name and the shape of a layer under these masks")
    return found, [n for n in masks if n not in found]
