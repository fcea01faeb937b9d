"""Structured pruning: coupled units go together, the model becomes smaller, and a proof says it computes the same."""

from .depth import plan_depth
from .experts import plan_experts
from .make import plan_structured, plan_zeros
from .plan import FamilyPlan, StructuredPlan
from .store import is_smaller, load, save
from .targets import Target
from .whole import WholePlan

__all__ = [
    "FamilyPlan",
    "StructuredPlan",
    "Target",
    "WholePlan",
    "is_smaller",
    "load",
    "plan_depth",
    "plan_experts",
    "plan_structured",
    "plan_zeros",
    "save",
]
