"""Pruning at run time: what goes is decided anew for each input, and the work is really left out."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import RecipeError
from ..registry import get, parts
from .gates import Pace, TokenGates
from .store import is_gated, load, save
from .tokens import evit, tome

__all__ = ["Pace", "TokenGates", "evit", "is_gated", "is_runtime", "load", "made", "save", "tome"]


def is_runtime(method: Any) -> bool:
    """Whether a name is that of a method that works while the model runs, without training.

    >>> is_runtime("tome"), is_runtime("wanda")
    (True, False)
    """
    part = parts("transform").get(method) if isinstance(method, str) else None
    return part is not None and part.facts.get("when") == "runtime"


def made(model: nn.Module, method: str, example: Any, **knobs: Any) -> TokenGates:
    """The model with a method of run time in it, by name.

    Raises:
        RecipeError: there is no example, or no such knob.
    """
    part = get("transform", method)
    if example is None:
        raise RecipeError(f"'{method}' runs the model to see where tokens can leave: give an example of its inputs")
    given = {name: value for name, value in knobs.items() if value is not None}
    part.knobs_with(given)
    found: TokenGates = part.function(model, example, **given)
    return found
