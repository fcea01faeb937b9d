"""Blocks of a language model that a sequence is continued without, because they did little to its prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..errors import ModelError, RecipeError
from ..layers import evaluating
from ..registry import get, register
from ..select import select
from ..structured import Target
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
    windows_of,
)


class _Plan:
    """Which blocks each sequence of a batch runs."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self.doubts: list[Tensor] = []
        self.runs: Tensor | None = None  # (sequences, blocks)
        self.narrowed: set[int] = set()

    def decide(self, skip: int) -> None:
        """The first block always runs: the length of its cache is that of the sequence."""
        score = torch.stack(self.doubts, 1)[:, 1:]
        first = torch.ones(len(score), 1, dtype=torch.bool, device=score.device)
        self.runs = torch.cat([first, select(score, self.blocks - 1 - skip)], 1)


class _Rows(Through):
    """The cache of the sequences that run a block; that of the others goes the first time."""

    def __init__(self, cache: Any, rows: Tensor, plan: _Plan) -> None:
        super().__init__(cache)
        self.rows, self.plan = rows, plan

    def update(self, key: Tensor, value: Tensor, layer: int, *args: Any, **kwargs: Any) -> Any:
        """Add keys and values of these sequences."""
        if layer not in self.plan.narrowed:
            self.cache.layers[layer].batch_select_indices(self.rows)
            self.plan.narrowed.add(layer)
        return self.cache.update(key, value, layer, *args, **kwargs)


