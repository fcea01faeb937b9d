"""Granularities: a matrix is cut into pools of units of elements, and put together again."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..errors import RecipeError, UnknownName
from ..registry import get, parts, register
from ..select import keep_count


@dataclass(frozen=True)
class Granularity:
    """How a weight matrix ``(o, i)`` is cut.

    Attributes:
        name: canonical text, e.g. ``"2:4"``; `parse` reads it back.
        pool_shape: ``(o, i) -> (pools, units, elements)``; raises `RecipeError` when it does not divide.
        split: ``(o, i) -> (pools, units, elements)`` tensor.
        join: ``(pools, units, elements), (o, i) -> (o, i)``; the inverse of ``split``.
        keep: the fraction that the pattern itself fixes (N / M), or None.
        run: columns that a sequential solver must treat together (M of N:M, the width of a block).
        coupled: units are found in the whole model, across layers, and no matrix is cut by itself; then the
            value is which weights a unit's score sums: ``coupled``, ``output`` or ``input``; or
            ``depth`` or ``experts``, where units are whole blocks or experts.
    """

    name: str
    pool_shape: Callable[[int, int], tuple[int, int, int]]
    split: Callable[[Tensor], Tensor]
    join: Callable[[Tensor, tuple[int, int]], Tensor]
    keep: float | None = None
    run: int = 1
    coupled: str = ""

    @property
    def whole(self) -> bool:
        """Whether units are whole pieces of a model, blocks or experts, and not positions of tensors."""
        return self.coupled in ("depth", "experts")

    def check(self, shape: tuple[int, int], where: str = "the matrix") -> None:
        """Refuse a matrix that the pattern does not divide, naming it and the way out."""
        try:
            self.pool_shape(*shape)
        except RecipeError as error:
            if self.coupled:
                raise
            has = f"{shape[1]}" if self.keep is not None else f"{shape[0]} and {shape[1]}"
            raise RecipeError(f"{error}; {where} has {has} (skip it with --skip {where})") from None

    def pool(self, score_oi: Tensor) -> Tensor:
        """Scores of units: the sum of the scores of their elements, shape ``(pools, units)``."""
        return self.split(score_oi).sum(-1)

    def unpool(self, mask_pu: Tensor, shape: tuple[int, int]) -> Tensor:
        """The mask of a matrix of ``shape`` from the mask of its units."""
        elements = self.pool_shape(*shape)[2]
        return self.join(mask_pu[..., None].expand(*mask_pu.shape, elements), shape)

    def kept(self, shape: tuple[int, int], keep: float) -> int:
        """How many elements of a matrix of ``shape`` stay, exactly."""
        pools, units, elements = self.pool_shape(*shape)
        return pools * keep_count(keep, units) * elements


@register("granularity")
def element() -> Granularity:
    """Single weights; all weights of a layer compete.

    Choose it for the highest sparsity at a given loss, where a sparse kernel or storage is the aim.

    Beware: a dense matrix product gains nothing from it.

    Source: the finest granularity of the survey's unstructured branch.
    """
    return Granularity(
        "element",
        lambda o, i: (1, o * i, 1),
        lambda m: m.reshape(1, -1, 1),
        lambda b, shape: b.reshape(shape),
    )


@register("granularity", paper="2306.11695")
def row() -> Granularity:
    """Single weights; the weights of one output row compete, so every row keeps the same number.

    Choose it for one-shot pruning of language models by activation-aware scores.

    Source: Sun et al., Wanda, arXiv 2306.11695, section 3 (comparison group per output).
    """
    return Granularity(
        "row",
        lambda o, i: (o, i, 1),
        lambda m: m[..., None],
        lambda b, shape: b.reshape(shape),
    )


@register("granularity", name="nm", paper="2104.08378")
def nm(*, n: int = 2, m: int = 4) -> Granularity:
    """N of every M neighbors along the input stay (written ``2:4``, ``4:8``, any ``N:M``).

    Choose it for hardware with sparse matrix units (2:4 on NVIDIA Ampere and later).

    Beware: the input size must be a multiple of M.

    Source: Mishra et al., Accelerating sparse deep neural networks, arXiv 2104.08378.
    """
    if not (0 < n <= m):
        raise RecipeError(f"granularity '{n}:{m}' must keep between 1 and M of every M weights: write N:M with N <= M")

    def pool_shape(o: int, i: int) -> tuple[int, int, int]:
        if i % m:
            raise RecipeError(f"granularity '{n}:{m}' needs an input size that is a multiple of {m}")
        return (o * (i // m), m, 1)

    return Granularity(
        f"{n}:{m}",
        pool_shape,
        lambda x: x.reshape(-1, m, 1),
        lambda b, shape: b.reshape(shape),
        keep=n / m,
        run=m,
    )


@register("granularity", paper="2009.08065")
def block(*, r: int = 4, c: int = 4) -> Granularity:
    """Blocks of ``r`` by ``c`` weights stay or go together (written ``block(4,4)``).

    Choose it for block-sparse kernels.

    Beware: both sizes of the matrix must be multiples of the block's.

    Source: Li et al., block-structured pruning of Transformers, arXiv 2009.08065.
    """
    if r < 1 or c < 1:
        raise RecipeError(f"granularity 'block({r},{c})' needs sizes of at least 1")

    def pool_shape(o: int, i: int) -> tuple[int, int, int]:
        if o % r or i % c:
            raise RecipeError(
                f"granularity 'block({r},{c})' needs an output size that is a multiple of {r} "
                f"and an input size that is one of {c}"
            )
        return (1, (o // r) * (i // c), r * c)

    def split(x: Tensor) -> Tensor:
        o, i = x.shape
        return x.reshape(o // r, r, i // c, c).transpose(1, 2).reshape(1, -1, r * c)

    def join(b: Tensor, shape: tuple[int, int]) -> Tensor:
        o, i = shape
        return b.reshape(o // r, i // c, r, c).transpose(1, 2).reshape(o, i)

    return Granularity(f"block({r},{c})", pool_shape, split, join, run=c)


def _whole(name: str, scored: str) -> Granularity:
    """Units across layers, which the dependency analysis finds; a single matrix cannot be cut into them."""

    def refuse(*_: Any) -> Any:
        raise RecipeError(
            f"granularity '{name}' removes units of the whole model, and needs inputs of one forward pass to find "
            "them: give example= and target="
        )

    return Granularity(name, refuse, refuse, refuse, coupled=scored)


@register("granularity", paper="2301.12900", survey=("A3.7", "A3.1", "A3.3", "A3.5"))
def coupled() -> Granularity:
    """Everything that can only go together, found by dependency analysis; scored by all of its weights.

    Units are channels, neurons, heads with their key-value groups, head and hidden dimensions. The model becomes
    smaller, and a proof says that it computes what the masked one does.

    Choose it for speed and size anywhere: no kernel and no hardware needs to know.

    Beware: the hidden width and the channels of long skip connections are units too; keep them with ``skip``.

    Source: the problem and the group score of Fang et al., DepGraph, arXiv 2301.12900; the analysis is ours.
    """
    return _whole("coupled", "coupled")


@register("granularity", name="filter", paper="1608.08710", survey="A3.1")
def filters() -> Granularity:
    """The same units as ``coupled``, scored by the weights that compute them alone.

    Choose it to rank filters and neurons by themselves, as the first papers did.

    Source: Li et al., Pruning filters for efficient ConvNets, arXiv 1608.08710, section 3.1.
    """
    return _whole("filter", "output")


@register("granularity", name="channel", paper="1707.06168", survey="A3.1")
def channels() -> Granularity:
    """The same units as ``coupled``, scored by the weights that read them alone.

    Choose it for criteria that look at a layer's input, such as wanda and fluctuation: what a unit carries to the
    next layer is what its removal costs there.

    Source: He et al., Channel pruning, arXiv 1707.06168, and An et al., FLAP, arXiv 2312.11983, which rank the
    inputs of a layer.
    """
    return _whole("channel", "input")


@register("granularity", survey="A3.2")
def depth() -> Granularity:
    """Whole blocks of a model that repeats them: the layers of a transformer, the residual blocks of a ResNet.

    A block may go where nothing is missing once its parameters are zero, which is tried.

    Choose it for latency at small batch sizes, where a shorter model is faster than a narrower one.

    Beware: steps are coarse; a block is a large part of a small model.

    Source: the depth pruning of the survey; Men et al., ShortGPT, arXiv 2403.03853.
    """
    return _whole("depth", "depth")


@register("granularity", survey="A3.9")
def experts() -> Granularity:
    """Experts of the mixtures in a model, with their rows of the router; the same number in every mixture.

    Choose it for mixture-of-experts language models: the memory shrinks, a token's work stays.

    Beware: no less than the router chooses for a token may stay.

    Source: expert pruning; Lasby et al., REAP, arXiv 2510.13999.
    """
    return _whole("experts", "experts")


_NM = re.compile(r"^\s*(\d+)\s*:\s*(\d+)\s*$")
_CALL = re.compile(r"^\s*([a-z][a-z-]*)\s*(?:\(([\d\s,]*)\))?\s*$")


def parse(text: str) -> Granularity:
    """Read ``element``, ``row``, ``2:4`` or ``block(4,4)``.

    >>> parse("2:4").keep, parse("block(2, 8)").name
    (0.5, 'block(2,8)')
    """
    if found := _NM.match(str(text)):
        return nm(n=int(found[1]), m=int(found[2]))
    if not (found := _CALL.match(str(text))):
        raise UnknownName("granularity", str(text), [*parts("granularity"), "2:4", "block(4,4)"])
    part = get("granularity", found[1])
    numbers = [int(x) for x in (found[2] or "").split(",") if x.strip()]
    if len(numbers) > len(part.knobs):
        raise RecipeError(f"granularity '{text}' takes at most {len(part.knobs)} numbers")
    result: Granularity = part.function(**dict(zip(part.knobs, numbers, strict=False)))
    return result
