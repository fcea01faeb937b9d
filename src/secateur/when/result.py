"""What `train` returns, and writes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..disk import beside
from ..errors import ModelError, RecipeError
from ..layers import find_layers
from ..masks import Masks
from ..recipe import Recipe
from ..report import write_run
from ..solve import LayerRecord
from ..store import save_module
from ..stream.storage import Smallest, layout, seal_model
from ..structured import save as save_smaller


@dataclass(eq=False)
class Trained:
    """A trained model with the record of what was done. Prints as a small table.

    Attributes:
        model: a plain module; a smaller one where the recipe is over coupled units.
        masks: of its pruned layers; empty for a dense or a smaller model.
        run: the content of ``run.json``: curves by epoch, rounds, metrics before and after.
    """

    model: nn.Module
    recipe: Recipe
    masks: Masks
    run: dict[str, Any] = field(repr=False)

    @property
    def sparsity(self) -> float:
        """Fraction of the weights of the pruned layers that is zero."""
        return float(self.run["sparsity"]["pruned_layers"])

    @property
    def metric(self) -> float:
        """The task's metric, on the test data unless the run was scored on the validation data."""
        return float(self.run["after"]["metric"]["value"])

    def save(self, out: str | Path, storage: str | None = None) -> Path:
        """Write the model, its masks where it has some, ``recipe.yaml``, ``run.json`` and ``report.html``.

        Args:
            storage: ``stock``, or ``smallest``: each matrix in the fewest bytes, for `load` alone, without masks.

        Raises:
            OutputError: the directory exists and is not empty.
        """
        form = layout(self.recipe, storage)
        small = isinstance(form, Smallest)
        if small and hasattr(self.model, "secateur_surgery"):
            raise RecipeError("a smaller model has its own format: leave storage out")
        with beside(out) as part:
            if hasattr(self.model, "secateur_surgery"):
                save_smaller(self.model, part)
            else:
                save_module(self.model, part)
            if small:
                seal_model(part, {}, self.model, "")
            write_run(part, self.recipe, Masks() if small else self.masks, self.run)
        return Path(out)

    def __str__(self) -> str:
        before, after = self.run["before"] or {}, self.run["after"]
        name = after["metric"]["name"]
        lines = [f"{self.recipe.method} on task {self.run['task']['name']}"]
        dense = before.get("metric", {}).get("value")
        lines.append(
            f"{name + ', ' + self.run['score']:24}"
            + (f"{dense:>12.4f} dense" if dense is not None else "")
            + f"{self.metric:>12.4f}"
        )
        lines.append(f"{'sparsity':24}{self.sparsity:>12.4f} of the pruned layers")
        lines.append(f"{'parameters':24}{after['nonzero']:>12,} of {(before or after)['parameters']:,} are not zero")
        return "\n".join(lines)


def paced(recipe: Recipe, steps: int) -> Recipe:
    """The recipe whose masks may change in every fortieth of a run of so many steps, where it does not say how often.

    >>> [paced(Recipe.of("gmp"), steps).knobs_of("driver")["every"] for steps in (200, 9000)]
    [5, 100]
    """
    every = recipe.knobs_of("driver").get("every")
    if every is None or "every" in recipe.knobs.get("driver", {}):
        return recipe
    return recipe.override(knobs={"driver": {"every": min(every, max(1, steps // 40))}})


def layer_record(name: str, shape: tuple[int, int], mask: Tensor) -> LayerRecord:
    """What a run says of a masked layer."""
    kept = int(mask.count_nonzero())
    return LayerRecord(name, None, shape, mask.numel(), kept, 1 - kept / mask.numel(), None, 0.0)


def check_zeros(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """What was removed is zero at the end, whatever trained it."""
    layers = {x.name: x for x in find_layers(model, only=("*",))[0]}
    for name, mask in masks.items():
        if bool((layers[name].weight() != 0)[~mask.to(layers[name].stored.device)].any()):
            raise ModelError(f"{name} has weights where its mask has none: this is a defect of the recovery")


def digest_of(state: Mapping[str, Tensor] | None) -> str:
    """What tells given masks, or a given model, from others."""
    total = hashlib.sha256()
    for name in sorted(state or {}):
        tensor = (state or {})[name].detach().cpu().contiguous()
        total.update(name.encode() + tensor.flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:16] if state else ""
