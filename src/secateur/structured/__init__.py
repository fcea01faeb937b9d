"""Structured pruning: coupled units go together, the model becomes smaller, and a proof says it computes the same."""

from .depth import DepthPlan, plan_depth
from .make import plan_structured
from .plan import FamilyPlan, StructuredPlan
from .store import load, save
from .targets import Target

__all__ = [
    "DepthPlan",
    "FamilyPlan",
    "StructuredPlan",
    "Target",
    "load",
    "plan_depth",
    "plan_structured",
    "save",
]
