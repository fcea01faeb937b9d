"""What is learned beside the weights: gates that say which stay, and penalties that make some small."""

from . import control, penalties, projections, scores, stochastic, thresholds, widths
from .base import Gate, Now, Penalty, Values

__all__ = [
    "Gate",
    "Now",
    "Penalty",
    "Values",
    "control",
    "penalties",
    "projections",
    "scores",
    "stochastic",
    "thresholds",
    "widths",
]
