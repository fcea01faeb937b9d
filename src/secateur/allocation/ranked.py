"""Allocations by one ranking of all weights of the model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..registry import register
from .base import LayerFacts, Sketch


def _score(score: Tensor) -> Tensor:
    """The recipe's own criterion."""
    return score


@register("allocation", name="global", measure=_score)
def global_(layers: Mapping[str, LayerFacts], *, sparsity: float) -> dict[str, float]:
    """One ranking of all weights by the recipe's criterion: a layer keeps what ranks high enough.

    Choose it for criteria that compare across layers (saliency, Fisher) and for convolutional networks.

    Beware: scores must be on one scale; raw magnitude can empty a whole layer (layer collapse).

    Source: the global setting of the survey's layer-wise and global contrast.
    """
    return _rank_all(layers, _wanted(layers, sparsity))


@register("allocation", paper="2006.00896", measure=_score)
def raw(layers: Mapping[str, LayerFacts], *, sparsity: float) -> dict[str, float]:
    """One ranking of all units of the model by the scores as they are; of single weights the same as global.

    Choose it for structured pruning with scores that compare across layers, such as gates' derivatives of one loss.

    Beware: nothing makes up for layers whose scores are small throughout; they are cut to the floor.

    Source: Verdenius et al., SNAP, arXiv 2006.00896, which ranks all nodes of a network together.
    """
    return _rank_all(layers, _wanted(layers, sparsity))


def _standard_score(score: Tensor) -> Tensor:
    """Scores of a layer with mean 0 and variance 1."""
    wide = score.double()
    return ((wide - wide.mean()) / wide.std().clamp_min(torch.finfo(torch.float64).tiny)).float()


@register("allocation", paper="2312.11983", measure=_standard_score)
def standardized(layers: Mapping[str, LayerFacts], *, sparsity: float) -> dict[str, float]:
    """One ranking of the whole model after each layer's scores are brought to mean 0 and variance 1.

    :: s' = (s - mean(s)) / std(s)

    Choose it for structured pruning of language models, whose layers' scores differ by orders of magnitude.

    Beware: a layer with a few very large scores keeps little beside them.

    Source: An et al., FLAP, arXiv 2312.11983, section "Adaptive structure search".
    """
    return _rank_all(layers, _wanted(layers, sparsity))


@register("allocation", paper="2407.04616", measure=_score)
def isomorphic(layers: Mapping[str, LayerFacts], *, sparsity: float) -> dict[str, float]:
    """Rank only what has the same shape together; every shape keeps the same share.

    Choose it for structured pruning of transformers and of networks that mix kinds of layers, where scores of
    heads, neurons and channels do not compare.

    Source: Fang et al., Isomorphic pruning for vision models, arXiv 2407.04616; of coupled units, families with
    the same footprint are isomorphic.
    """
    groups: dict[tuple[object, ...], dict[str, LayerFacts]] = {}
    for name, facts in layers.items():
        groups.setdefault((facts.kind, facts.shape, facts.dims), {})[name] = facts
    keeps: dict[str, float] = {}
    total = done = 0
    for _, group in sorted(groups.items(), key=lambda g: str(g[0])):  # any order of the layers gives the same
        total += sum(f.sketch.numel for f in group.values() if f.sketch is not None)
        wanted = round((1.0 - sparsity) * total) - done
        done += wanted
        keeps.update(_rank_all(group, wanted))
    return {name: keeps[name] for name in layers}


def lamp_score(weight: Tensor) -> Tensor:
    """Squared weight over the sum of squares of all weights of the layer that are at least as large.

    :: s(u) = w_u^2 / sum_{v: |w_v| >= |w_u|} w_v^2

    The largest weight of every layer scores 1, so no layer is emptied before another.

    >>> lamp_score(torch.tensor([[3.0, 4.0]])).tolist()
    [[0.36000001430511475, 1.0]]
    """
    square = weight.double().square().reshape(-1)
    ordered, place = torch.sort(square, stable=True)
    tail = ordered.flip(0).cumsum(0).flip(0)
    score = torch.empty_like(square)
    score[place] = ordered / tail.clamp_min(torch.finfo(torch.float64).tiny)
    return score.reshape(weight.shape).float()


@register("allocation", paper="2010.07611", measure=lamp_score)
def lamp(layers: Mapping[str, LayerFacts], *, sparsity: float) -> dict[str, float]:
    """One ranking of all weights by their layer-adaptive magnitude (LAMP score).

    :: s(u) = w_u^2 / sum_{v: |w_v| >= |w_u|} w_v^2

    Choose it for a data-free allocation that does not depend on the scale of the layers.

    Source: Lee et al., Layer-adaptive sparsity for magnitude-based pruning, arXiv 2010.07611, equation 4.
    """
    return _rank_all(layers, _wanted(layers, sparsity))


def _wanted(layers: Mapping[str, LayerFacts], sparsity: float) -> int:
    return round((1.0 - sparsity) * sum(f.sketch.numel for f in layers.values() if f.sketch is not None))


def _rank_all(layers: Mapping[str, LayerFacts], wanted: int) -> dict[str, float]:
    """Keeps of each layer when exactly ``wanted`` of all scores stay.

    The threshold is found by bisection on the order keys of the floats. Scores at the threshold are
    shared out in proportion to how many each layer has there, so the total is exact within a weight.
    """
    sketches: dict[str, Sketch] = {n: f.sketch for n, f in layers.items() if f.sketch is not None}
    low = min(s.low for s in sketches.values())
    high = max(s.high for s in sketches.values()) + 1
    while high - low > 1:  # invariant: count(low) >= wanted > count(high), or the edge
        middle = (low + high) // 2
        if sum(s.at_least(middle) for s in sketches.values()) >= wanted:
            low = middle
        else:
            high = middle
    sure = {n: s.at_least(high) for n, s in sketches.items()}
    edge = {n: s.at_least(low) - sure[n] for n, s in sketches.items()}
    missing, at_edge = wanted - sum(sure.values()), sum(edge.values())
    share = missing / at_edge if at_edge else 0.0
    return {n: (sure[n] + share * edge[n]) / s.numel for n, s in sketches.items()}
