"""What a unit is worth: a criterion's scores of single weights, summed over everything that would go."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..errors import NumericalError, RecipeError
from ..graph import Dependencies
from ..layers import find_layers
from ..recipe import Recipe
from ..registry import Part, get
from ..solve import Facts

Scores = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Scored:
    """Scores of a stored parameter, in its shape, and which of its axes the layer's outputs lie on."""

    score: Tensor
    output: int


def weight_scores(model: nn.Module, recipe: Recipe, evidence: Mapping[str, Any]) -> dict[str, Scored]:
    """The criterion's score of every weight of every layer, by parameter name, in the stored shape."""
    part = get("criterion", recipe.criterion or "")
    if part.facts.get("of") == "norm":
        return _norm_scores(model, part, recipe)
    layers, _ = find_layers(model, (), ())
    names = {id(p): n for n, p in model.named_parameters(remove_duplicate=False)}
    found: dict[str, Scored] = {}
    for layer in layers:
        whole = getattr(layer.module, layer.parameter)
        name = names[id(whole)]
        score = Facts(layer, recipe, evidence.get(layer.name))["score"]
        stored = layer.from_oi(score).detach().double().cpu()
        output = int(layer.transposed or layer.kind == "conv-transpose")
        if layer.index is None:
            found[name] = Scored(stored, output)
        else:
            stacked = found.setdefault(name, Scored(torch.zeros(whole.shape, dtype=torch.float64), output + 1))
            stacked.score[layer.index] = stored
    return found


def _standardized(line: Scores, positions: Any) -> Scores:
    here = line[positions]
    result: Scores = (line - here.mean()) / (here.std() or 1.0)
    return result


def _norm_scores(model: nn.Module, part: Part, recipe: Recipe) -> dict[str, Scored]:
    """The criterion's scores of the scales of normalizations."""
    return {
        f"{name}.weight" if name else "weight": Scored(
            part({"scale": module.weight.detach()}, **recipe.knobs_of("criterion")).double().cpu(), 0
        )
        for name, module in model.named_modules()
        if type(module).__name__.lower().endswith("norm") or isinstance(module, nn.modules.batchnorm._BatchNorm)
        if isinstance(getattr(module, "weight", None), Tensor) and module.weight.dim() == 1
    }


def unit_scores(
    found: Dependencies, scores: Mapping[str, Scored], where: str = "coupled", standardized: bool = False
) -> list[Scores]:
    """A score for every unit of every family.

    Args:
        where: ``coupled`` sums over every weight that would go (DepGraph, arXiv 2301.12900, equation 4);
            ``output`` over the weights that compute the unit alone (Li et al., arXiv 1608.08710), ``input`` over
            those that read it (FLAP, arXiv 2312.11983); over all, where there are none of that side.
        standardized: bring the positions of each family to mean 0 and variance 1 first, and take a unit's mean, as
            FLAP's code does: a head is then as far from 0 as its positions are together, not as one of few heads.

    Returns:
        ``(units,)`` for each family; empty where the criterion has no score for any of its tensors.
    """
    if where not in ("coupled", "output", "input"):
        raise RecipeError(f"scores are summed over 'coupled', 'output' or 'input' weights, not '{where}'")
    lines: dict[int, Scores] = {}
    sides: dict[int, str] = {}
    for i, slot in enumerate(found.slots):
        scored = next((scores[n] for n in slot.names if n in scores), None)
        if scored is None:
            continue
        score = scored.score
        sides[i] = "output" if slot.axis == scored.output else "input"
        line = score.sum([d for d in range(score.dim()) if d != slot.axis]) if score.dim() > 1 else score
        lines[i] = line.numpy()
    result = []
    for family in found.families:
        total = np.zeros(len(family.units))
        used = [i for i in family.slots if i in lines]
        if where != "coupled":  # some units are computed by nothing, such as features of a constant
            used = [i for i in used if sides[i] == where] or used
        if not used:
            total = np.zeros(0)
        mine = {i: lines[i] for i in used}
        if standardized:
            mine = {i: _standardized(lines[i], np.concatenate([u.places[i] for u in family.units])) for i in used}
        for k, unit in enumerate(family.units if used else ()):
            total[k] = sum(float(mine[i][unit.places[i]].sum()) for i in used)
            if standardized:
                total[k] /= sum(len(unit.places[i]) for i in used)
        if not np.isfinite(total).all():
            raise NumericalError(f"the scores of {family.name} are not finite")
        result.append(total)
    return result
