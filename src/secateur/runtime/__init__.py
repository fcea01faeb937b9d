"""Pruning at run time: what goes is decided anew for each input, and the work is really left out."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import RecipeError
from ..registry import get
from .base import Dynamic, Learning, is_runtime
from .cgnet import cgnet
from .channels import ChannelGates
from .fbs import fbs
from .ftwt import ftwt
from .gates import Pace, TokenGates
from .store import is_gated, load, save
from .tokens import evit, tome

__all__ = [
    "ChannelGates",
    "Dynamic",
    "Learning",
    "Pace",
    "TokenGates",
    "cgnet",
    "evit",
    "fbs",
    "ftwt",
    "is_gated",
    "is_runtime",
    "load",
    "made",
    "save",
    "tome",
]


def made(model: nn.Module, method: str, example: Any, data: Any = None, **knobs: Any) -> Dynamic:
    """The model with a method of run time in it, by name. Gates that are learned are fresh, and want training.

    Args:
        example: inputs of one forward pass.
        data: batches, for methods that measure; see the part's needs.

    Raises:
        RecipeError: there is no example, no data where they are needed, or no such knob.
    """
    part = get("transform", method)
    if example is None:
        raise RecipeError(f"'{method}' runs the model to see where work can be left out: give an example of its inputs")
    given = {name: value for name, value in knobs.items() if value is not None}
    part.knobs_with(given)
    facts = [model, example]
    if "data" in part.needs:
        if data is None:
            raise RecipeError(f"'{method}' measures on data what can be left out: pass data= (--data)")
        facts.append(data)
    found: Dynamic = part.function(*facts, **given)
    return found
