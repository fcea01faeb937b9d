"""Tokens of a language model that leave it early while a text is continued."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RecipeError
from ..layers import evaluating
from ..registry import get, register
from ..structured import Target
from .base import numbers
from .between import hidden, inputs_in, rows_of
from .lm_pass import (
    Decoder,
    Through,
    blocks_of,
    cache_of,
    continued,
    ids_of,
    measured_tokens,
    quality_of,
    share_of,
    step_flops,
    tail_of,
    windows_of,
)
from .threshold import Point, sweep

#: What tells how far a token is from its answer -> the criterion.
MEASURES = {"state": "state-saturation", "softmax": "softmax-response"}
#: How often the threshold is tried on the data, with what leaves really gone.
_TRIES = 7


class _Filled(Exception):
    """Keys and values are known; the rest of the block is not wanted."""


class _Capture(Through):
    """Takes keys and values down, and ends the block there."""

    def update(self, key: Tensor, value: Tensor, layer: int, *args: Any, **kwargs: Any) -> Any:
        """Take them down."""
        self.key, self.value, self.layer = key, value, layer
        raise _Filled


class _Joined(Through):
    """The cache of those that go on: those that have left are added beside them, from what was taken down."""

    def __init__(self, cache: Any, rows: Tensor, gone: Tensor, taken: _Capture) -> None:
        super().__init__(cache)
        self.rows, self.gone, self.taken = rows, gone, taken

    def update(self, key: Tensor, value: Tensor, layer: int, *args: Any, **kwargs: Any) -> Any:
        """Add keys and values of all, and give back those of the ones that go on."""
        both = []
        for mine, theirs in ((key, self.taken.key), (value, self.taken.value)):
            whole = mine.new_empty(len(self.rows) + len(self.gone), *mine.shape[1:])
            whole[self.rows], whole[self.gone] = mine, theirs
            both.append(whole)
        keys, values = self.cache.update(*both, layer, *args, **kwargs)
        return keys[self.rows], values[self.rows]


class ExitDecoding(Decoder):
    """A language model that reads a prompt with all blocks; each token behind it leaves as soon as it is sure.

    A token that has left keeps its hidden state: later blocks compute keys and values of it, for the tokens to come,
    and nothing else. Several tokens at once are computed whole and give the same answers.

    Attributes:
        places: numbers of the blocks behind which a token may leave.
        measure: ``state`` or ``softmax``.
        threshold: a token leaves where its doubt is below it; None: none does.
        tail: paths of what follows the last block, to the logits; for ``softmax``.
        model, blocks, record: see `Decoder`.
    """

    def __init__(
        self, model: nn.Module, blocks: Sequence[str], record: Mapping[str, Any], places: Sequence[int], measure: str,
        tail: Sequence[str], threshold: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__(model, blocks, record)
        self.places, self.measure, self.tail, self.threshold = tuple(places), measure, tuple(tail), threshold
        self.decide: Callable[[int, Tensor], Tensor] = self._below
        self.left: list[Tensor] | None = None  # a list is given, for each pass behind the prompt, where tokens left

    def _below(self, place: int, doubt: Tensor) -> Tensor:
        return doubt < (-1.0 if self.threshold is None else self.threshold)

    def start(self) -> None:
        self.reads = True
        self.gone: Tensor | None = None  # (sequences, tokens)
        self.known: Tensor | None = None  # logits of what has left, where they are computed already

    def forwards(self) -> dict[str, Callable[..., Any]]:
        found = {name: self._block(k) for k, name in enumerate(self.blocks)}
        return found | ({self.tail[-1]: self._head} if self.measure == "softmax" else {})

    def _block(self, k: int) -> Callable[..., Tensor]:
        def forward(own: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
            name, cache = cache_of(args, kwargs)
            x = hidden((args, kwargs))
            assert x is not None
            if k == 0:
                self.reads = cache is None or cache.get_seq_length() == 0
                if not self.reads:
                    self.gone = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
                    self.where = torch.full(x.shape[:2], len(self.places), device=x.device)
                    if self.left is not None:
                        self.left.append(self.where)
            out = self._run(x, own, args, kwargs, name)
            if not self.reads and k in self.places:
                self._look(self.places.index(k), x, out)
            return out

        return forward

    def _run(self, x: Tensor, own: Callable[..., Any], args: Any, kwargs: Any, name: str) -> Tensor:
        if self.reads or self.gone is None or not bool(self.gone.any()):
            whole: Tensor = own(*args, **kwargs)
            return whole
        if x.shape[1] > 1:  # several tokens at once: those that have left keep their state
            return torch.where(self.gone[..., None], x, own(*args, **kwargs))
        gone = self.gone[:, 0]
        cache, count = kwargs[name], inputs_in((args, kwargs))
        rest = {n: v for n, v in kwargs.items() if n != name}
        away, rows = gone.nonzero()[:, 0], (~gone).nonzero()[:, 0]
        taken = _Capture(cache)
        with suppress(_Filled):
            own(*rows_of(args, count, away), **rows_of(rest, count, away), **{name: taken})
        if not len(rows):
            cache.update(taken.key, taken.value, taken.layer)
            return x
        joined = _Joined(cache, rows, away, taken)
        part = own(*rows_of(args, count, rows), **rows_of(rest, count, rows), **{name: joined})
        return x.index_copy(0, rows, part)

    def _look(self, place: int, x: Tensor, out: Tensor) -> None:
        """Which tokens leave behind a block."""
        assert self.gone is not None
        stays = ~self.gone
        if not bool(stays.any()):
            return
        logits = None
        if self.measure == "softmax":
            logits = self._logits(out[stays])
            doubt = get("criterion", MEASURES["softmax"])({"exit_logits": logits})
        else:
            doubt = get("criterion", MEASURES["state"])({"state_before": x[stays], "state_after": out[stays]})
        now = stays.clone()
        now[stays] = self.decide(place, doubt)
        if logits is not None and bool(now.any()):
            if self.known is None:
                self.known = logits.new_zeros(*now.shape, logits.shape[-1])
            self.known[now] = logits[now[stays]]
        self.gone = self.gone | now
        self.where[now] = place

    def _logits(self, x: Tensor) -> Tensor:
        known, self.known = self.known, None  # the head is asked for all of these
        for path in self.tail:
            x = self.model.get_submodule(path)(x)
        self.known = known
        return x

    def _head(self, own: Callable[..., Tensor], x: Tensor) -> Tensor:
        """The output layer, which knows already what it would say to tokens that have left."""
        if self.known is None or self.gone is None or x.shape[:2] != self.gone.shape:
            return own(x)
        if bool(self.gone.all()):
            return self.known
        found = self.known.clone()
        found[~self.gone] = own(x[~self.gone])
        return found

    def saved(self) -> dict[str, Any]:
        return {
            "blocks": self.blocks, "places": self.places, "measure": self.measure, "tail": self.tail,
            "threshold": self.threshold,
        }  # fmt: skip

    def told(self) -> str:
        """What was made, and what it costs."""
        shares = ", ".join(f"{100 * x:.0f} %" for x in self.record["left"])
        where = ", ".join(str(k) for k in self.places)
        text = f"exit-decoding by {self.measure} behind blocks {where}, below {self.threshold:.3g}: {shares} at the end"
        return "\n".join([text, self.quality(), *self.record["notes"]])


def _restored(model: nn.Module, saved: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ExitDecoding:
    found = saved["saved"]
    return ExitDecoding(
        model, list(map(str, found["blocks"])), saved["record"], list(map(int, found["places"])),
        str(found["measure"]), list(map(str, found["tail"])), float(found["threshold"]),
    )  # fmt: skip


@register(
    "transform", paper="2207.07061", survey=("A3.8", "B3.5", "B4", "E4"), when="runtime", restore=_restored, alone=True,
    measured=measured_tokens,
)  # fmt: skip
def exit_decoding(
    model: nn.Module,
    example: Any,
    data: Any,
    *,
    target: str | None = None,
    drop: float | None = None,
    threshold: float | None = None,
    measure: str = "state",
    at: tuple[int, ...] | None = None,
) -> ExitDecoding:
    """Let each token that a language model generates leave behind the first block after which it seems sure.

    :: leave at the first block l with s_l < T, s_l = 1 - cos(x_l, x_{l+1}) or 1 - (p_(1) - p_(2));  x_j = x_l for j > l

    The prompt is read with all blocks. Of a token that has left, later blocks compute keys and values from the state
    that it left with, so that the tokens to come find it. ``measure="state"`` costs nothing; ``"softmax"`` runs the
    output layer at each exit, and takes what it said if the token leaves. Exits are behind every block of the last
    quarter but the last (``state``) or behind the block at two thirds (``softmax``), or ``at`` the blocks with these
    numbers. The threshold is found on ``data``, tried with what leaves really gone: the least for a ``target`` such as
    ``"flops 20%"`` of a token behind the prompt; or the highest with which the next token stays the dense model's for
    all but the share ``drop`` (0.1) of the tokens; or it is given.

    Choose it for models that were trained with exits, and to see what one that was not would lose.

    Beware: a model that was not trained for it is sure of little before its last blocks, and its output layer does not
    read their states: the loss is measured and told. In a small model the output layer costs as much as many blocks, so
    softmax pays only if most tokens leave. Beam search is refused.

    >>> from secateur.registry import get
    >>> get("transform", "exit-decoding").knobs["measure"]
    'state'

    Source: Schuster et al., CALM, arXiv 2207.07061, from descriptions of the paper: state copying and two of its
    measures, without training of the exits, with one threshold in place of one that falls over the text, and chosen by
    the share of equal tokens in place of its test for consistency of whole texts.
    """
    ways = {k: v for k, v in {"target": target, "drop": drop, "threshold": threshold}.items() if v is not None}
    if len(ways) > 1:
        raise RecipeError(f"the threshold is chosen by one of target, drop, threshold: {' and '.join(ways)} are given")
    if measure not in MEASURES:
        raise RecipeError(f"measure is {measure!r}: it is one of {', '.join(MEASURES)}")
    if threshold is not None and not 0 < threshold <= 2:
        raise RecipeError(
            f"threshold is {threshold}: no doubt is below 0, so no token would leave, and none is above 2, so every "
            "one would leave at the first exit"
        )
    share = share_of(drop)
    blocks, _ = blocks_of(model, example)
    places = _places(len(blocks), measure, at)
    windows, ids = windows_of(data), ids_of(example)
    tail = tail_of(model, blocks, ids) if measure == "softmax" else ()
    made = ExitDecoding(
        model, blocks, {"method": "exit-decoding", "measure": measure, "target": target, "drop": share, "notes": []},
        places, measure, tail,
    )  # fmt: skip
    with evaluating(model), torch.no_grad():
        before = step_flops(model, ids).total
        costs = [_cost(made, ids, n) for n in range(len(places) + 1)]
        limit = None if target is None else _limit(target, before)
        if limit is not None and min(costs) > limit:
            raise RecipeError(
                f"target '{target}' is out of reach: a token that leaves at the first exit has taken "
                f"{100 * costs[0] / before:.0f} % of the FLOPs: give an earlier one by at="
            )
        dense = [continued(model, window) for window in windows]
        points = _points(made, windows, costs)
        if threshold is None:
            threshold = _search(made, points, windows, dense, costs, limit, share)
        made.threshold = threshold
        quality, after, left = _tried(made, windows, dense, costs)
    made.record |= {
        "threshold": threshold, "left": left, "quality": quality, "costs": costs, "notes": _note(left, threshold),
        "flops": {"before": before, "after": after},
    }  # fmt: skip
    return made


def _places(blocks: int, measure: str, at: tuple[int, ...] | None) -> tuple[int, ...]:
    if at is None:
        chosen = range(3 * blocks // 4 - 1, blocks - 1) if measure == "state" else [2 * blocks // 3 - 1]
        return tuple(k for k in chosen if 0 <= k < blocks - 1) or (0,)
    at = numbers(at)
    if wrong := [k for k in at if not 0 <= k < blocks - 1]:
        raise RecipeError(f"at names block {wrong[0]}: a token can leave behind blocks 0 to {blocks - 2} of this model")
    if not at:
        raise RecipeError("at is empty: name the blocks behind which a token may leave")
    return tuple(sorted(set(at)))


def _limit(target: str, before: float) -> float:
    wanted = Target.parse(target)
    if wanted.quantity != "flops":
        raise RecipeError(f"exit-decoding takes a target in FLOPs, such as 'flops 20%', not in {wanted.quantity}")
    return wanted.remaining(before)


def _cost(made: ExitDecoding, ids: Tensor, place: int) -> int:
    """Operations of a token behind the prompt that leaves at an exit; of one that goes through at the last number."""
    made.decide = lambda n, doubt: torch.full_like(doubt, n == place, dtype=torch.bool)
    try:
        return step_flops(made, ids).total
    finally:
        made.decide = made._below


def _points(made: ExitDecoding, windows: Sequence[Tensor], costs: Sequence[float]) -> list[Point]:
    """Thresholds that make a difference, by the doubts of tokens that all go through."""
    doubts: list[list[Tensor]] = [[] for _ in made.places]

    def listen(place: int, doubt: Tensor) -> Tensor:
        doubts[place].append(doubt)
        return torch.zeros_like(doubt, dtype=torch.bool)

    made.decide = listen
    try:
        for ids in windows:
            continued(made, ids)
    finally:
        made.decide = made._below
    doubt = torch.stack([torch.cat(d) for d in doubts], 1).cpu()
    return sweep(doubt, torch.ones(len(doubt), len(costs), dtype=torch.bool), costs)


def _search(
    made: ExitDecoding, points: Sequence[Point], windows: Sequence[Tensor], dense: Sequence[Tensor],
    costs: Sequence[float], limit: float | None, share: float,
) -> float:  # fmt: skip
    """Halve the thresholds, each tried with what leaves really gone."""
    low, high = 0, len(points) - 1
    for _ in range(_TRIES):
        if low >= high:
            break
        middle = (low + high) // 2 if limit is not None else (low + high + 1) // 2
        made.threshold = points[middle].threshold
        quality, cost, _ = _tried(made, windows, dense, costs)
        if limit is not None:
            low, high = (low, middle) if cost <= limit else (middle + 1, high)
        else:
            low, high = (middle, high) if quality["agreement"] >= 1 - share else (low, middle - 1)
    return points[high if limit is not None else low].threshold


def _tried(
    made: ExitDecoding, windows: Sequence[Tensor], dense: Sequence[Tensor], costs: Sequence[float]
) -> tuple[dict[str, float], float, list[float]]:
    """What is lost, the mean cost of a token, and how many leave where."""
    seen: list[Tensor] = []
    made.left = seen
    try:
        quality = quality_of(made, windows, dense)
    finally:
        made.left = None
    where = torch.cat([w.flatten() for w in seen])
    left = (torch.bincount(where, minlength=len(costs)).double() / len(where)).tolist()
    return quality, sum(a * c for a, c in zip(left, costs, strict=True)), left


def _note(left: Sequence[float], threshold: float) -> list[str]:
    """A sentence for a threshold at which nothing leaves, or everything at the first exit."""
    if left[-1] == 1:
        return [f"no token leaves: at threshold {threshold:.3g} none of the data is sure before the end"]
    if left[0] == 1:
        return ["every token leaves at the first exit: a model without the later blocks does the same (shortgpt)"]
    return []
