"""Which method, for this model, this data, this machine; and how sure that is."""

from __future__ import annotations

from .situation import Goal, Hardware, Retraining, Situation

__all__ = ["Goal", "Hardware", "Retraining", "Situation"]
