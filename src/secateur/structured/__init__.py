"""Structured pruning: coupled units go together, the model becomes smaller, and a proof says it computes the same."""

from .plan import FamilyPlan, StructuredPlan, plan_structured
from .store import load, save
from .targets import Target

__all__ = ["FamilyPlan", "StructuredPlan", "Target", "load", "plan_structured", "save"]