class SkipDecoding(Decoder):
    """A language model that reads a prompt with all blocks, and continues each sequence without some.

    Attributes:
        skip: how many blocks each sequence leaves out.
        model, blocks, record: see `Decoder`.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[str], record: Mapping[str, Any], skip: int) -> None:
        super().__init__(model, blocks, record)
        self.skip = skip
        self.plans: WeakKeyDictionary[Any, _Plan] = WeakKeyDictionary()

    def runs(self, cache: Any) -> Tensor:
        """Which blocks each sequence of a cache runs, ``(sequences, blocks)``."""
        found = self.plans[cache].runs
        assert found is not None
        return found

    def start(self) -> None:
        self.plan: _Plan | None = None
        self.reads = True

    def forwards(self) -> dict[str, Callable[..., Any]]:
        return {name: self._block(k) for k, name in enumerate(self.blocks)}

    def _block(self, k: int) -> Callable[..., Tensor]:
        def forward(own: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
            name, cache = cache_of(args, kwargs)
            x = hidden((args, kwargs))
            assert x is not None
            if k == 0 and cache is not None:
                self.reads = cache.get_seq_length() == 0
                if self.reads:
                    self.plans[cache] = _Plan(len(self.blocks))
                self.plan = self.plans.get(cache)  # None for a cache that the dense model filled
            if self.plan is None:
                whole: Tensor = own(*args, **kwargs)
                return whole
            if self.reads:
                return self._read(k, x, own(*args, **kwargs))
            return self._continue(k, x, own, args, kwargs, name)

        return forward

    def _read(self, k: int, x: Tensor, out: Tensor) -> Tensor:
        assert self.plan is not None
        doubt = get("criterion", "state-saturation")({"state_before": x, "state_after": out})
        if self.mask is not None and self.mask.shape == doubt.shape:
            weight = self.mask.to(doubt)
            self.plan.doubts.append((doubt * weight).sum(1) / weight.sum(1).clamp_min(1))
        else:
            self.plan.doubts.append(doubt.mean(1))
        if k == len(self.blocks) - 1:
            self.plan.decide(self.skip)
        return out

    def _continue(self, k: int, x: Tensor, own: Callable[..., Any], args: Any, kwargs: Any, name: str) -> Tensor:
        assert self.plan is not None and self.plan.runs is not None
        if len(self.plan.runs) != len(x):
            raise ModelError(
                f"the prompt had {len(self.plan.runs)} sequences and its continuation has {len(x)}: each sequence has "
                "blocks of its own, so a batch stays as it is"
            )
        runs = self.plan.runs[:, k]
        if not bool(runs.any()):
            return x
        if bool(runs.all()):
            whole: Tensor = own(*args, **kwargs)
            return whole
        rows, count = runs.nonzero()[:, 0], inputs_in((args, kwargs))
        given = rows_of({n: v for n, v in kwargs.items() if n != name}, count, rows)
        part = own(*rows_of(args, count, rows), **given, **{name: _Rows(kwargs[name], rows, self.plan)})
        return x.index_copy(0, rows, part)

    def saved(self) -> dict[str, Any]:
        return {"blocks": self.blocks, "skip": self.skip}

    def told(self) -> str:
        """What was made, in two lines."""
        text = f"skip-decoding: each sequence is continued without {self.skip} of {len(self.blocks)} blocks"
        return "\n".join([text, self.quality(), *self.record["notes"]])


def _restored(model: nn.Module, saved: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> SkipDecoding:
    found = saved["saved"]
    return SkipDecoding(model, list(map(str, found["blocks"])), saved["record"], int(found["skip"]))


@register(
    "transform", paper="2501.02336", survey=("A3.2", "A3.8", "B3.5", "B4", "E4"), when="runtime", restore=_restored,
    alone=True, measured=measured_tokens,
)  # fmt: skip
def skip_decoding(
    model: nn.Module,
    example: Any,
    data: Any,
    *,
    target: str | None = None,
    skip: int | None = None,
    drop: float | None = None,
) -> SkipDecoding:
    """Continue each sequence without the blocks of a language model that turned the hidden state of its prompt least.

    :: s_l = mean over the prompt's tokens of 1 - cos(x_l, x_{l+1});  the blocks with the smallest s_l are left out

    The prompt is read with all blocks. Then every sequence leaves out as many blocks, its own ones, for good: they keep
    no cache of it. How many is given (``skip``), is the least for a ``target`` such as ``"flops 20%"`` of a token
    behind the prompt, or the most with which the next token stays the dense model's for all but the share ``drop``
    (0.1) of the tokens of ``data``. Half of each window is taken for the prompt.

    Choose it for generation behind long prompts where a measured loss is acceptable: no training, and one decision for
    a sequence.

    Beware: it costs quality from the first block on, which is measured and told: look at the perplexity. Where all
    prompts choose the same blocks, shortgpt takes them out for good and makes the model smaller too. The first block
    always runs. Beam search is refused.

    >>> from secateur.registry import get
    >>> sorted(get("transform", "skip-decoding").knobs)
    ['drop', 'skip', 'target']

    Source: He et al., AdaSkip, arXiv 2501.02336, for the cosine between input and output of this prompt as the reason
    to skip, from the paper's description; it skips attention and feed-forward parts by themselves, skips in the prompt
    also, and scales what is left. Whole blocks, exact counts, and what becomes of the cache are ours.
    """
    ways = {k: v for k, v in {"target": target, "skip": skip, "drop": drop}.items() if v is not None}
    if len(ways) > 1:
        raise RecipeError(f"how much is skipped is said by one of target, skip, drop: {' and '.join(ways)} are given")
    blocks, _ = blocks_of(model, example)
    most = len(blocks) - 2
    if skip is not None and not 0 <= skip <= most:
        raise RecipeError(
            f"skip is {skip}: of {len(blocks)} blocks 0 to {most} can be left out, as the first and one more run"
        )
    share = share_of(drop)
    windows = windows_of(data)
    work = _costs(model, blocks, ids_of(example))
    made = SkipDecoding(model, blocks, {"method": "skip-decoding", "target": target, "drop": share, "notes": []}, 0)
    with evaluating(model), torch.no_grad():
        dense = [continued(model, ids) for ids in windows]
        if target is not None:
            skip = _within(target, work, len(blocks))
        elif skip is None:
            low, high = 0, most
            while low < high:
                made.skip = (low + high + 1) // 2
                low, high = (
                    (made.skip, high)
                    if quality_of(made, windows, dense)["agreement"] >= 1 - share
                    else (low, made.skip - 1)
                )
            skip = low
        made.skip = skip
        found = quality_of(made, windows, dense)
    after = work[0] - skip * work[1]
    made.record |= {"skip": skip, "quality": found, "flops": {"before": work[0], "after": after}}
    if not skip:
        made.record["notes"] = [
            f"no block is left out: without any of them, more than {100 * share:g} % of the next tokens are others"
        ]
    return made


def _costs(model: nn.Module, blocks: Sequence[str], ids: Tensor) -> tuple[int, int]:
    """Operations of a token behind the prompt, and of the least of the blocks in it that may be left out."""
    with evaluating(model), torch.no_grad():
        work = step_flops(model, ids)
    return work.total, min(work.by_module[f"model.{name}"] for name in blocks[1:])


def _within(target: str, work: tuple[int, int], blocks: int) -> int:
    """The least number of blocks without which a token is within a target."""
    wanted = Target.parse(target)
    if wanted.quantity != "flops":
        raise RecipeError(f"skip-decoding takes a target in FLOPs, such as 'flops 20%', not in {wanted.quantity}")
    total, one = work
    for skip in range(blocks - 1):
        if total - skip * one <= wanted.remaining(total):
            return skip
    least = total - (blocks - 2) * one
    raise RecipeError(
        f"target '{target}' is out of reach: skip-decoding cannot leave less than {100 * least / total:.0f} %"
    )
