"""Learn to prune: what each layer keeps is found by search, with the user's own evaluation."""

from . import drawing, learning
from .dhp import dhp
from .explore import Trial, explore
from .known import known_optimum
from .metapruning import metapruning
from .run import Found, search
from .space import Node, Space, project

__all__ = [
    "Found",
    "Node",
    "Space",
    "Trial",
    "dhp",
    "drawing",
    "explore",
    "known_optimum",
    "learning",
    "metapruning",
    "project",
    "search",
]
