"""Pruning together with other compression: layers as products and sums of smaller ones."""

from . import lowrank, sparse, tucker
from .decompose import Decomposed, Layered, decompose

__all__ = ["Decomposed", "Layered", "decompose", "lowrank", "sparse", "tucker"]
