"""Models of several towers: how sparse each layer of each tower may be."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DataError, NumericalError, RecipeError
from ..layers import Layer, evaluating, find_layers
from ..prune import prune
from ..pruned import Pruned
from ..recipe import Recipe
from ..registry import register
from ..select import keep_count

Loss = Callable[[nn.Module, Any], Tensor]


@register("transform", paper="2310.02998", survey=("A1", "B3.5", "C1.3", "E6"), when="after", makes="masks")
def ecoflap(
    model: nn.Module,
    data: Sequence[Any],
    loss: Loss,
    *,
    sparsity: float = 0.5,
    most: float | None = None,
    method: str = "wanda",
    eps: float = 1e-3,
    draws: int = 1,
    only: Sequence[str] = ("*",),
    skip: Sequence[str] = (),
    seed: int = 0,
) -> Pruned:
    """Prune layer by layer, each to a sparsity by how much the loss feels the layer: for models of several towers.

    :: s_l = mean over batches of |L(W_l + eps z) - L(W_l - eps z)| / (2 eps),  z ~ N(0, 1);
       each layer keeps 1 - most of its weights; the rest of the budget goes by s_l, at most all of a layer

    The first, coarse step needs forward passes alone, and only layers' shares come of it; which weights stay is decided
    by ``method`` within each layer.

    Choose it for vision-language models, whose towers differ in how much they can lose.

    Beware: one draw of noise a layer and batch is a rough estimate; more ``draws`` cost as many passes more. Two passes
    for each layer, batch and draw.

    Source: Sung et al., ECoFLaP, arXiv 2310.02998, section 3, and the official code (its score "olmezo-gradient" summed
    over a layer). ``most`` is ``sparsity`` + 0.1 unless it is given.
    """
    layers = find_layers(model, tuple(only), tuple(skip))[0]
    scores = layer_scores(model, layers, data, loss, eps=eps, draws=draws, seed=seed)
    table = ratios(scores, {x.name: x.numel for x in layers}, sparsity, sparsity + 0.1 if most is None else most)
    made = prune(
        model, method, sparsity=sparsity, allocation="explicit", only=tuple(x.name for x in layers), data=list(data),
        seed=seed, loss=loss if Recipe.of(method).needs_loss else None, knobs={"allocation": {"table": table}},
    )  # fmt: skip
    assert isinstance(made, Pruned)
    return made


def layer_scores(
    model: nn.Module, layers: Sequence[Layer], data: Sequence[Any], loss: Loss, *, eps: float, draws: int, seed: int
) -> dict[str, float]:
    """How much the loss changes along a random direction of each layer, by two forward passes.

    Raises:
        DataError: no batches.
        NumericalError: the loss is not finite.
    """
    if not len(data):
        raise DataError("layers are compared on batches: give at least one")
    if not eps > 0 or draws < 1:
        raise RecipeError(f"eps is a step above 0, and draws at least 1: not {eps:g}, {draws}")
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, float] = {}
    with evaluating(model), torch.no_grad():
        for layer in layers:
            stored = layer.stored
            kept, total = stored.clone(), 0.0
            try:
                for batch in data:
                    for _ in range(draws):
                        z = torch.randn(stored.shape, generator=generator).to(stored)
                        sides = []
                        for sign in (1.0, -1.0):
                            stored.copy_(kept + sign * eps * z)
                            sides.append(float(loss(model, batch)))
                        total += abs(sides[0] - sides[1]) / (2 * eps)
            finally:  # the model stays as it was, also where the loss fails
                stored.copy_(kept)
            found[layer.name] = total / (len(data) * draws)
    if bad := [n for n, v in found.items() if not v < float("inf")]:
        raise NumericalError(f"the loss is not finite near the weights of {bad[0]}")
    return found


def ratios(scores: Mapping[str, float], sizes: Mapping[str, int], sparsity: float, most: float) -> dict[str, float]:
    """Sparsity of each layer: none above ``most``; the weights that stay beyond that go where scores are high.

    The sum of what stays is that of a uniform sparsity, to a weight.

    Raises:
        RecipeError: ``most`` is below the sparsity or not below 1.

    >>> ratios({"a": 3.0, "b": 1.0}, {"a": 100, "b": 100}, 0.5, 0.6)
    {'a': 0.45, 'b': 0.55}
    """
    if not sparsity <= most < 1:
        raise RecipeError(
            f"most is the highest sparsity of a layer, from the model's {sparsity:g} up to 1: not {most:g}"
        )
    budget = keep_count(1 - sparsity, sum(sizes.values()))
    stay = {n: (1 - most) * sizes[n] for n in sizes}
    free = dict(scores) if sum(scores.values()) else {n: float(sizes[n]) for n in sizes}
    while (left := budget - sum(stay.values())) > 1e-6 * budget:
        total = sum(free.values())
        if not total:  # what is left over where scores are zero
            free = {n: sizes[n] - stay[n] for n in sizes if stay[n] < sizes[n]}
            continue
        for n, s in list(free.items()):
            stay[n] = min(float(sizes[n]), stay[n] + left * s / total)
            if stay[n] >= sizes[n] or not s:
                del free[n]
    return {n: round(min(most, max(0.0, 1 - stay[n] / sizes[n])), 12) for n in sizes}
