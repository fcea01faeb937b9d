"""Dependency analysis: which positions of which parameters can only be removed together."""

from .trace import Slot, Trace, trace
from .units import Dependencies, Family, Unit, dependencies

__all__ = ["Dependencies", "Family", "Slot", "Trace", "Unit", "dependencies", "trace"]
