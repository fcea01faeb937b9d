"""What a unit is worth: a criterion's scores of single weights, summed over everything that would go."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..errors import NumericalError, RecipeError
from ..graph import Dependencies
from ..layers import Layer, axis_sums, located
from ..recipe import Recipe
from ..registry import Part, get
from ..solve import Facts

Scores = NDArray[np.float64]

#: Facts of units that are one number for each, not one for each batch.
_SINGLE = ("unit_trace", "unit_square", "unit_size")


class Scored:
    """Scores along the axes of a stored parameter, and which of its axes the layer's outputs lie on.

    Args:
        output: that axis.
        score: of each weight, in the parameter's shape; or None.
        lines: axis -> ``(rows, n)``, where positions of an axis are scored, not weights.
        rows: fact -> how many of the rows, from the top, are its own, where a criterion of units names facts.
    """

    def __init__(
        self,
        output: int,
        score: Tensor | None = None,
        lines: Mapping[int, Tensor] | None = None,
        rows: Mapping[str, int] | None = None,
    ) -> None:
        self.output, self.score, self._lines, self.rows = output, score, lines or {}, rows or {}

    def weights(self) -> Tensor:
        """The score of each weight.

        Raises:
            RecipeError: the criterion scores positions only.
        """
        if self.score is None:
            raise RecipeError("this criterion ranks units, not weights")
        return self.score

    def line(self, axis: int) -> Scores | None:
        """``(rows, n)``, one row where weights are scored; None where this axis has no scores."""
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
    found: dict[str, Scored] = {}
    for layer, name, output in located(model):
        whole = getattr(layer.module, layer.parameter)
        if part.facts.get("of") == "unit":
            if layer.index is None:
                facts = {n: _lines(layer, n, evidence) for n in part.needs if n != "unit_flops"}
                lines = {a: torch.cat([x[a] for x in facts.values()]) for a in range(whole.dim())}
                found[name] = Scored(output, lines=lines, rows={n: len(x[0]) for n, x in facts.items()})
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
            stacked = found.setdefault(name, Scored(output, torch.zeros(whole.shape, dtype=torch.float64)))
            stacked.weights()[layer.index] = stored
    return found


def _lines(layer: Layer, fact: str, evidence: Mapping[str, Any]) -> Mapping[int, Tensor]:
    """A layer's part of a fact of units: stored axis -> ``(rows, n)``."""
    weight = layer.stored.detach().double().cpu()
    if fact == "unit_square":
        return {a: line[None] for a, line in axis_sums(weight.square()).items()}
    if fact == "unit_size":
        return {a: line[None] for a, line in axis_sums(torch.ones_like(weight)).items()}
    measured: Mapping[int, Tensor] = evidence[layer.name][fact]
    return measured


def counted(found: Dependencies, sides: Mapping[int, str], where: str) -> list[list[int]]:
    """The slots over which a unit's score is summed, of each family; ``sides`` says where those with a score lie."""
    result = []
    for family in found.families:
        used = [i for i in family.slots if i in sides]
        if where != "coupled":  # some units are computed by nothing, such as features of a constant
            used = [i for i in used if sides[i] == where] or used
        result.append(used)
    return result


