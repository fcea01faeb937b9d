"""Pruning at run time: what goes is decided anew for each input, and the work is really left out."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import RecipeError
from ..registry import get
from .base import Dynamic, Learning, is_runtime
from .cgnet import cgnet
from .channels import ChannelGates
from .contextual import cats, teal
from .decoder import PrunedDecoder
from .dejavu import deja_vu
from .exits import Exits, early_exit
from .fbs import fbs
from .ftwt import ftwt
from .gates import Pace, TokenGates
from .keys import h2o, snapkv, streaming
from .knobs import check
from .lm_exit import ExitDecoding, exit_decoding
from .lm_skip import SkipDecoding, skip_decoding
from .manidp import ManifoldGates, manidp
from .predicted import DynamicViT, dynamicvit
from .routing import ExpertGates, expert_mass, expert_skipping
from .skips import Skips, skipnet
from .sparse import SparseDecoder
from .store import is_gated, load, save
from .tokens import evit, power_bert, tome

__all__ = [
    "ChannelGates",
    "Dynamic",
    "DynamicViT",
    "ExitDecoding",
    "Exits",
    "ExpertGates",
    "Learning",
    "ManifoldGates",
    "Pace",
    "PrunedDecoder",
    "SkipDecoding",
    "Skips",
    "SparseDecoder",
    "TokenGates",
    "cats",
    "cgnet",
    "deja_vu",
    "dynamicvit",
    "early_exit",
    "evit",
    "exit_decoding",
    "expert_mass",
    "expert_skipping",
    "fbs",
    "ftwt",
    "h2o",
    "is_gated",
    "is_runtime",
    "load",
    "made",
    "manidp",
    "power_bert",
    "save",
    "skip_decoding",
    "skipnet",
    "snapkv",
    "streaming",
    "teal",
    "tome",
]


def made(model: nn.Module, method: str, example: Any, data: Any = None, **knobs: Any) -> Dynamic:
    """The model with a method of run time in it, by name. Gates that are learned are fresh, and want training.

    Args:
        example: inputs of one forward pass.
        data: batches, for methods that measure; see the part's needs.

    Raises:
        RecipeError: there is no example, no data where they are needed, or no such knob or value.
    """
    part = get("transform", method)
    if example is None:
        raise RecipeError(f"'{method}' runs the model to see where work can be left out: give an example of its inputs")
    given = {name: value for name, value in knobs.items() if value is not None}
    check(part, given)
    facts = [model, example]
    if "data" in part.needs:
        if data is None:
            raise RecipeError(f"'{method}' measures on data what can be left out: pass data= (--data)")
        facts.append(data)
    found: Dynamic = part.function(*facts, **given)
    return found
