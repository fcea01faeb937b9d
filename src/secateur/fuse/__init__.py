"""Pruning together with other compression: layers as products and sums of smaller ones."""

from . import cp, lowrank, sparse, tucker
from .choose import methods
from .decompose import Decomposed, Layered, decompose
from .plan import FactorPlan, plan_factors

__all__ = [
    "Decomposed",
    "FactorPlan",
    "Layered",
    "cp",
    "decompose",
    "lowrank",
    "methods",
    "plan_factors",
    "sparse",
    "tucker",
]
