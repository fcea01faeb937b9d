"""Allocations that look at shapes alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase

from ..errors import RecipeError
from ..registry import register
from .base import LayerFacts


@register("allocation")
def uniform(layers: Mapping[str, LayerFacts], *, sparsity: float) -> dict[str, float]:
    """The same fraction in every layer.

    Choose it for language models at up to about 60 %, and whenever nothing better is known.

    Source: the default of Wanda and SparseGPT.
    """
    return dict.fromkeys(layers, 1.0 - sparsity)


@register("allocation", paper="1707.04780")
def er(layers: Mapping[str, LayerFacts], *, sparsity: float) -> dict[str, float]:
    """Erdos-Renyi: the density of a layer is proportional to (o + i) / (o i), kernel sizes apart.

    :: keep_l = min(1, e (o + i) / (o i))

    Choose it for sparse training from scratch of networks of linear layers.

    Source: Mocanu et al., SET, arXiv 1707.04780, equation 3.
    """
    return _proportional(layers, sparsity, lambda f: 1 / _channels(f)[0] + 1 / _channels(f)[1])


@register("allocation", paper="1911.11134")
def erk(layers: Mapping[str, LayerFacts], *, sparsity: float) -> dict[str, float]:
    """Erdos-Renyi-Kernel: as er, with the sizes of the kernel in sum and product.

    :: keep_l = min(1, e (o + i + kh + kw) / (o i kh kw))

    Choose it for sparse training of convolutional networks.

    Beware: small layers stay dense, so FLOPs fall less than parameters.

    Source: Evci et al., RigL, arXiv 1911.11134, section 3 (1).
    """
    return _proportional(layers, sparsity, lambda f: sum(f.dims or f.shape) / f.numel)


def _channels(facts: LayerFacts) -> tuple[int, ...]:
    """Input and output sizes without those of the kernel."""
    return (facts.dims or facts.shape)[:2]


def _proportional(
    layers: Mapping[str, LayerFacts], sparsity: float, raw: Callable[[LayerFacts], float]
) -> dict[str, float]:
    """Keeps proportional to ``raw``, capped at 1; what the capped layers cannot take, the others do."""
    budget = (1.0 - sparsity) * sum(f.numel for f in layers.values())
    dense: set[str] = set()
    while True:
        free = {n: f for n, f in layers.items() if n not in dense}
        left = budget - sum(layers[n].numel for n in dense)
        weight = sum(raw(f) * f.numel for f in free.values())
        scale = left / weight if weight else 0.0
        full = {n for n, f in free.items() if scale * raw(f) >= 1.0}
        if not full:
            break
        dense |= full
    return {n: 1.0 if n in dense else scale * raw(f) for n, f in layers.items()}


@register("allocation")
def explicit(
    layers: Mapping[str, LayerFacts], *, sparsity: float, table: Mapping[str, float] | None = None
) -> dict[str, float]:
    """A sparsity for each layer (or family of units) by name or glob; what no glob names gets the recipe's sparsity.

    Choose it for a profile that was searched, measured or published elsewhere.

    Beware: the mean sparsity is what the table makes it.

    Source: none; given by the user.
    """
    found = tabled({name: [name] for name in layers}, table or {}, sparsity)
    return {name: 1.0 - value for name, value in found.items()}


def tabled(names: Mapping[str, Sequence[str]], table: Mapping[str, float], default: float) -> dict[str, float]:
    """What a table says of each name and of what else it is called: an exact name first, then the last glob that fits.

    Raises:
        RecipeError: a glob fits nothing, or a value is no sparsity.

    >>> tabled({"a.0": ["a.0"], "0": ["0"]}, {"0": 0.9, "a.*": 0.2}, 0.5)
    {'a.0': 0.2, '0': 0.9}
    """
    found: dict[str, float] = {}
    unused = set(table)
    for pattern, value in table.items():
        if not 0.0 <= float(value) < 1.0:
            raise RecipeError(f"allocation asks for sparsity {value} in '{pattern}'; give a fraction in [0, 1)")
    for name, called in names.items():
        fits = [p for p in table if any(fnmatchcase(n, p) or fnmatchcase(n, f"*.{p}") for n in called)]
        unused -= set(fits) | {name}
        chosen = name if name in table else fits[-1] if fits else None
        found[name] = default if chosen is None else float(table[chosen])
    if unused:
        raise RecipeError(
            f"allocation names {sorted(unused)}, which no layer matches ('secateur plan MODEL' lists them)"
        )
    return found
