"""Layers that read one tensor share its evidence and its factorization."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..evidence import InputEvidence
from ..layers import Layer
from ..solve import sample_rows
from ..solvers import Curvature


class Group:
    """Evidence for the layers that read one input."""

    def __init__(self, leader: Layer, needs: frozenset[str], device: torch.device) -> None:
        self.evidence = InputEvidence(leader.shape[1], needs, device)
        self._samples: list[Tensor] = []
        self._curvature: Curvature | None = None
        self._complete = False

    @property
    def sample(self) -> Tensor:
        return torch.cat(self._samples)

    def add(self, x_ni: Tensor, parts: int) -> None:
        self.evidence.update(x_ni)
        self._samples.append(sample_rows(x_ni, parts).clone())

    def curvature(self, name: str, complete: Callable[[str, InputEvidence], None]) -> Curvature | None:
        """One factorization for the group; ``complete`` is first called with all that was seen."""
        if not self._complete:
            complete(name, self.evidence)
            self._complete = True
            if "gram" in self.evidence.needs:
                self._curvature = Curvature(self.evidence["gram"], name)
        return self._curvature
