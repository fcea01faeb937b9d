"""Learn to prune: what each layer keeps is found by search, with the user's own evaluation."""

from . import drawing, learning
from .explore import Trial, explore
from .known import known_optimum
from .run import Found, search
from .space import Node, Space, project

__all__ = ["Found", "Node", "Space", "Trial", "drawing", "explore", "known_optimum", "learning", "project", "search"]
