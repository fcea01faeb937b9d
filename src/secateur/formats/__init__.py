"""How pruned weights are stored."""

from .packed import KINDS, Packed, pack, restore

__all__ = ["KINDS", "Packed", "pack", "restore"]
