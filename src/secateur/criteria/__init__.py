"""What a weight is worth: one pure function for each criterion, registered by importing this package."""

from __future__ import annotations

from . import (
    activation,
    channels,
    curvature,
    depth,
    exits,
    experts,
    initial,
    magnitude,
    random,
    redundancy,
    saliency,
    tokens,
    training,
)

__all__ = [
    "activation",
    "channels",
    "curvature",
    "depth",
    "exits",
    "experts",
    "initial",
    "magnitude",
    "random",
    "redundancy",
    "saliency",
    "tokens",
    "training",
]
