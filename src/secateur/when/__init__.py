"""Pruning while a model trains, in the user's own loop."""

from .session import Session, attach

__all__ = ["Session", "attach"]
