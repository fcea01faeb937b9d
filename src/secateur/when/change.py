"""How masks change: functions from what a layer is worth and what it had to what it keeps, by exact counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..drivers import Update
from ..errors import NumericalError, RecipeError
from ..granularity import Granularity
from ..layers import Layer
from ..recipe import Recipe
from ..select import keep_count, select
from ..solve import Facts


@dataclass
class Turn:
    """One change of the masks of all layers.

    Attributes:
        old: the masks ``(o, i)`` as they are.
        evidence: layer name -> facts.
        keeps: the fraction that each layer is to keep; a change that moves weights between layers writes it.
        born: units that begin anew, though they may have been there a moment ago; written by changes that say so.
    """

    layers: Sequence[Layer]
    pattern: Granularity
    recipe: Recipe
    knobs: Mapping[str, Any]
    update: Update
    evidence: Mapping[str, Mapping[str, Any]]
    old: Mapping[str, Tensor]
    keeps: dict[str, float] = field(default_factory=dict)
    born: dict[str, Tensor] = field(default_factory=dict)

    def score(self, layer: Layer, alive: Tensor | None = None, criterion: str | None = None) -> Tensor:
        """Scores of units ``(pools, units)``; those that are gone by ``alive`` ``(o, i)`` lie below all others."""
        recipe = self.recipe if criterion is None else self.recipe.override(criterion=criterion)
        pooled = self.pattern.pool(Facts(layer, recipe, self.evidence[layer.name])["score"])
        if not bool(torch.isfinite(pooled.sum())) and not bool(torch.isfinite(pooled).all()):
            raise NumericalError(
                f"criterion '{recipe.criterion}' is not finite in {layer.name}: has training diverged?"
            )
        return pooled if alive is None else pooled.masked_fill(~self.units(alive), -torch.inf)

    def rival(self, layer: Layer) -> Tensor:
        """What weights that are not there would be worth."""
        return self.score(layer, None, self.knobs["grow"])

    def units(self, mask: Tensor) -> Tensor:
        """A mask ``(o, i)`` as one of units ``(pools, units)``."""
        return self.pattern.split(mask).any(-1)


#: Name of a kind of change, as a driver says it -> masks of units ``(pools, units)`` by layer.
Change = Callable[[Turn], dict[str, Tensor]]


def cut(turn: Turn) -> dict[str, Tensor]:
    """The best of what is there stay."""
    found = {}
    for layer in turn.layers:
        score = turn.score(layer, turn.old[layer.name])
        found[layer.name] = select(score, keep_count(turn.keeps[layer.name], score.shape[1]))
    return found


def renew(turn: Turn) -> dict[str, Tensor]:
    """The best of all stay, whatever was there."""
    found = {}
    for layer in turn.layers:
        score = turn.score(layer)
        found[layer.name] = select(score, keep_count(turn.keeps[layer.name], score.shape[1]))
    return found


def exchange(turn: Turn) -> dict[str, Tensor]:
    """Some of what is there goes, and as much grows: in the same layer, or where it is worth most."""
    drop, spread = turn.knobs.get("drop", "layer"), turn.knobs.get("spread", "none")
    scores = {x.name: turn.score(x, turn.old[x.name]) for x in turn.layers}
    counts = {n: keep_count(turn.keeps[n], s.shape[1]) for n, s in scores.items()}
    outs = {n: min(round(turn.update.swap * c), scores[n].shape[1] - c) for n, c in counts.items()}
    if drop == "all":
        stay = _best_of_all(scores, sum(counts.values()) - round(turn.update.swap * sum(counts.values())))
        grown = {n: counts[n] - int(m.sum()) for n, m in stay.items()}
    elif drop == "negative":
        stay = {n: s >= 0 for n, s in scores.items()}
        grown = {n: counts[n] - int(m.sum()) for n, m in stay.items()}
    else:
        soft = bool(turn.knobs.get("soft"))
        stay = {n: select(s, counts[n] - (0 if soft else outs[n])) for n, s in scores.items()}
        grown = outs
    if spread != "none":
        grown = _spread(turn, stay, sum(grown.values()))
        turn.keeps = {n: (int(m.sum()) + grown[n]) / m.shape[1] for n, m in stay.items()}
    found = {}
    for layer in turn.layers:
        mask = stay[layer.name]
        if grown[layer.name] > 0:
            mask = mask | select(turn.rival(layer).masked_fill(mask, -torch.inf), grown[layer.name])
        if drop == "negative":
            turn.born[layer.name] = mask & ~stay[layer.name]
        found[layer.name] = mask
    return found


def _best_of_all(scores: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """One ranking of all layers."""
    sizes = [s.shape[1] for s in scores.values()]
    stay = select(torch.cat(list(scores.values()), 1), count)
    return dict(zip(scores, stay.split(sizes, 1), strict=True))


def _spread(turn: Turn, stay: Mapping[str, Tensor], total: int) -> dict[str, int]:
    """How many grow in each layer."""
    by = turn.knobs["spread"]
    worth = []
    for layer in turn.layers:
        mask = stay[layer.name]
        left = int(mask.sum())
        if by == "count" or not left:
            worth.append(float(left))
        else:
            worth.append(float(turn.score(layer, None, by)[mask].double().mean()))
    rooms = [m.numel() - int(m.sum()) for m in stay.values()]
    return dict(zip(stay, shared(total, worth, rooms), strict=True))


def shared(total: int, worth: Sequence[float], rooms: Sequence[int]) -> list[int]:
    """Whole numbers that add up to ``total``, in proportion to ``worth``, none above its room.

    >>> shared(10, [1.0, 3.0, 1.0], [9, 4, 9])
    [3, 4, 3]
    """
    found, free, left = [0] * len(rooms), [i for i, r in enumerate(rooms) if r > 0], min(total, sum(rooms))
    while left > 0:
        whole = sum(worth[i] for i in free)
        ideal = {i: left * (worth[i] / whole if whole > 0 else 1 / len(free)) for i in free}
        full = [i for i in free if ideal[i] >= rooms[i]]
        if full:
            for i in full:
                found[i] = rooms[i]
                left -= rooms[i]
            free = [i for i in free if i not in full]
            continue
        found = [int(ideal.get(i, n)) for i, n in enumerate(found)]
        left -= sum(found[i] for i in free)
        for i in sorted(free, key=lambda i: (found[i] - ideal[i], i))[:left]:
            found[i] += 1
        break
    return found


def fan_in(turn: Turn) -> dict[str, Tensor]:
    """As exchange, with the same number of inputs for every neuron, and without neurons that matter little."""
    found = {}
    for number, layer in enumerate(turn.layers):
        old = turn.old[layer.name]
        score, rival = turn.score(layer, old), turn.rival(layer)
        neurons, inputs = old.shape
        there = old.any(1)
        count, active = int(old.sum()), int(there.sum())
        out = min(round(turn.update.swap * count), active * inputs - count)
        stay = select(score.reshape(1, -1), count - out).view_as(old)
        absent = rival.masked_fill(old | ~there[:, None], -torch.inf)
        salient = (stay | select(absent.reshape(1, -1), out).view_as(old)).sum(1)
        go = there & (salient < turn.knobs["ablate"] * (count / active))
        if number + 1 < len(turn.layers) and bool((there & ~go).any()):
            there = there & ~go
        budget = neurons * keep_count(turn.keeps[layer.name], inputs)
        width = min(inputs, budget // int(there.sum()))
        found[layer.name] = _filled(stay & there[:, None], rival, torch.where(there, width, 0))
    return found


def _filled(stay: Tensor, rival: Tensor, widths: Tensor) -> Tensor:
    """Each row grown to its width by the best of what is not there."""
    missing = widths - stay.sum(1)
    below = rival.masked_fill(stay, -torch.inf)
    grown = torch.zeros_like(stay)
    for count in missing.unique().tolist():
        if count > 0:
            rows = missing == count
            grown[rows] = select(below[rows], int(count))
    return stay | grown


CHANGES: dict[str, Change] = {"cut": cut, "renew": renew, "exchange": exchange, "fan-in": fan_in}


def check_change(recipe: Recipe, change: str, knobs: Mapping[str, Any], pattern: Granularity) -> None:
    """Refuse granularities that a change cannot count in."""
    if change == "fan-in" and pattern.name != "row":
        raise RecipeError(f"driver '{recipe.driver}' keeps as many inputs for every row: choose granularity row")
    across = knobs.get("drop", "layer") != "layer" or knobs.get("spread", "none") != "none"
    if across and pattern.name != "element" and not pattern.name.startswith("block"):
        raise RecipeError(
            f"method '{recipe.method}' moves weights between layers or changes how many go, and granularity "
            f"'{pattern.name}' fixes how many stay: choose element or block"
        )
