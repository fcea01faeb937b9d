"""Which method, for this model, this data, this machine; and how sure that is."""

from __future__ import annotations

from . import advice, rules_can, rules_pay  # noqa: F401  registers them
from .answer import Answer, Entry, recommend
from .evidence import export
from .hardware import Hardware
from .situation import Goal, Retraining, Situation

__all__ = ["Answer", "Entry", "Goal", "Hardware", "Retraining", "Situation", "export", "recommend"]
