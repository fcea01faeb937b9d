"""From a recipe and a layer's evidence to a pruned layer: the step that every driver shares."""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import granularity as granularity_module
from .allocation import LayerFacts, Sketch
from .errors import NumericalError, RecipeError
from .formats import OnGrid
from .granularity import Granularity
from .layers import Layer
from .recipe import GRADIENTS, SHAPES, Recipe
from .registry import get
from .select import is_finite, keep_count
from .solvers import Curvature, Solved, output_error

_SAMPLE_ROWS = 512  # rows of input on which the output error is measured when no Gram matrix is at hand


@dataclass(frozen=True)
class LayerRecord:
    """What happened to one layer.

    ``error`` is the relative output error ``||(W - W') X||^2 / ||W X||^2`` on the calibration inputs.
    """

    name: str
    block: int | None
    shape: tuple[int, int]
    parameters: int
    kept: int
    sparsity: float
    error: float | None
    seconds: float
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "shape": list(self.shape), "notes": list(self.notes)}


class Facts(Mapping[str, Any]):
    """What parts may ask for about one layer; evaluated when asked, and once."""

    def __init__(
        self,
        layer: Layer,
        recipe: Recipe,
        evidence: Mapping[str, Any] | None = None,
        curvature: Curvature | None = None,
        keep: float | None = None,
        mask: Tensor | None = None,
    ) -> None:
        self._layer, self._recipe, self._evidence = layer, recipe, evidence
        self._mask = mask
        self._made: dict[str, Any] = {}
        if curvature is not None:
            self._made["curvature"] = curvature
        if keep is not None:
            self._made["keep"] = keep

    def __getitem__(self, name: str) -> Any:
        if name not in self._made:
            self._made[name] = self._make(name)
        return self._made[name]

    def _make(self, name: str) -> Any:
        if name == "weight":
            weight = self._layer.weight()
            return weight.float() if "gram" in self._recipe.needs() else weight  # the dtype of the statistics
        if name == "granularity":
            return granularity_module.parse(self._recipe.granularity)
        if name == "generator":
            return layer_generator(self._recipe.seed, self._layer.name, self._layer.stored.device)
        if name == "score":
            return self._score()
        if name == "mask":
            everything = torch.ones(self._layer.shape, dtype=torch.bool, device=self._layer.stored.device)
            return everything if self._mask is None else self._mask
        if name == "curvature":
            return Curvature(self["gram"], self._layer.name)
        if self._evidence is None:
            raise RecipeError(f"{self._layer.name}: {name} is measured on data: pass --data")
        return self._evidence[name]

    def _score(self) -> Tensor:
        if self._recipe.criterion is None:
            raise RecipeError("this recipe has no criterion")
        part = get("criterion", self._recipe.criterion)
        score: Tensor = part(self, **self._recipe.knobs_of("criterion"))
        if bool(torch.isnan(score.sum())) and bool(torch.isnan(score).any()):
            raise NumericalError(f"criterion '{part.name}' gives NaN in {self._layer.name}")
        if self._recipe.control == "invert":
            score = -score
        # What an earlier round removed stays removed.
        return score if self._mask is None else score.masked_fill(~self._mask, -torch.inf)

    def __iter__(self) -> Iterator[str]:
        return iter(self._made)

    def __len__(self) -> int:
        return len(self._made)


def layer_generator(seed: int, name: str, device: torch.device) -> torch.Generator:
    """A generator of its own for each layer, so that the order of the layers does not matter."""
    generator = torch.Generator(device=device)
    generator.manual_seed(zlib.crc32(f"{seed} {name}".encode()))  # a CPU generator reads only 32 bits
    return generator


