"""One block of a large model in memory at a time."""

from __future__ import annotations

from .blocks import Blocks, find_blocks
from .engine import Engine, Tick

__all__ = ["Blocks", "Engine", "Tick", "find_blocks"]
