"""Effective FLOPs against counts by hand, dense ones of smaller layers, and packed layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests import tiny
from torch import nn

from secateur.compression.candidates import Site
from secateur.measure.flops import effective_flops, flops


def thinned(model: nn.Module, share: float = 0.7) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter *= torch.rand(parameter.shape, generator=generator) >= share
    return model.eval()


def nonzero(x: torch.Tensor) -> int:
    return int((x != 0).sum())


@pytest.mark.parametrize(
    "layer, shape, positions",
    [
        (nn.Linear(8, 3), (4, 5, 8), 20),
        (nn.Linear(8, 3, bias=False), (8,), 1),
        (nn.Conv1d(4, 6, 3), (2, 4, 10), 2 * 8),
        (nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (2, 4, 9, 7), 2 * 5 * 4),
        (nn.ConvTranspose2d(4, 6, 3, stride=2), (2, 4, 5, 7), 2 * 5 * 7),
    ],
)
def test_each_nonzero_weight_counts_once_a_position(layer: nn.Module, shape: tuple[int, ...], positions: int) -> None:
    x = torch.randn(shape)
    assert effective_flops(layer, x).total == flops(layer, x).total == 2 * positions * layer.weight.numel()
    thinned(layer)
    if layer.bias is not None:  # an addend, whose zeros save nothing
        nn.init.zeros_(layer.bias)
    found = effective_flops(layer, x)
    assert 0 < found.total == 2 * positions * nonzero(layer.weight) < flops(layer, x).total
    assert found.by_module[""] == sum(found.by_op.values()) == found.total and not found.unknown


def test_whole_models_module_by_module() -> None:
    model, ids = thinned(tiny.build("llama")), tiny.ids(2, 5)
    dense, left = flops(model, input_ids=ids), effective_flops(model, input_ids=ids)
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert len(linear) == 22
    for name, module in linear.items():
        assert left.by_module[name] == 2 * 10 * nonzero(module.weight)
    gone = sum(dense.by_module[n] - left.by_module[n] for n in linear)
    assert left.total == dense.total - gone and left.by_op.keys() == dense.by_op.keys()  # attention counts in full


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_weights_that_no_linear_layer_holds(family: str) -> None:
    """Transposed ones of GPT-2; those of experts, slices of one parameter, of which only some are reached."""
    model, ids = tiny.build(family), tiny.ids(1, 7)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    with torch.no_grad():  # two of four rows or columns, so that every slice has half of its elements
        for parameter in model.parameters():
            if parameter.dim() > 1 and parameter.shape[-1] % 2 == 0:
                parameter[..., ::2] = 0
    nn.init.ones_(model.lm_head.weight)  # and, where it is tied, the embedding
    dense, left = flops(model, input_ids=ids), effective_flops(model, input_ids=ids)
    head, attention = dense.by_module["lm_head"], sum(n for op, n in dense.by_op.items() if "attention" in op)
    assert attention > 0 and left.by_module["lm_head"] == head
    assert 2 * (left.total - head - attention) == dense.total - head - attention


def test_recurrent_layers_and_attention_of_torch() -> None:
    x = torch.randn(3, 5, 8)
    lstm = thinned(nn.LSTM(8, 4, batch_first=True))
    assert effective_flops(lstm, x).total == 2 * 15 * sum(nonzero(w) for w in lstm.parameters() if w.dim() > 1)
    attention = thinned(nn.MultiheadAttention(8, 2, batch_first=True))
    gone = (p.numel() - nonzero(p) for p in attention.parameters() if p.dim() > 1)
    assert flops(attention, x, x, x).total - effective_flops(attention, x, x, x).total == 2 * 15 * sum(gone)


@pytest.mark.parametrize(
    "make, shape",
    [
        (lambda: nn.Linear(70, 40), (9, 70)),
        (lambda: nn.Linear(70, 40), (70,)),
        (lambda: nn.Conv2d(6, 16, 3, 2, 1), (2, 6, 9, 8)),
    ],
)
def test_packed_layers_count_as_what_they_were_made_of(make: Callable[[], Any], shape: tuple[int, ...]) -> None:
    net, x = nn.Sequential(thinned(make())), torch.randn(shape)
    site = Site("0", net[0])
    packed = nn.Sequential(site.sparse(site.pack("float32").indexed(col=True, bits=True), net[0].bias))
    for count in (flops, effective_flops):
        one, other = count(net, x), count(packed, x)
        assert one.total == other.total and one.by_module == other.by_module and not other.unknown
    assert effective_flops(packed, x).total < flops(packed, x).total


def test_without_values_all_count() -> None:
    with torch.device("meta"):
        net = nn.Linear(8, 3)
        assert effective_flops(net, torch.empty(2, 8)).total == 2 * 2 * 24
