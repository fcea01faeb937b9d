"""secateur: prune neural networks, compare pruning methods, and measure what it brings."""

from __future__ import annotations

from .directory import plan, prune_directory
from .errors import SecateurError
from .masks import Masks
from .methods import all_methods as list_methods
from .methods import explain, load
from .prune import Pruned, prune
from .quality import measure
from .recipe import Recipe

load()

__version__ = "0.1.0"

__all__ = [
    "Masks",
    "Pruned",
    "Recipe",
    "SecateurError",
    "explain",
    "list_methods",
    "measure",
    "plan",
    "prune",
    "prune_directory",
]
