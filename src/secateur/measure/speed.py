"""What models are timed on, and how fast they are: latency, throughput, time to first token and per token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..errors import ModelError
from .interval import interval, ratio
from .latency import WARMUP, seconds, turns

#: Turns that are kept: the interval of a median of 15 is from the fourth to the twelfth, and covers 96 %.
TURNS = 15
#: Tokens of an answer that follow the first one in a turn.
STEPS = 8


class Workload(Protocol):
    """Work that a model does in one turn, timed in one part or several.

    Attributes:
        name: what it is called in messages.
        items: part -> tokens or batch items that it handles, for the throughput.
    """

    @property
    def name(self) -> str: ...
    @property
    def items(self) -> Mapping[str, int]: ...
    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Do it once: seconds of each part."""


@dataclass(frozen=True)
class Forward:
    """One forward pass.

    Attributes:
        name: also of its only part.
        args, kwargs: the inputs; they follow the model to its device.
        count: tokens or batch items in them.
    """

    name: str
    args: Sequence[Any] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    count: int = 1

    @property
    def items(self) -> Mapping[str, int]:
        return {self.name: self.count}

    def __call__(self, model: nn.Module) -> dict[str, float]:
        args, kwargs = placed((self.args, dict(self.kwargs)), model)
        return {self.name: seconds(lambda: model(*args, **kwargs))[0]}


@dataclass(frozen=True)
class Generation:
    """A prompt is read into a key-value cache, and an answer follows token by token.

    Tokens are picked greedily, and the time that takes counts; what is fed back are the tokens of ``answer_n``
    nevertheless, so that all models do the same work.

    Attributes:
        prompt_n: int64 ``(1, tokens)``.
        answer_n: int64 ``(1, tokens)``.
    """

    prompt_n: Tensor
    answer_n: Tensor

    name = "generation"

    @property
    def items(self) -> Mapping[str, int]:
        return {"first token": self.prompt_n.shape[1], "per token": 1}

    def __call__(self, model: nn.Module) -> dict[str, float]:
        prompt, *answer = placed([self.prompt_n, *self.answer_n.split(1, dim=1)], model)
        first, cache = seconds(lambda: _step(model, prompt, None))
        rest = 0.0
        for token in answer:
            more, cache = seconds(lambda token=token, cache=cache: _step(model, token, cache))  # type: ignore[misc]
            rest += more
        return {"first token": first, "per token": rest / len(answer)}


def _step(model: nn.Module, ids: Tensor, cache: Any) -> Any:
    """One step of greedy decoding: the cache that it leaves, by the name that the model has for it."""
    out = model(input_ids=ids, use_cache=True, **(cache or {}))
    int(out.logits[0, -1].argmax())
    for name in ("cache", "past_key_values"):  # transformers from 5.24 on, and before
        if (left := getattr(out, name, None)) is not None:
            return {name: left}
    return None


def can_generate(model: nn.Module) -> bool:
    """Whether a language model keeps a key-value cache: it is asked for two tokens."""
    ids = placed(torch.zeros(1, 1, dtype=torch.int64), model)
    try:
        with torch.inference_mode():
            return _step(model, ids, _step(model, ids, None)) is not None
    except (AttributeError, TypeError, ValueError):  # it takes or gives no cache
        return False


def placed(inputs: Any, model: nn.Module) -> Any:
    """Inputs on the model's device."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return tree_map_only(Tensor, lambda x: x.to(device), inputs)


def run_once(workload: Workload, model: nn.Module, name: str = "the model") -> dict[str, float]:
    """One turn of a workload.

    Raises:
        ModelError: the model does not run on it.
    """
    try:
        return turns({name: model}, workload, 1, warmup=0)[name][0]
    except Exception as error:  # whatever a model of the user's raises
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ModelError(
            f"{name} does not run on the workload '{workload.name}': {type(error).__name__} {reason} "
            "(choose others with --example or --tokens)"
        ) from None


def speeds(
    models: Mapping[str, nn.Module], workloads: Sequence[Workload], repeats: int = TURNS, warmup: int = WARMUP
) -> dict[str, dict[str, dict[str, Any]]]:
    """How fast models are, in turns on the same workloads.

    Args:
        models: the last one is what the others are compared with.
        workloads: one after the other; in each all models take turns.
        repeats, warmup: turns that are kept, and before them those that are not.

    Returns:
        Model -> part of a workload -> ``median``, ``low``, ``high`` (seconds, with the ``coverage`` of the interval),
        ``rate`` (items a second at the median) and ``ratio``: how many times as fast as the last model, by pairs of
        the same turn, with ``median``, ``low``, ``high`` and ``coverage``; None for the last model itself.

    Raises:
        ModelError: a model does not run on a workload.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in models}
    baseline = list(models)[-1]
    for workload in workloads:
        for name, model in models.items():
            run_once(workload, model, name)
        times = turns(models, workload, repeats, warmup)
        for part, count in workload.items.items():
            theirs = [turn[part] for turn in times[baseline]]
            for name in models:
                own = [turn[part] for turn in times[name]]
                whole = interval(own)
                found[name][part] = {
                    **whole.to_dict(),
                    "rate": count / whole.median,
                    "ratio": None if name == baseline else ratio(theirs, own).to_dict(),
                }
    return found
