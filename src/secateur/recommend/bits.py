"""Fewer bits or fewer weights: what runs say where both were held to one target.

A contender whose solver quantizes is no evidence of what pruning loses, so it stands apart from the others. It is held
against them where it removes nothing itself, or where the target is one of bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .candidate import Expected
from .cells import Cell, Outcome, cells
from .distance import relevance
from .evidence import Run
from .predict import lost
from .rank import NEAR, counted
from .situation import Situation


def held_together(runs: Iterable[Run]) -> list[Cell]:
    """The cells in which both were measured and finished."""
    return [cell for cell in cells(runs) if cell.absolute and all(sides(cell))]


def sides(cell: Cell) -> tuple[list[Outcome], list[Outcome]]:
    """What quantized, and what did not."""
    done = [o for o in cell.outcomes if o.score is not None]
    alone = cell.target.startswith("bytes")
    bits = [o for o in done if o.candidate.quantizes and (alone or o.candidate.recipe.sparsity == 0)]
    return bits, [o for o in done if not o.candidate.quantizes]


@dataclass(frozen=True)
class Held:
    """What was found near a situation.

    Attributes:
        text: for each task what the best of both sides lost.
        fewer_bits: how many tasks were better with fewer bits, of ``tasks``.
    """

    text: str
    fewer_bits: int
    tasks: int


def held(situation: Situation, found: Sequence[Cell]) -> Held | None:
    """The nearest cell of each task that is near: by the subject, and by the share that stays."""
    nearest: dict[str, tuple[float, Cell]] = {}
    for cell in found:
        weight = relevance(situation, cell) * math.exp(-abs(math.log2(situation.goal.keep / cell.aim.keep)))
        if weight >= NEAR and weight > nearest.get(cell.subject.task, (0.0, cell))[0]:
            nearest[cell.subject.task] = (weight, cell)
    if not nearest:
        return None
    said, wins = [], 0
    for task, (_, cell) in sorted(nearest.items()):
        bits, weights = (min(side, key=lambda o: o.drop) for side in sides(cell))
        wins += bits.drop < weights.drop
        said.append(f"on {task} at {cell.target} {_side(bits, cell)}, the best that only prunes {_side(weights, cell)}")
    return Held("; ".join(said), wins, len(nearest))


def _side(outcome: Outcome, cell: Cell) -> str:
    runs = counted(outcome.runs - outcome.failed, "run")
    return f"{outcome.label} lost {lost(Expected(outcome.drop, source=runs), cell.metric.startswith('perplexity'))}"
