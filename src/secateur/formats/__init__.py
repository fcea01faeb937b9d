"""How pruned weights are stored."""

from .grid import Grid, grid, parse_integers
from .packed import KINDS, Packed, pack, restore
from .sharing import Codebook
from .stored import OnGrid, bytes_of

__all__ = [
    "KINDS", "Codebook", "Grid", "OnGrid", "Packed", "bytes_of", "grid", "pack", "parse_integers", "restore",
]  # fmt: skip
