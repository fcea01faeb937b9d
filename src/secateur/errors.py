"""Errors a person can act on: what was wrong, where, and what to do, in one sentence."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SecateurError(ValueError):
    """Base of every error that secateur raises on purpose."""


class UnknownName(SecateurError):
    """A name that no registered part carries."""

    def __init__(self, kind: str, name: str, known: Iterable[str], hint: str = "secateur methods") -> None:
        near = difflib.get_close_matches(str(name), list(known), n=1)
        guess = f"; did you mean '{near[0]}'?" if near else ""
        super().__init__(f"no {kind} named '{name}'{guess} ({hint})")


class RecipeError(SecateurError):
    """A recipe whose parts do not fit each other, the model or what was given."""


class DataError(SecateurError):
    """Calibration or evaluation data that cannot be used."""


class ModelError(SecateurError):
    """A model, or a model directory, that cannot be used."""


class NumericalError(SecateurError):
    """NaN, infinity or a matrix that cannot be factorized, with the layer's name."""


class StudyError(SecateurError):
    """A comparison that is not understood, or cannot be made."""


class OutputError(SecateurError):
    """An output that would overwrite something, or cannot be written."""
