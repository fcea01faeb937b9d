"""How the mask is made so, and whether the survivors move."""

from __future__ import annotations

from .admm import admm
from .base import Solved
from .curvature import Curvature, output_error
from .dsnot import dsnot
from .least_squares import least_squares, refit
from .obc import obc
from .obs import obs
from .rank import rank
from .sparsegpt import sparsegpt

__all__ = [
    "Curvature",
    "Solved",
    "admm",
    "dsnot",
    "least_squares",
    "obc",
    "obs",
    "output_error",
    "rank",
    "refit",
    "sparsegpt",
]
