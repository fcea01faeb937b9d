"""Pruning while a model trains, in the user's own loop, or in that of a task."""

from .cost import TrainingFlops
from .dynamic import TrainedDynamic
from .healing import Healing
from .result import Trained
from .session import Session, attach
from .train import supermask, train

__all__ = ["Healing", "Session", "Trained", "TrainedDynamic", "TrainingFlops", "attach", "supermask", "train"]