def solve_layer(
    layer: Layer,
    recipe: Recipe,
    keep: float,
    *,
    evidence: Mapping[str, Any] | None = None,
    curvature: Curvature | None = None,
    sample: Tensor | None = None,
    block: int | None = None,
    mask: Tensor | None = None,
    grids: dict[str, OnGrid] | None = None,
) -> tuple[LayerRecord, Tensor]:
    """Prune one layer in place.

    Args:
        layer: what to prune.
        keep: the fraction that stays.
        evidence: facts from data; a layer whose inputs were needed and never seen is left dense.
        curvature: shared by the layers that read the same input.
        sample: rows of input ``(n, i)`` for the output error.
        mask: what an earlier round kept.
        grids: where the grid of a quantized layer is put, by its name.

    Returns:
        The record and the mask ``(o, i)``.
    """
    start = time.perf_counter()
    pattern = granularity_module.parse(recipe.granularity)
    pattern.check(layer.shape, layer.name)
    if _unseen(evidence, recipe):
        note = "no calibration token reached it: left dense (give more data)"
        everything = torch.ones(layer.shape, dtype=torch.bool, device=layer.stored.device) if mask is None else mask
        return _record(layer, block, everything, None, start, (note,)), everything
    if mask is not None:
        _check_left(pattern, layer, keep, mask, recipe.solver)
    facts = Facts(layer, recipe, evidence, curvature, keep, mask)
    before = facts["weight"]
    solved: Solved = get("solver", recipe.solver)(facts, **recipe.knobs_of("solver"))
    expected = pattern.kept(layer.shape, keep)
    kept = int(torch.count_nonzero(solved.mask))
    if kept != expected:
        raise NumericalError(f"{layer.name}: solver '{recipe.solver}' kept {kept} weights where {expected} were due")
    if mask is not None and bool((solved.mask & ~mask).any()):
        raise NumericalError(f"{layer.name}: solver '{recipe.solver}' brought weights back that were gone")
    if not is_finite(solved.weight):
        raise NumericalError(f"{layer.name}: solver '{recipe.solver}' gave NaN or infinite weights")
    if layer.stored.dtype == torch.float64 and before.dtype == torch.float32:
        exact = layer.weight()  # what did not move keeps all its digits
        solved = replace(solved, weight=torch.where(solved.weight == before, exact, solved.weight.double()))
    error = None
    if curvature is not None:
        error = output_error(before, solved.weight, curvature.gram)
    elif sample is not None:
        error = _sampled_error(before, solved.weight, sample)
    layer.write(solved.weight)
    if grids is not None and solved.grid is not None:
        grids[layer.name] = solved.grid
    return _record(layer, block, solved.mask, error, start, solved.notes), solved.mask


def _check_left(pattern: Granularity, layer: Layer, keep: float, mask: Tensor, solver: str) -> None:
    """What an earlier round left must be enough, and the solver must know of it."""
    part = get("solver", solver)
    if part.facts.get("chooses") == "mask" and "mask" not in part.needs and not bool(mask.all()):
        raise RecipeError(
            f"solver '{solver}' chooses masks by itself and knows of no earlier ones: choose sparsegpt, or rank"
        )
    units, cut = pattern.pool_shape(*layer.shape)[1], pattern.split(mask)
    if bool((cut.any(-1) & ~cut.all(-1)).any()):
        raise RecipeError(
            f"{layer.name}: earlier steps took parts of the units of '{pattern.name}': take these units first"
        )
    left = int(cut.any(-1).sum(-1).min())
    if left < (due := keep_count(keep, units)):
        raise RecipeError(
            f"{layer.name}: earlier steps left {left} of {units} in a group where '{pattern.name}' keeps {due}: ask "
            "for more to go, or choose granularity element"
        )


def _unseen(evidence: Any, recipe: Recipe) -> bool:
    inputs = recipe.needs() - GRADIENTS - SHAPES - {"inputs"}
    return evidence is not None and bool(inputs) and evidence["tokens"] == 0


def _sampled_error(before: Tensor, after: Tensor, sample: Tensor) -> float:
    x = sample.to(before.dtype)
    whole = float((x @ before.t()).square().sum())
    return float((x @ (before - after).t()).square().sum()) / whole if whole > 0 else 0.0


