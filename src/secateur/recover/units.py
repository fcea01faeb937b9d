"""Recoveries of a smaller model from activations alone: no labels, no gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_iter, tree_unflatten

from ..evidence import Stop, watch
from ..evidence.watch import as_ni
from ..lanes import Lanes, Parted
from ..layers import Layer, evaluating, find_layers, located
from ..registry import register
from ..symmetric import add_gram, mirror

_LOTS = 6  # batches are joined to so many: each is a lane of its own in both models


@dataclass(eq=False)
class Smaller:
    """A model, what was made of it by taking units away, and data.

    Attributes:
        kept: tensor name -> axis -> positions that stay.
        batches: for both models.
        run: ``run(model, batch)`` makes one forward pass.
    """

    dense: nn.Module
    small: nn.Module
    kept: Mapping[str, Mapping[int, Any]]
    batches: Sequence[Any]
    run: Callable[[nn.Module, Any], Any]


@register("recovery", paper="1707.06342", data="units")
def refit(task: Smaller, *, damp: float = 0.01) -> list[str]:
    """Fit each layer that reads removed units to the dense model's output by least squares, on what is left.

    :: min over W', b' of || W x + b - W' x' - b' ||^2 + damp mean(diag X' X'^T) || W' - W_kept ||^2

    ``x`` is the layer's input in the dense model, ``x'`` in the smaller one with all layers before already fitted,
    so that later layers also make up for what earlier ones lost. Where the layer has a bias, means are fitted by
    it. Batch-norm statistics are measured anew afterwards. What does not bring the output nearer to the dense
    model's on data that was held out is taken back.

    Choose it whenever there is data: it costs two forward passes.

    Beware: it needs more tokens or positions than a layer has inputs.

    Source: Luo et al., ThiNet, arXiv 1707.06342, section 3.2.3, and He et al., Channel pruning, arXiv 1707.06168,
    equation 3; the joint bias and the pull towards the kept weights are ours.
    """
    return guarded(task, lambda lots: [*fitted(task, lots, damp), *_renorm(task, lots)])


@register("recovery", name="bias", paper="2312.11983", data="units")
def bias(task: Smaller) -> list[str]:
    """Put into each layer's bias what the removed units gave it on average.

    :: b' = b + W mean(x) - W_kept mean(x')

    Choose it where the weights themselves must stay as they are.

    Beware: a layer without a bias gets none, and is left as it is; a note counts them.

    Source: An et al., FLAP, arXiv 2312.11983, equation 8; there x' = x on what is kept.
    """
    return guarded(task, lambda lots: _fit(task, lots, _shift, biased=True))


@register("recovery", name="batch-norm", paper="2007.02491", data="units")
def batch_norm(task: Smaller) -> list[str]:
    """Measure the statistics of batch norms anew on the smaller model.

    Choose it for convolutional networks, before or without fine-tuning.

    Source: Li et al., EagleEye, arXiv 2007.02491, section 3.3 (adaptive batch normalization).
    """
    return guarded(task, lambda lots: _renorm(task, lots))


def guarded(task: Smaller, heal: Callable[[list[Any]], list[str]]) -> list[str]:
    """Heal on most of the data, and take it back if the held-out rest says that it did harm."""
    batches = list(task.batches)
    if len(batches) == 1 and isinstance(batches[0], Tensor) and len(batches[0]) > 3:
        batches = list(batches[0].split(-(-len(batches[0]) // 4)))
    aside = max(1, len(batches) // 16) if len(batches) > 1 else 0
    train = _joined(batches[: len(batches) - aside])
    test = _joined(batches[-aside:] if aside else batches, 1)[0]
    before = {n: t.detach().clone() for n, t in task.small.state_dict(keep_vars=True).items()}
    with evaluating(task.dense, task.small), torch.no_grad():
        wanted = first_output(task.run(task.dense, test))
        first = _distance(wanted, first_output(task.run(task.small, test)))
        notes = heal(train)
        last = _distance(wanted, first_output(task.run(task.small, test)))
        where = "held-out data" if aside else "the same data"
        if not last < first:
            for name, tensor in task.small.state_dict(keep_vars=True).items():
                tensor.copy_(before[name])
            return [*notes, f"taken back: error of the output on {where} would go from {first:.4f} to {last:.4f}"]
    return [*notes, f"error of the output on {where}: {first:.4f} before, {last:.4f} after"]


def fitted(task: Smaller, lots: list[Any], damp: float) -> list[str]:
    """Fit every layer that reads what was removed by least squares, as `refit` says."""
    return _fit(task, lots, partial(_least_squares, damp=damp))


@dataclass(eq=False)
class _Moments:
    """Sums over one input as both models see it."""

    waiting: dict[int, Tensor] = field(default_factory=dict)
    count: int = 0
    square: Tensor | None = None  # x' x'^T
    cross: Tensor | None = None  # x x'^T
    mean: Tensor | None = None  # sum of x
    mean_small: Tensor | None = None

    def add(self, x: Tensor, small: Tensor) -> None:
        x, small = x.float(), small.float()
        if self.square is None:
            self.square = small.new_zeros(small.shape[1], small.shape[1])
            self.cross = small.new_zeros(x.shape[1], small.shape[1])
            self.mean = x.new_zeros(x.shape[1], dtype=torch.float64)
            self.mean_small = x.new_zeros(small.shape[1], dtype=torch.float64)
        assert self.cross is not None and self.mean is not None and self.mean_small is not None
        add_gram(self.square, small)
        self.cross.addmm_(x.t(), small)
        self.mean += x.sum(0, dtype=torch.float64)
        self.mean_small += small.sum(0, dtype=torch.float64)
        self.count += x.shape[0]


#: ``(dense weight of the rows that stay, layer of the smaller model, bias of those rows, moments)``.
Solve = Callable[[Tensor, Layer, Tensor | None, _Moments], None]


def _fit(task: Smaller, lots: list[Any], solve: Solve, biased: bool = False) -> list[str]:
    """Take both models through the data in step; solve each layer that lost inputs when all of its input is there.

    With ``biased`` only layers that have a bias are solved.
    """
    pairs = _readers(task)
    if not pairs or not lots:
        return ["no layer reads what was removed in a way that can be fitted"]
    groups: dict[str, _Moments] = {}
    reading: list[tuple[Tensor, _Moments] | None] = [None] * (2 * len(lots))
    done: set[str] = set()
    skipped: list[str] = []

    def arrive(layer: Layer, x: Tensor) -> None:
        name = layer.name
        if name in done:
            if len(done) == len(pairs):
                raise Stop
            return
        lot, side = divmod(lanes.current, 2)
        held = reading[lanes.current]
        if held is None or held[0] is not x:
            moments = groups.setdefault(name, _Moments())
            if side == 0:
                moments.waiting[lot] = as_ni(layer, x)
            else:
                moments.add(moments.waiting.pop(lot), as_ni(layer, x))
            reading[lanes.current] = held = (x, moments)
            lanes.pause(name)
        if name not in done:
            done.add(name)
            groups.clear()
            dense, small, rows = pairs[name]
            weight = dense.weight()[torch.from_numpy(rows).to(dense.stored.device)]
            vector = getattr(dense.module, "bias", None)
            if biased and not isinstance(vector, Tensor):
                skipped.append(name)
                return
            kept = vector.detach()[torch.from_numpy(rows).to(vector.device)] if isinstance(vector, Tensor) else None
            solve(weight, small, kept, held[1])
        if len(done) == len(pairs):
            raise Stop  # nothing after it is read, the head of a language model least of all

    def through(model: nn.Module, layers: list[Layer], batch: Any) -> None:
        with watch(layers, arrive), suppress(Stop):
            task.run(model, batch)

    jobs = []
    for lot in lots:
        jobs.append(partial(through, task.dense, [p[0] for p in pairs.values()], lot))
        jobs.append(partial(through, task.small, [p[1] for p in pairs.values()], lot))
    lanes: Lanes[None] = Lanes(jobs)
    notes = []
    try:
        lanes.run()
    except Parted:
        notes.append("the smaller model takes another path than the dense one: layers after it were left as they are")
    if skipped:
        notes.append(f"{len(skipped)} layers have no bias and were left as they are, e.g. {skipped[0]}")
    return [f"{len(done) - len(skipped)} of {len(pairs)} layers that read removed units were fitted", *notes]


def _readers(task: Smaller) -> dict[str, tuple[Layer, Layer, Any]]:
    """Layers that lost inputs, in both models, with the output rows that stay."""
    small = {x.name: x for x in find_layers(task.small)[0]}
    found = {}
    for layer, name, output in located(task.dense):
        if layer.kind not in ("linear", "conv", "conv1d-hf") or layer.name not in small:
            continue
        if getattr(layer.module, "groups", 1) != 1:
            continue
        axes = task.kept.get(name, {})
        if 1 - output in axes:
            found[layer.name] = (layer, small[layer.name], axes.get(output, np.arange(layer.stored.shape[output])))
    return found


def _least_squares(weight: Tensor, small: Layer, vector: Tensor | None, moments: _Moments, *, damp: float) -> None:
    square, cross, mean, mean_small = moments.square, moments.cross, moments.mean, moments.mean_small
    assert square is not None and cross is not None and mean is not None and mean_small is not None
    mirror(square)
    n = moments.count
    h, c = square.double(), cross.double()
    mean, mean_small = mean / n, mean_small / n
    if vector is not None:
        h = h - n * torch.outer(mean_small, mean_small)
        c = c - n * torch.outer(mean, mean_small)
    ridge = max(damp * float(h.diagonal().mean()), 1e-12)
    kept = small.weight().double()
    h.diagonal().add_(ridge)
    fitted = torch.linalg.solve(h, (weight.double() @ c + ridge * kept).t()).t()
    if not torch.isfinite(fitted).all():
        return
    small.write(fitted)
    if vector is not None:
        small.module.bias.copy_(vector.double() + weight.double() @ mean - fitted @ mean_small)  # type: ignore[operator]


def _shift(weight: Tensor, small: Layer, vector: Tensor | None, moments: _Moments) -> None:
    assert vector is not None and moments.mean is not None and moments.mean_small is not None
    n = moments.count
    change = weight.double() @ (moments.mean / n) - small.weight().double() @ (moments.mean_small / n)
    small.module.bias.copy_(vector.double() + change)  # type: ignore[operator]


def _renorm(task: Smaller, lots: list[Any]) -> list[str]:
    """Mean and variance of every batch norm of the smaller model, over all lots."""
    norms = [
        m for m in task.small.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats
    ]
    if not norms:
        return []
    momenta = [m.momentum for m in norms]
    try:
        for m in norms:
            m.reset_running_stats()
            m.momentum = None  # a plain average over lots
            m.train()
        for lot in lots:
            task.run(task.small, lot)
    finally:
        for m, momentum in zip(norms, momenta, strict=True):
            m.momentum = momentum
            m.eval()
    return [f"statistics of {len(norms)} batch norms were measured anew"]


def first_output(result: Any) -> list[Tensor]:
    """The first floating point tensor of an output, if any, which is what a task reads: logits, features."""
    found = [x for x in tree_iter(dict(result) if hasattr(result, "keys") else result) if isinstance(x, Tensor)]
    return [x for x in found if x.is_floating_point()][:1]


def _distance(wanted: list[Tensor], got: list[Tensor]) -> float:
    """Relative squared error."""
    lost = sum(float((a - b).square().sum(dtype=torch.float64)) for a, b in zip(wanted, got, strict=True))
    return lost / max(sum(float(a.square().sum(dtype=torch.float64)) for a in wanted), 1e-30)


def _joined(batches: Sequence[Any], most: int = _LOTS) -> list[Any]:
    """The batches in few lots, joined along the first axis where their structures allow it."""
    if len(batches) <= most:
        return list(batches)
    flat = [tree_flatten(dict(b) if isinstance(b, Mapping) else b) for b in batches]
    spec = flat[0][1]
    first = flat[0][0]
    alike = all(isinstance(x, Tensor) and x.dim() for leaves, _ in flat for x in leaves) and all(
        s == spec and all(x.shape[1:] == y.shape[1:] for x, y in zip(leaves, first, strict=True)) for leaves, s in flat
    )
    if not alike:
        return list(batches[:most])
    size = -(-len(batches) // most)
    return [
        tree_unflatten([torch.cat([x[k] for x, _ in flat[a : a + size]]) for k in range(len(first))], spec)
        for a in range(0, len(flat), size)
    ]
