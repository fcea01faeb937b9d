"""Pruning while a model trains, in the user's own loop."""

from .cost import TrainingFlops
from .session import Session, attach

__all__ = ["Session", "TrainingFlops", "attach"]
