"""What a unit is worth: a criterion's scores of single weights, summed over everything that would go."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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


class Scored:
    """Scores along the axes of a stored parameter, and which of its axes the layer's outputs lie on.

    Args:
        output: that axis.
        score: of each weight, in the parameter's shape; or None.
        lines: axis -> ``(batches, n)``, where positions of an axis are scored, not weights.
    """

    def __init__(self, output: int, score: Tensor | None = None, lines: Mapping[int, Tensor] | None = None) -> None:
        self.output, self.score, self._lines = output, score, lines or {}

    def weights(self) -> Tensor:
        """The score of each weight.

        Raises:
            RecipeError: the criterion scores positions only.
        """
        if self.score is None:
            raise RecipeError("this criterion ranks units, not weights")
        return self.score

    def line(self, axis: int) -> Scores | None:
        """``(batches, n)``, of one batch where weights are scored; None where this axis has no scores."""
        if self.score is None:
            return self._lines[axis].numpy() if axis in self._lines else None
        rest = [d for d in range(self.score.dim()) if d != axis]
        found: Scores = (self.score.sum(rest) if rest else self.score)[None].numpy()
        return found


def weight_scores(model: nn.Module, recipe: Recipe, evidence: Mapping[str, Any]) -> dict[str, Scored]:
    """The criterion's scores by parameter name: of every weight, or of what else the criterion looks at."""
    part = get("criterion", recipe.criterion or "")
    if part.facts.get("of") == "norm":
        return _norm_scores(model, part, recipe)
    layers, _ = find_layers(model, (), ())
    names = {id(p): n for n, p in model.named_parameters(remove_duplicate=False)}
    found: dict[str, Scored] = {}
    for layer in layers:
        whole = getattr(layer.module, layer.parameter)
        name = names[id(whole)]
        output = int(layer.transposed or layer.kind == "conv-transpose")
        if part.facts.get("of") == "unit":
            if layer.index is None:
                found[name] = Scored(output, lines=evidence[layer.name]["unit_change"])
            continue
        if part.facts.get("of") == "map":
            if layer.name in evidence:
                line = part(evidence[layer.name], **recipe.knobs_of("criterion")).double().cpu()
                found[name] = Scored(output, lines={1 - output: line[None]})
            continue
        score = Facts(layer, recipe, evidence.get(layer.name))["score"]
        stored = layer.from_oi(score).detach().double().cpu()
        if layer.index is None:
            found[name] = Scored(output, stored)
        else:
            stacked = found.setdefault(name, Scored(output + 1, torch.zeros(whole.shape, dtype=torch.float64)))
            stacked.weights()[layer.index] = stored
    return found


def _standardized(line: Scores, positions: Any = slice(None)) -> Scores:
    here = line[..., positions]
    result: Scores = (line - here.mean()) / (here.std() or 1.0)
    return result


def _norm_scores(model: nn.Module, part: Part, recipe: Recipe) -> dict[str, Scored]:
    """The criterion's scores of the scales of normalizations."""
    return {
        f"{name}.weight" if name else "weight": Scored(
            0, part({"scale": module.weight.detach()}, **recipe.knobs_of("criterion")).double().cpu()
        )
        for name, module in model.named_modules()
        if type(module).__name__.lower().endswith("norm") or isinstance(module, nn.modules.batchnorm._BatchNorm)
        if isinstance(getattr(module, "weight", None), Tensor) and module.weight.dim() == 1
    }


def unit_scores(
    found: Dependencies,
    scores: Mapping[str, Scored],
    where: str = "coupled",
    standardized: bool = False,
    combine: Callable[[Scores], Scores] | None = None,
) -> list[Scores]:
    """A score for every unit of every family.

    Args:
        where: ``coupled`` sums over every weight that would go (DepGraph, arXiv 2301.12900, equation 4);
            ``output`` over the weights that compute the unit alone (Li et al., arXiv 1608.08710), ``input`` over
            those that read it (FLAP, arXiv 2312.11983); over all, where there are none of that side.
        standardized: bring the positions of each family to mean 0 and variance 1 first, and take a unit's mean, as
            FLAP's code does: a head is then as far from 0 as its positions are together, not as one of few heads.
        combine: what a unit is worth from its sums of each batch, ``(batches, units) -> (units,)``, where the
            criterion looks at units; they are standardized afterwards then.

    Returns:
        ``(units,)`` for each family; empty where the criterion has no score for any of its tensors.
    """
    if where not in ("coupled", "output", "input"):
        raise RecipeError(f"scores are summed over 'coupled', 'output' or 'input' weights, not '{where}'")
    lines: dict[int, Scores] = {}
    sides: dict[int, str] = {}
    for i, slot in enumerate(found.slots):
        scored = next((scores[n] for n in slot.names if n in scores), None)
        line = scored.line(slot.axis) if scored is not None else None
        if scored is not None and line is not None:
            sides[i] = "output" if slot.axis == scored.output else "input"
            lines[i] = line
    early = standardized and combine is None
    result = []
    for family in found.families:
        used = [i for i in family.slots if i in lines]
        if where != "coupled":  # some units are computed by nothing, such as features of a constant
            used = [i for i in used if sides[i] == where] or used
        if not used:
            result.append(np.zeros(0))
            continue
        mine = {i: lines[i] for i in used}
        places = {i: family.places(i) for i in used}
        if early:
            mine = {i: _standardized(lines[i], places[i].reshape(-1)) for i in used}
        sums = sum(np.take(mine[i], places[i], axis=1).sum(2) for i in used)
        if early:
            sums = sums / sum(places[i].shape[1] for i in used)
        total = sums[0] if combine is None else combine(sums)
        if standardized and not early:
            total = _standardized(total)
        if not np.isfinite(total).all():
            raise NumericalError(f"the scores of {family.name} are not finite")
        result.append(total)
    return result


def combined(recipe: Recipe) -> Callable[[Scores], Scores] | None:
    """How a criterion that looks at whole units makes one score of what is measured of each; None for others."""
    part = get("criterion", recipe.criterion or "")
    if part.facts.get("of") != "unit":
        return None

    def score(sums: Scores) -> Scores:
        found: Scores = part({"unit_change": torch.from_numpy(sums)}, **recipe.knobs_of("criterion")).double().numpy()
        return found

    return score
