"""What data can tell: statistics that are streamed over batches and merged across workers."""

from __future__ import annotations

from .gradients import GradientEvidence, gather_gradients
from .inputs import InputEvidence, gather_inputs
from .watch import Stop, watch

__all__ = ["GradientEvidence", "InputEvidence", "Stop", "gather_gradients", "gather_inputs", "watch"]
