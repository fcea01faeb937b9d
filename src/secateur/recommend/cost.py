"""What a method takes: data, time and memory, by what its recipe needs; seconds only where they were measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..facts import FACTS
from .candidate import Candidate, Expected
from .situation import Situation, spoken


@dataclass(frozen=True)
class Cost:
    """What a method takes, in words, and in seconds where that was measured."""

    data: str
    time: str
    memory: str
    seconds: Expected

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {"data": self.data, "time": self.time, "memory": self.memory, "seconds": self.seconds.to_dict()}


def cost_of(candidate: Candidate, situation: Situation, seconds: Expected) -> Cost:
    """What a method takes in a situation."""
    return Cost(
        _data(candidate, situation), _time(candidate, situation, seconds), _memory(candidate, situation), seconds
    )


def _data(candidate: Candidate, situation: Situation) -> str:
    text = situation.language
    if candidate.trains:
        return "training text" if text else "training data with labels"
    if candidate.recipe.needs_loss:
        return "a few batches of text" if text else "a few batches with labels"
    if candidate.needs_inputs or candidate.recovery == "units":
        return "a few batches of text" if text else "a few batches without labels"
    return "the shape of an input" if candidate.needs else "none"


def _time(candidate: Candidate, situation: Situation, seconds: Expected) -> str:
    measured = f" ({spoken(seconds.value)} in {seconds.source})" if seconds.value is not None else ""
    if candidate.trains:
        runs = candidate.runs
        epoch = situation.retraining.epoch
        each = f", {spoken(epoch)} an epoch" if epoch else ""
        return f"{runs:.3g} training run{'' if runs == 1 else 's'}{each}{measured}"
    rounds = f", {candidate.recipe.steps} rounds" if candidate.recipe.steps > 1 else ""
    if candidate.recovery == "block":
        return f"one pass over the data, each block trained to follow the dense one{rounds}{measured}"
    if candidate.recipe.needs_loss:
        return f"forward and backward passes over the data{rounds}{measured}"
    if "gram" in candidate.needs:
        return f"one pass over the data, and a solve for each layer{rounds}{measured}"
    if candidate.needs_inputs:
        return f"one pass over the data{rounds}{measured}"
    return f"the weights are read once{rounds}{measured}"


def _memory(candidate: Candidate, situation: Situation) -> str:
    if candidate.trains:
        more = " and a dense copy" if candidate.recipe.hold in ("dense", "frozen", "sr-ste", "top-kast") else ""
        return f"the model, its gradients and the optimizer's state{more}"
    sources = {FACTS[name].source for name in candidate.needs if name in FACTS}
    if "unrolled" in sources:
        return "the model, its gradients and the graph of all batches"
    if candidate.recipe.needs_loss:
        return "the model and its gradients"
    if (
        situation.language
        and not candidate.recipe.needs_whole
        and candidate.structure in ("weights", "block", "pattern")
    ):
        return "one block at a time, and the activations"
    return "the model once"
