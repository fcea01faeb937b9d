"""How the mask is made so, and whether the survivors move."""

from __future__ import annotations

from .admm import admm
from .base import Solved
from .curvature import Curvature, output_error
from .dsnot import dsnot
from .integers import gptq, round_to_nearest, sparsegpt_gptq
from .least_squares import least_squares, refit
from .obc import obc
from .obq import obq
from .obs import obs
from .patterns import kernel_patterns
from .rank import rank
from .shared import share
from .sparsegpt import sparsegpt

__all__ = [
    "Curvature",
    "Solved",
    "admm",
    "dsnot",
    "gptq",
    "kernel_patterns",
    "least_squares",
    "obc",
    "obq",
    "obs",
    "output_error",
    "rank",
    "refit",
    "round_to_nearest",
    "share",
    "sparsegpt",
    "sparsegpt_gptq",
]
