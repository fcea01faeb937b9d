"""Pruning while a model trains, in the user's own loop, or in that of a task."""

from .cost import TrainingFlops
from .healing import Healing
from .result import Trained
from .session import Session, attach
from .train import supermask, train

__all__ = ["Healing", "Session", "Trained", "TrainingFlops", "attach", "supermask", "train"]
