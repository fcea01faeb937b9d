"""What a solver returns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..formats import OnGrid


@dataclass(frozen=True)
class Solved:
    """A pruned matrix.

    Attributes:
        weight: ``(o, i)`` float32, exactly zero where the mask is False.
        mask: ``(o, i)`` bool, True keeps.
        notes: what the user should know (damping that had to grow, iterations, ...).
        grid: whose values the weights are, where the solver quantizes.
    """

    weight: Tensor
    mask: Tensor
    notes: tuple[str, ...] = ()
    grid: OnGrid | None = None
