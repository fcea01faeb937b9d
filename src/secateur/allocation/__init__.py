"""How much of each layer stays."""

from __future__ import annotations

from . import fixed, measured, ranked
from .base import LayerFacts, Sketch

__all__ = ["LayerFacts", "Sketch", "fixed", "measured", "ranked"]
