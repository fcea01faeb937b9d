"""What data can tell: statistics that are streamed over batches and merged across workers."""

from __future__ import annotations

from .flow import gather_flow
from .gradients import GradientEvidence, gather_gradients
from .inputs import InputEvidence, gather_inputs
from .tangent import gather_tangent
from .unrolled import gather_meta, gather_products
from .watch import Stop, watch

__all__ = [
    "GradientEvidence",
    "InputEvidence",
    "Stop",
    "gather_flow",
    "gather_gradients",
    "gather_inputs",
    "gather_meta",
    "gather_products",
    "gather_tangent",
    "watch",
]
