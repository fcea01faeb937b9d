"""The search itself: a strategy proposes, the proposal is brought to the target, a number comes back."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..errors import NumericalError, RecipeError
from ..registry import get
from .space import Counts, Space, project

#: Proposals in a row that were evaluated before, and cost nothing, after which a search ends: there is little else.
_REPEATS = 60


@dataclass(frozen=True)
class Trial:
    """One evaluation.

    Attributes:
        number: of the evaluation, from 0.
        origin: ``uniform``, ``recipe`` (the recipe's own allocation) or ``strategy``.
        counts: how many units of each node stayed.
        keeps: the same as fractions.
        cost: what that costs, in the target's quantity.
        value: what the evaluation said; higher is better.
        seconds: that it took.
    """

    number: int
    origin: str
    counts: Counts
    keeps: tuple[float, ...]
    cost: float
    value: float
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {**asdict(self), "counts": list(self.counts), "keeps": [round(k, 6) for k in self.keeps]}


#: Yields one number for each node, how much of it to keep relative to the others, and is sent the trial that the
#: projection of it onto the target became.
Moves = Generator[Sequence[float], Trial, None]


def explore(
    space: Space,
    strategy: str,
    value: Callable[[Counts], float],
    *,
    budget: int,
    seed: int = 0,
    first: Mapping[str, Sequence[float]] | None = None,
    knobs: Mapping[str, Any] | None = None,
    record: Sequence[Mapping[str, Any]] = (),
    done: Callable[[Trial], None] | None = None,
) -> list[Trial]:
    """Evaluate up to ``budget`` different allocations that meet the target.

    Args:
        value: what counts are worth; higher is better.
        first: origin -> proposal, evaluated before the strategy's; uniform where none is given.
        record: trials of the same search, as `Trial.to_dict`, that are not evaluated again: the strategy goes through
            them as it did, and on from there.
        done: called with every trial.

    Raises:
        RecipeError: the bounds leave too much, a knob is unknown, or the record is of another search.
        NumericalError: an evaluation gave no number.
    """
    if isinstance(budget, bool) or not isinstance(budget, int) or budget < 1:
        raise RecipeError(f"budget is how many evaluations there may be, at least 1, not {budget!r}")
    part = get("search", strategy)
    given = part.knobs_with(knobs or {})
    space.check()
    trials: list[Trial] = []
    known: dict[Counts, Trial] = {}

    def attempt(counts: Counts, origin: str) -> Trial:
        number = len(trials)
        if number < len(record):
            trial = _recorded(record[number], number, counts, space)
        else:
            begun = time.perf_counter()
            found = float(value(counts))
            if not math.isfinite(found):
                raise NumericalError(
                    f"evaluation {number} gave {found}: evaluate() returns a finite number, higher is better (a model "
                    "that fails can be worth a very low one)"
                )
            seconds = round(time.perf_counter() - begun, 4)
            trial = Trial(number, origin, counts, space.keeps(counts), space.cost(counts), found, seconds)
        trials.append(trial)
        known[counts] = trial
        if done is not None:
            done(trial)
        return trial

    for origin, wanted in (first or {"uniform": [1.0] * len(space)}).items():
        counts = project(space, wanted)
        if counts not in known and len(trials) < budget:
            attempt(counts, origin)
    generator = torch.Generator().manual_seed(seed)
    moves: Moves = part.function(space, budget, generator, tuple(trials), **given)
    repeats = 0
    try:
        wanted = next(moves)
        while len(trials) < budget and repeats < _REPEATS:
            counts = project(space, wanted)
            repeats = repeats + 1 if counts in known else 0
            wanted = moves.send(known[counts] if counts in known else attempt(counts, "strategy"))
    except StopIteration:
        pass
    finally:
        moves.close()
    return trials


def _recorded(row: Mapping[str, Any], number: int, counts: Counts, space: Space) -> Trial:
    if tuple(row["counts"]) != counts:
        raise RecipeError(
            f"trial {number} of the history is not what this search tries: it is of another model, seed or version; "
            "name another history file"
        )
    value, origin = float(row["value"]), str(row["origin"])
    return Trial(number, origin, counts, space.keeps(counts), space.cost(counts), value, float(row["seconds"]))


def best_of(trials: Sequence[Trial]) -> Trial:
    """The trial with the highest value; of several the first."""
    return max(trials, key=lambda t: (t.value, -t.number))
