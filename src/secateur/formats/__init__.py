"""How pruned weights are stored."""

from .grid import Grid, grid, parse_integers
from .packed import KINDS, Packed, pack, restore

__all__ = ["KINDS", "Grid", "Packed", "grid", "pack", "parse_integers", "restore"]
