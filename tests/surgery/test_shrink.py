"""Smaller tensors, the numbers that modules repeat, and what stays as it was."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tests import nets
from torch import nn

from secateur.graph import dependencies, trace
from secateur.surgery import shrink
from secateur.surgery.shrink import Mend, candidates, kept_by_name


def keep(*positions: int) -> np.ndarray:
    return np.array(positions, dtype=np.int64)


@given(st.integers(2, 7), st.integers(2, 7), st.data())
def test_tensors_are_their_chosen_positions(o: int, i: int, data: st.DataObject) -> None:
    layer = nn.Linear(i, o)
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    rows = sorted(data.draw(st.sets(st.integers(0, o - 1), min_size=1)))
    columns = sorted(data.draw(st.sets(st.integers(0, i - 1), min_size=1)))
    shrink(layer, {"weight": {0: keep(*rows), 1: keep(*columns)}, "bias": {0: keep(*rows)}})
    assert torch.equal(layer.weight, weight[rows][:, columns]) and torch.equal(layer.bias, bias[rows])
    assert layer.weight.is_contiguous() and (layer.out_features, layer.in_features) == (len(rows), len(columns))


def test_layers_say_their_new_sizes() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.GroupNorm(4, 8),
        nn.ConvTranspose2d(8, 6, 2),
        nn.LayerNorm(8),
        nn.RMSNorm(8),
        nn.Embedding(9, 8),
        nn.InstanceNorm2d(8, affine=True),
        nn.BatchNorm1d(8, affine=False),
    )
    some = keep(0, 1, 4, 5)
    kept: dict[str, dict[int, Any]] = {
        "0.weight": {0: some},
        "0.bias": {0: some},
        **{f"1.{n}": {0: some} for n in ("weight", "bias", "running_mean", "running_var")},
        **{f"{i}.{n}": {0: some} for i in (2, 4, 7) for n in ("weight", "bias")},
        "3.weight": {0: some, 1: keep(0, 5)},
        "3.bias": {0: keep(0, 5)},
        "5.weight": {0: some},
        "6.weight": {1: some},
        **{f"8.{n}": {0: some} for n in ("running_mean", "running_var")},
    }
    shrink(net, kept)
    assert (net[0].in_channels, net[0].out_channels) == (3, 4)
    assert net[1].num_features == net[7].num_features == net[8].num_features == 4
    assert (net[2].num_channels, net[2].num_groups) == (4, 2)  # groups 0 and 2 of 4 stay
    assert (net[3].in_channels, net[3].out_channels) == (4, 2)
    assert net[4].normalized_shape == net[5].normalized_shape == (4,)
    assert (net[6].num_embeddings, net[6].embedding_dim) == (9, 4)
    x = net[3](net[2](net[1](net[0](nets.noise(2, 3, 5, 5)))))
    assert x.shape == (2, 2, 4, 4) and net[6](torch.tensor([8])).shape == (1, 4)
    assert "Conv2d(3, 4" in repr(net) and "GroupNorm(2, 4" in repr(net)


@pytest.mark.parametrize(
    "layer, kept, groups, sizes",
    [
        (nn.Conv2d(8, 8, 3, groups=8), {"weight": {0: keep(1, 2, 5)}, "bias": {0: keep(1, 2, 5)}}, 3, (3, 3)),
        (nn.Conv2d(4, 8, 3, groups=4), {"weight": {0: keep(0, 2, 4, 6)}, "bias": {0: keep(0, 2, 4, 6)}}, 4, (4, 4)),
        (nn.Conv2d(4, 8, 3, groups=4), {"weight": {0: keep(0, 1, 6, 7)}, "bias": {0: keep(0, 1, 6, 7)}}, 2, (2, 4)),
        (nn.Conv1d(6, 4, 3, groups=2), {"weight": {1: keep(0, 2)}}, 2, (4, 4)),
        (nn.ConvTranspose2d(8, 8, 3, groups=8), {"weight": {0: keep(1, 5)}, "bias": {0: keep(1, 5)}}, 2, (2, 2)),
        (nn.ConvTranspose1d(4, 6, 3, groups=2), {"weight": {1: keep(0, 2)}, "bias": {0: keep(0, 2, 3, 5)}}, 2, (4, 4)),
    ],
)
def test_groups_follow_from_what_stays(layer: Any, kept: Any, groups: int, sizes: tuple[int, int]) -> None:
    shrink(layer, kept)
    assert layer.groups == groups and (layer.in_channels, layer.out_channels) == sizes
    x = nets.noise(2, sizes[0], *[5] * (layer.weight.dim() - 2))
    assert layer(x).shape[1] == sizes[1]


def test_tied_tensors_stay_tied() -> None:
    model, example = nets.build("tied")
    found = dependencies(trace(model, (example,)))
    gone = found.families[0].units[0].gone
    kept = kept_by_name(found, gone)
    assert {"e.weight", "out.weight"} <= kept.keys()
    shrink(model, kept)
    assert model.out.weight is model.e.weight and model.e.weight.shape == (11, 7)
    assert model.e.embedding_dim == model.out.in_features == 7
    assert model(example).shape == (2, 5, 11)


def test_kinds_of_tensors_stay() -> None:
    net = nn.Module()
    net.frozen = nn.Parameter(torch.arange(6.0), requires_grad=False)
    net.narrow_ = nn.Parameter(torch.arange(6.0).half())
    net.register_buffer("kept", torch.arange(6))
    net.register_buffer("passing", torch.arange(6.0), persistent=False)
    shrink(net, {n: {0: keep(1, 4)} for n in ("frozen", "narrow_", "kept", "passing")})
    assert isinstance(net.frozen, nn.Parameter) and not net.frozen.requires_grad
    assert net.narrow_.requires_grad and net.narrow_.dtype == torch.float16 and net.narrow_.tolist() == [1, 4]
    assert net.kept.tolist() == [1, 4] and not isinstance(net.kept, nn.Parameter)
    assert set(net.state_dict()) == {"frozen", "narrow_", "kept"} and net.passing.tolist() == [1, 4]


def test_nothing_else_changes() -> None:
    model, _ = nets.build("residual")
    before = nets.snapshot(model)
    random = torch.get_rng_state()
    shrink(model, {})
    assert nets.same(before, model) and torch.equal(random, torch.get_rng_state())
    shrink(model, {"c1.weight": {0: keep(0, 1)}})
    after = nets.snapshot(model)
    assert [n for n in before if before[n].shape != after[n].shape] == ["c1.weight"]
    assert all(torch.equal(before[n], after[n]) for n in before if n != "c1.weight")


def test_numbers_are_mended_in_their_own_kind() -> None:
    net = nn.Module()
    net.inner = nn.Module()
    net.inner.width, net.inner.sizes, net.inner.shape = 8, [8, 3], (8, 8, 2)
    mends = [
        Mend("inner", "width", None, 8, 6),
        Mend("inner", "sizes", 0, 8, 6),
        Mend("inner", "shape", 1, 8, 6),
    ]
    shrink(net, {}, mends)
    assert net.inner.width == 6 and net.inner.sizes == [6, 3] and net.inner.shape == (8, 6, 2)


def attention() -> tuple[nn.Module, Any]:
    model = nets.FusedAttention(heads=2, dim=4)
    model.switch, model.names, model._heads, model.ratio = True, "2", 2, 2.0
    return model, nets.noise(2, 6, 5)


def test_candidates_are_numbers_that_equal_a_size_which_changes() -> None:
    model, x = attention()
    found = dependencies(trace(model, (x,)))
    heads = next(f for f in found.families if f.name.startswith("qkv.weight:0"))
    options = candidates(model, found, heads.units[0].gone)
    assert options == {("", 2, "heads", None): [Mend("", "heads", None, 2, 1)]}
    assert candidates(model, found, frozenset()) == {}
    stream = next(f for f in found.families if f.name == "i.weight:0")
    assert candidates(model, found, stream.units[0].gone) == {}  # no number says 8 here


def test_a_smaller_model_trains() -> None:
    model, example = nets.build("lstm")
    found = dependencies(trace(model, (example,)))
    gone = next(f for f in found.families if f.name.startswith("r.weight_ih_l0:0")).units[0].gone
    shrink(model, kept_by_name(found, gone), [Mend("r", "hidden_size", None, 8, 7)])
    model.train()
    before = nets.snapshot(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    F.mse_loss(model(example), torch.ones(2, 5, 3)).backward()
    optimizer.step()
    after = nets.snapshot(model)
    assert all(not torch.equal(before[n], after[n]) for n in before)
    with torch.no_grad():
        one = model(example)
        model.r.weight_ih_l0.mul_(0)
        assert not torch.equal(one, model(example))  # the layer reads its parameters, not copies of the old ones


def test_a_grouped_convolution_under_two_names() -> None:
    layer = nn.Conv2d(8, 8, 1, groups=8)
    net = nets.Call(lambda m, x: m.b(F.relu(m.a(x))), a=layer, b=layer)
    some = keep(1, 3, 5, 6)
    shrink(net, {f"{n}.{p}": {0: some} for n in "ab" for p in ("weight", "bias")})
    assert layer.groups == 4 and net(nets.noise(2, 4, 3, 3)).shape == (2, 4, 3, 3)


def test_names_of_all_that_loses_something() -> None:
    model, example = nets.build("concat")
    found = dependencies(trace(model, (example,)))
    unit = next(f for f in found.families if f.name == "c.weight:0").units[2]
    kept = kept_by_name(found, unit.gone)
    assert {n: {a: len(p) for a, p in axes.items()} for n, axes in kept.items()} == {
        "c.weight": {0: 3},
        "c.bias": {0: 3},
        "head.weight": {1: 13},
    }
    assert 12 not in kept["head.weight"][1]