def sample_rows(x_ni: Tensor, parts: int = 1) -> Tensor:
    """Evenly spaced rows for the output error, out of one of ``parts`` parts of the input."""
    rows = max(1, _SAMPLE_ROWS // parts)
    stride = max(1, x_ni.shape[0] // rows)
    return x_ni[::stride][:rows]


def _record(
    layer: Layer, block: int | None, mask: Tensor, error: float | None, start: float, notes: tuple[str, ...]
) -> LayerRecord:
    kept = int(torch.count_nonzero(mask))
    return LayerRecord(
        layer.name,
        block,
        layer.shape,
        layer.numel,
        kept,
        1.0 - kept / layer.numel,
        error,
        time.perf_counter() - start,
        notes,
    )


def layer_facts(layer: Layer, block: str | None = None, sketch: Sketch | None = None) -> LayerFacts:
    """A layer as an allocation sees it."""
    stored = layer.stored
    dims = tuple(stored.shape) if layer.kind in ("conv", "conv-transpose") else layer.shape
    return LayerFacts(layer.shape, layer.numel, layer.kind, block, sketch, dims)


def sketch_layer(
    layer: Layer, recipe: Recipe, evidence: Mapping[str, Any] | None, exact: bool, mask: Tensor | None = None
) -> Sketch | None:
    """What the recipe's allocation wants to know of a layer, or None; ``mask`` is what an earlier round kept."""
    measure = get("allocation", recipe.allocation).facts.get("measure")
    if measure is None:
        return None
    facts = Facts(layer, recipe, evidence, mask=mask)
    names = measure.__code__.co_varnames[: measure.__code__.co_argcount]
    return Sketch(measure(*[facts[n] for n in names]), exact)


def allocate(
    recipe: Recipe,
    layers: Mapping[str, LayerFacts],
    sparsity: float | None = None,
    before: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """The fraction that each layer keeps, as its granularity can hold it.

    With N:M the keeps are rounded to multiples of 1/M so that the total stays what was asked for.
    ``before`` is what an earlier round left: no layer keeps more than that.
    """
    sparsity = recipe.sparsity if sparsity is None else sparsity
    keeps: dict[str, float] = get("allocation", recipe.allocation).function(
        layers, sparsity=sparsity, **{k: v for k, v in recipe.knobs_of("allocation").items() if k != "sparsity"}
    )
    if before:
        keeps = _within(keeps, before, layers)
    pattern = granularity_module.parse(recipe.granularity)
    return keeps if pattern.keep is None else _whole_units(keeps, layers, pattern)


def held_by(layers: Sequence[Layer], masks: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """The masks of these layers, of those that earlier rounds left."""
    names = {x.name: x for x in layers}
    return {n: m.to(names[n].stored.device) for n, m in (masks or {}).items() if n in names}


def shares(masks: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, float]:
    """What each layer has left, where any was pruned before."""
    return {n: float(masks[n].double().mean()) if n in masks else 1.0 for n in names} if masks else {}


def _within(
    keeps: Mapping[str, float], before: Mapping[str, float], layers: Mapping[str, LayerFacts]
) -> dict[str, float]:
    """No layer above what it had; what that costs is shared out among the others, in proportion to their keeps."""
    found = dict(keeps)
    while over := {n for n, k in found.items() if k > before[n]}:
        excess = sum((found[n] - before[n]) * layers[n].numel for n in over)
        found.update({n: before[n] for n in over})
        room = {n: found[n] * layers[n].numel for n in found if found[n] < before[n]}
        if not room:
            break
        factor = 1 + excess / max(sum(room.values()), 1e-12)
        found.update({n: found[n] * factor for n in room})
    return found


def _whole_units(
    keeps: Mapping[str, float], layers: Mapping[str, LayerFacts], pattern: Granularity
) -> dict[str, float]:
    """Round each keep down to a multiple of 1/M, then up again where the remainders are largest."""
    m = pattern.run
    floors = {n: int(k * m + 1e-6) for n, k in keeps.items()}
    wanted = sum(keeps[n] * layers[n].numel for n in keeps)
    missing = wanted - sum(floors[n] / m * layers[n].numel for n in keeps)
    by_remainder: Sequence[str] = sorted(keeps, key=lambda n: floors[n] - keeps[n] * m)
    for name in by_remainder:
        step = layers[name].numel / m
        if floors[name] < m and missing >= step / 2:
            floors[name] += 1
            missing -= step
    return {n: f / m for n, f in floors.items()}