class Probes:
    """Random signs of units, and what they turn: ``v`` is the sum over units of sign times the unit's weights.

    Times the sign of a unit, the product of its weights with ``H v`` has the expectation ``w^T H w`` over them. The
    same draws come each time they are asked for.

    Args:
        where: as for `unit_scores`: only what is counted is turned.
    """

    def __init__(self, found: Dependencies, model: nn.Module, where: str, seed: int = 0) -> None:
        self._found, self._seed = found, seed
        self._parameters = dict(model.named_parameters(remove_duplicate=False))
        outputs = {name: output for layer, name, output in located(model) if layer.index is None}
        sides = {}
        for i, slot in enumerate(found.slots):
            name = next((n for n in slot.names if n in outputs), None)
            if name is not None:
                sides[i] = "output" if slot.axis == outputs[name] else "input"
        self._used = counted(found, sides, where)

    def draws(self) -> Iterator[list[Scores]]:
        """Signs of the units of every family, draw after draw without end."""
        generator = np.random.default_rng(self._seed)
        while True:
            yield [generator.choice([-1.0, 1.0], len(f)) for f in self._found.families]

    def signs(self, family: int, count: int) -> Scores:
        """``(count, units)``: the first draws of one family."""
        return np.stack([draw[family] for draw in islice(self.draws(), count)])

    def flops(self, family: int) -> Tensor:
        """Operations of one forward pass that go with each unit of a family: of its first, since all are alike."""
        units = self._found.families[family].units
        saved = self._found.flops(frozenset()) - self._found.flops(units[0].gone)
        return torch.full((len(units),), max(saved, 1), dtype=torch.float64)

    def directions(self) -> Iterator[dict[int, Tensor]]:
        """``v`` of every draw, by the id of a parameter."""
        for draw in self.draws():
            lines = {i: np.zeros(len(self._found.slots[i].labels)) for used in self._used for i in used}
            for family, used, signs in zip(self._found.families, self._used, draw, strict=True):
                for i in used:
                    places = [u.places[i] for u in family.units]
                    lines[i][np.concatenate(places)] += np.repeat(signs, [len(p) for p in places])
            turned: dict[int, Tensor] = {}
            for i, line in lines.items():
                slot = self._found.slots[i]
                whole = self._parameters[slot.names[0]]
                shape = [-1 if a == slot.axis else 1 for a in range(whole.dim())]
                part = whole.detach() * torch.from_numpy(line).to(whole).reshape(shape)
                turned[id(whole)] = turned[id(whole)] + part if id(whole) in turned else part
            yield turned


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
    combine: Callable[[Scores, int], Scores] | None = None,
) -> list[Scores]:
    """A score for every unit of every family.

    Args:
        where: ``coupled`` sums over every weight that would go (DepGraph, arXiv 2301.12900, equation 4);
            ``output`` over the weights that compute the unit alone (Li et al., arXiv 1608.08710), ``input`` over
            those that read it (FLAP, arXiv 2312.11983); over all, where there are none of that side.
        standardized: bring the positions of each family to mean 0 and variance 1 first, and take a unit's mean, as
            FLAP's code does: a head is then as far from 0 as its positions are together, not as one of few heads.
        combine: what a unit is worth from its sums of each row, and the number of its family: ``(rows, units) ->
            (units,)``, where the criterion looks at units; they are standardized afterwards then.

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
    for number, (family, used) in enumerate(zip(found.families, counted(found, sides, where), strict=True)):
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
        total = sums[0] if combine is None else combine(sums, number)
        if standardized and not early:
            total = _standardized(total)
        if not np.isfinite(total).all():
            raise NumericalError(f"the scores of {family.name} are not finite")
        result.append(total)
    return result


class Combined:
    """How a criterion that looks at whole units makes one score of what is measured of each, family by family."""

    def __init__(self, part: Part, recipe: Recipe, rows: Mapping[str, int], probes: Probes) -> None:
        self._part, self._knobs, self._rows, self._probes = part, recipe.knobs_of("criterion"), rows, probes
        self._given: dict[int, dict[str, Tensor]] = {}

    def __call__(self, sums: Scores, family: int) -> Scores:
        given: dict[str, Tensor] = {}
        if "unit_flops" in self._part.needs:
            given["unit_flops"] = self._probes.flops(family)
        for fact, count in self._rows.items():
            mine, sums = sums[:count], sums[count:]
            if fact == "unit_curvature":
                mine = mine * self._probes.signs(family, count)
            given[fact] = torch.from_numpy(mine[0] if fact in _SINGLE else mine)
        self._given[family] = given
        found: Scores = self._part(given, **self._knobs).double().numpy()
        return found

    def chosen(self, family: int, score: Scores, count: int) -> Scores:
        """Scores of a family whose best ``count`` are those that go together best, where the criterion tells."""
        together = self._part.facts.get("together")
        if together is None:
            return score
        kept = together(self._given[family], count, **self._knobs)
        found: Scores = kept.double().numpy()
        return found


def combined(recipe: Recipe, scores: Mapping[str, Scored], probes: Probes) -> Combined | None:
    """For a criterion that looks at whole units; None for others."""
    part = get("criterion", recipe.criterion or "")
    if part.facts.get("of") != "unit":
        return None
    return Combined(part, recipe, next(iter(scores.values())).rows if scores else {}, probes)
