"""How near evidence is: a subject to a situation, a target to another, a recipe to another. Each from 0 to 1."""

from __future__ import annotations

import math
from functools import lru_cache

from ..registry import get
from .candidate import AXES, Aim, Candidate, Profile
from .cells import Cell
from .situation import Situation

#: How far kinds are apart, where that is not `FAR`.
_KINDS = {
    frozenset(("vit", "encoder")): 0.5, frozenset(("decoder", "moe")): 0.5, frozenset(("encoder", "decoder")): 0.7,
    frozenset(("encoder-decoder", "encoder")): 0.5, frozenset(("encoder-decoder", "decoder")): 0.5,
    frozenset(("cnn", "vit")): 1.0,
}  # fmt: skip
FAR = 1.5
#: How alike recipes of one method must be to count as that method: other knobs or rounds, not another recovery.
NEARLY = 0.9


def relevance(situation: Situation, cell: Cell) -> float:
    """How much a cell's subject says of the situation's model.

    Kinds that are alike are near; a tenfold size is half a step; so is whether the model is trained in the study. Of
    the user's own model everything is said, and the user's own studies count twice as much as others.
    """
    if situation.model and situation.model == cell.subject.task:
        return 1.0
    distance = 0.0
    if situation.kind != cell.subject.kind:
        distance += _KINDS.get(frozenset((situation.kind, cell.subject.kind)), FAR)
    if situation.parameters and cell.subject.parameters:
        distance += 0.5 * abs(math.log10(situation.parameters / cell.subject.parameters))
    else:
        distance += 0.5
    distance += 0.5 * (cell.task is not situation.trains)
    return min(1.0, (2.0 if cell.own else 1.0) * math.exp(-distance))


def closeness(aim: Aim, other: Aim) -> float:
    """How near two aims are: a step for each halving of what stays, one for another quantity, one for another
    structure.

    >>> closeness(Aim("weights", "weights", 0.2), Aim("weights", "weights", 0.1)) == math.exp(-1)
    True
    """
    distance = abs(math.log2(aim.keep / other.keep))
    distance += 0.5 * (aim.quantity != other.quantity)
    distance += 0.0 if aim.structure == other.structure else 1.0
    return math.exp(-distance)


@lru_cache(maxsize=200_000)
def likeness(one: Profile, other: Profile) -> float:
    """The share of the axes that two recipes have in common, by their weight.

    Criteria of one family count half. A part with other knobs counts four fifths. Axes that neither uses do not count.

    >>> from secateur import Recipe
    >>> from secateur.recommend.candidate import profile
    >>> likeness(profile(Recipe.of("wanda")), profile(Recipe.of("wanda", sparsity=0.7)))
    1.0
    """
    total = common = 0.0
    for (axis, weight), (a, knobs), (b, other_knobs) in zip(AXES.items(), one, other, strict=True):
        if axis in ("gate", "penalty", "control") and a == b == "none":
            continue
        if axis == "steps":
            share = 1.0 / (1.0 + abs(math.log2(a / b)))
        elif a == b:
            share = 1.0 if knobs == other_knobs else 0.8
        elif axis == "criterion" and a and b:
            share = 0.5 if get(axis, a).facts.get("family") == get(axis, b).facts.get("family") else 0.0
        else:
            share = 0.0
        total += weight
        common += weight * share
    return common / total


def same(one: Candidate, other: Candidate) -> bool:
    """Whether runs of one are runs of the other: recipes that agree on every axis; of one method, on nearly all."""
    named = one.recipe.method == other.recipe.method != "custom"
    return likeness(one.profile, other.profile) > (NEARLY if named else 1 - 1e-9)
