"""Methods by which tokens leave a model that runs, without training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..errors import ModelError, RecipeError
from ..layers import evaluating
from ..measure.flops import flops
from ..registry import register
from ..structured import Target
from .act import Act, Fuse, Merge
from .base import numbers
from .gates import Pace, TokenGates
from .structure import Call, Structure, call_of, find

#: How much leaves, of more and more.
Level = TypeVar("Level")
_WHERE = ("A3.6", "B3.5", "B4", "E2")


def _restored(model: nn.Module, saved: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> TokenGates:
    made, found = saved["record"], saved["saved"]
    numbers = {name: int(found[name]) for name in ("tokens", "protected", "width")}
    structure = Structure(tuple(map(str, found["sites"])), **numbers)
    paths = dict(model.named_modules())
    if missing := [name for name in structure.sites if name not in paths]:
        raise ModelError(f"runtime.json does not fit the model: it has no {missing[0]}")
    acts: dict[str, Act] = {
        "tome": Merge(bool(made.get("proportional", True))), "evit": Fuse(bool(made.get("fuse", True))),
        "power-bert": Fuse(fuse=False, every=True),
    }  # fmt: skip
    at, r, keep = made["at"], made["r"], made["keep"]
    pace = Pace(
        None if r is None else int(r),
        None if keep is None else float(keep),
        None if at is None else tuple(map(int, at)),
    )
    return TokenGates(model, structure, acts[made["method"]], pace, made)


@register("transform", paper="2210.09461", survey=_WHERE, when="runtime", restore=_restored)
def tome(
    model: nn.Module,
    example: Any,
    *,
    r: int | None = None,
    keep: float | None = None,
    target: str | None = None,
    at: tuple[int, ...] | None = None,
    proportional: bool = True,
) -> TokenGates:
    """Merge the most similar tokens in every block of a vision transformer or an encoder while it runs.

    :: for the r even tokens with the largest max_j cos(k_i, k_j): x_j <- (m_j x_j + m_i x_i) / (m_j + m_i)

    Between the attention and the feed-forward part of each block ``r`` tokens leave, or all but the fraction ``keep``
    of them; at most half can. ``at`` names the attentions, from 0 on, behind which they do, in place of all. With a
    ``target`` such as ``"flops 40%"`` the smallest ``r`` is taken that reaches it. A token counts in attention, and in
    a mean over tokens, as many times as tokens went into it (``proportional``).

    Choose it to speed up a vision transformer at once: no training, no data, and nothing is lost from sight. Many
    tokens at one early place (``at=(0,)``) are quicker than few at every place: the decision costs time too.

    Beware: models trained as masked autoencoders want ``proportional=False``, says the paper. What does not call
    scaled_dot_product_attention, or masks it, is refused.

    >>> from secateur.tasks.nets import VisionTransformer
    >>> fast = tome(VisionTransformer(16, 2), torch.zeros(1, 1, 28, 28), r=10)
    >>> fast.run(torch.zeros(5, 1, 28, 28))[1]
    [39, 29]

    Source: Bolya et al., ToMe, arXiv 2210.09461, section 3, and the official code, whose order of tokens it keeps;
    means over tokens as in its code for masked autoencoders. Attention stays weighted by size there also.
    """
    act = Merge(proportional)
    record = {"method": "tome", "proportional": proportional}
    given = one_of(r=r, keep=keep, target=target)
    call = call_of(example)
    structure = find(model, call)
    most = act.most(structure.tokens, structure.protected)

    places = None if at is None else places_in(at, len(structure.sites))

    def level(k: int) -> Pace:
        return Pace(r=k, at=places)

    pace = Pace(r, keep, places) if target is None else None
    return _made(model, call, structure, act, pace, given, record, level, range(most + 1))


@register("transform", paper="2202.07800", survey=_WHERE, when="runtime", restore=_restored)
def evit(
    model: nn.Module,
    example: Any,
    *,
    keep: float | None = None,
    target: str | None = None,
    at: tuple[int, ...] | None = None,
    fuse: bool = True,
) -> TokenGates:
    """Keep the tokens that get the most attention at a few places of a vision transformer, and fuse the rest into one.

    :: s = 1/H sum_h a_class,h;  the round(keep n) largest stay;  x_fused = sum over the others of s_i x_i

    Gates are at a quarter, half and three quarters of the depth, or ``at`` the attentions with these numbers. With a
    ``target`` such as ``"flops 40%"`` the largest ``keep`` is taken that reaches it.

    Choose it for models with a class token: what that does not look at goes. No training, no data.

    Beware: the paper trains with it, and without training much is lost where much goes. Without a class token the
    attention of all tokens counts, and tome is the better choice.

    >>> from secateur.tasks.nets import VisionTransformer
    >>> fast = evit(VisionTransformer(16, 4), torch.zeros(1, 1, 28, 28), keep=0.5)
    >>> fast.run(torch.zeros(5, 1, 28, 28))[1]  # 25 of 49 and a fused one, 13 of 26 and one, 7 of 14 and one
    [49, 26, 14, 8]

    Source: Liang et al., EViT, arXiv 2202.07800, section 3.2 and the official code, without its training. Exactly
    round(keep n) tokens stay, where its code rounds up.
    """
    act = Fuse(fuse)
    record = {"method": "evit", "fuse": fuse}
    given = one_of(keep=keep, target=target)
    call = call_of(example)
    structure = find(model, call)
    depth, free = len(structure.sites), structure.tokens - structure.protected
    places = tuple(sorted({depth * k // 4 for k in (1, 2, 3)})) if at is None else places_in(at, depth)

    def level(k: int) -> Pace:
        return Pace(keep=(free - k) / free, at=places)

    pace = Pace(None, keep, places) if target is None else None
    return _made(model, call, structure, act, pace, given, record, level, range(free))


@register("transform", name="power-bert", paper="2001.08950", survey=_WHERE, when="runtime", restore=_restored)
def power_bert(
    model: nn.Module,
    example: Any,
    *,
    keep: float | None = None,
    target: str | None = None,
    at: tuple[int, ...] | None = None,
) -> TokenGates:
    """Drop the tokens that get the least attention from all others, block after block of an encoder.

    :: s_i = 1/(H n) sum_h sum_(j not i) a_h,ji;  the round(keep n) largest of each input stay

    A gate is behind every attention, or behind those that ``at`` names. With a ``target`` such as ``"flops 30%"`` the
    largest ``keep`` is taken that reaches it on the example. Padding does not count: each input keeps its own number,
    and batches are as wide as the widest. What the model computes of its attention mask behind a gate (the mean of a
    sentence embedding) is over the tokens that remain.

    Choose it for encoders of texts that are long: BERT, sentence embeddings. No training, no data.

    Beware: the paper learns how many stay in each block, and trains with it; here it is the same fraction everywhere.
    Inputs of a few tokens have none to spare.

    >>> from secateur.tasks.nets import TextTransformer
    >>> fast = power_bert(TextTransformer(30, 16, 2, 16, 3, causal=False).eval(), torch.arange(16)[None], keep=0.75)
    >>> fast.run(torch.arange(16)[None])[1]
    [12, 9, 7]

    Source: Goyal et al., PoWER-BERT, arXiv 2001.08950, section 3 and the official code (a token's own attention is left
    out), without its training and its learned retention.
    """
    act, record = Fuse(fuse=False, every=True), {"method": "power-bert"}
    given = one_of(keep=keep, target=target)
    call = call_of(example)
    structure = find(model, call)
    places = None if at is None else places_in(at, len(structure.sites))
    free = structure.tokens - structure.protected

    def level(k: int) -> Pace:
        return Pace(keep=(free - k) / free, at=places)

    pace = Pace(None, keep, places) if target is None else None
    return _made(model, call, structure, act, pace, given, record, level, range(free))


def places_in(at: Sequence[int], depth: int) -> tuple[int, ...]:
    """Numbers of attentions, checked."""
    at = numbers(at)
    if wrong := [k for k in at if not 0 <= k < depth]:
        raise RecipeError(f"at names attention {wrong[0]}, and the model has {depth} of them, from 0 on")
    if not at:
        raise RecipeError("at names no attention: leave it out, or give the numbers of some")
    return tuple(at)


def one_of(**given: Any) -> dict[str, Any]:
    """The one of these that is given."""
    found = {name: value for name, value in given.items() if value is not None}
    if len(found) != 1:
        names = ", ".join(given)
        raise RecipeError(f"say how many tokens leave by one of {names}; given: {', '.join(found) or 'none'}")
    return found


def _made(
    model: nn.Module,
    call: Call,
    structure: Structure,
    act: Act,
    pace: Pace | None,
    given: dict[str, Any],
    record: dict[str, Any],
    level: Callable[[int], Pace],
    levels: range,
) -> TokenGates:
    """The gated model, checked on the example, with what it costs before and after in its record."""
    check_output(model, call, structure, TokenGates(model, structure, act, pace or level(levels[-1]), {}))
    before = flops(model, *call[0], **call[1]).total

    def cost(at: Pace) -> int:
        return flops(TokenGates(model, structure, act, at, {}), *call[0], **call[1]).total

    if pace is None:
        pace = reaching(Target.parse(given["target"]), before, cost, level, levels, record["method"])
    made = TokenGates(model, structure, act, pace, {})
    with evaluating(made), torch.no_grad():
        tokens = made.run(*call[0], **call[1])[1]
    made.record = {
        **record, "r": pace.r, "keep": pace.keep, "at": None if pace.at is None else list(pace.at),
        "tokens": [structure.tokens, *tokens], "protected": structure.protected,
        "flops": {"before": before, "after": cost(pace)},
    }  # fmt: skip
    return made


def reaching(
    target: Target, before: int, cost: Callable[[Level], int], level: Callable[[int], Level], levels: range, method: str
) -> Level:
    """The first level at which what is executed is within the target."""
    if target.quantity != "flops":
        raise RecipeError(f"{method} takes a target in FLOPs, such as 'flops 40%', not in {target.quantity}")
    limit = target.remaining(before)
    low, high = 0, len(levels) - 1
    if (least := cost(level(levels[high]))) > limit:
        raise RecipeError(
            f"target '{target}' is out of reach: {method} cannot leave less than {100 * least / before:.0f} %"
        )
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if cost(level(levels[middle])) <= limit else (middle + 1, high)
    return level(levels[low])


def check_output(model: nn.Module, call: Call, structure: Structure, gated: nn.Module) -> None:
    """Refuse a model that does not run on fewer tokens, or whose answer has an entry for each token."""
    kind = type(model).__name__
    with evaluating(model, gated), torch.no_grad():
        dense = model(*call[0], **call[1])
        try:
            out = gated(*call[0], **call[1])
        except (RuntimeError, IndexError, TypeError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ModelError(
                f"{kind} does not run on fewer than its {structure.tokens} tokens, on which something counts: {reason}"
            ) from None
    if _shapes(dense) != _shapes(out):
        raise ModelError(
            f"the answer of {kind} has an entry for each token, and tokens leave: give a model that answers once for "
            "each input, such as a classifier"
        )


def _shapes(out: Any) -> list[torch.Size]:
    return [x.shape for x in tree_leaves(dict(out) if isinstance(out, Mapping) else out) if isinstance(x, Tensor)]
