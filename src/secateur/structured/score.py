"""What a unit is worth: a criterion's scores of single weights, summed over everything that would go."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..errors import NumericalError, RecipeError
from ..graph import Dependencies
from ..layers import find_layers
from ..recipe import Recipe
from ..solve import Facts

Scores = NDArray[np.float64]


def weight_scores(model: nn.Module, recipe: Recipe, evidence: Mapping[str, Any]) -> dict[str, Tensor]:
    """The criterion's score of every weight of every layer, by parameter name, in the stored shape."""
    layers, _ = find_layers(model, (), ())
    names = {id(p): n for n, p in model.named_parameters(remove_duplicate=False)}
    found: dict[str, Tensor] = {}
    for layer in layers:
        whole = getattr(layer.module, layer.parameter)
        name = names[id(whole)]
        score = Facts(layer, recipe, evidence.get(layer.name))["score"]
        stored = layer.from_oi(score).detach().double().cpu()
        if layer.index is None:
            found[name] = stored
        else:
            found.setdefault(name, torch.zeros(whole.shape, dtype=torch.float64))[layer.index] = stored
    return found


def unit_scores(found: Dependencies, scores: Mapping[str, Tensor], where: str = "coupled") -> list[Scores]:
    """A score for every unit of every family.

    Args:
        where: ``coupled`` sums over every weight that would go (DepGraph, arXiv 2301.12900, equation 4);
            ``output`` over the weights that compute the unit alone (Li et al., arXiv 1608.08710), where any do.
    """
    if where not in ("coupled", "output"):
        raise RecipeError(f"scores are summed over 'coupled' or 'output' weights, not '{where}'")
    lines: dict[int, Scores] = {}
    for i, slot in enumerate(found.slots):
        score = next((scores[n] for n in slot.names if n in scores), None)
        if score is None:
            continue
        line = score.sum([d for d in range(score.dim()) if d != slot.axis]) if score.dim() > 1 else score
        lines[i] = line.numpy()
    result = []
    for family in found.families:
        total = np.zeros(len(family.units))
        used = [i for i in family.slots if i in lines]
        if where == "output":  # some units are computed by nothing, such as features of a constant
            used = [i for i in used if found.slots[i].axis == 0] or used
        for k, unit in enumerate(family.units):
            total[k] = sum(float(lines[i][unit.places[i]].sum()) for i in used)
        if not np.isfinite(total).all():
            raise NumericalError(f"the scores of {family.name} are not finite")
        result.append(total)
    return result
