"""Dense layers of 4 bits: the integers of the quantizer, their products, their choice, their files."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import secateur
from secateur.compression import Int4Linear, compress, dense_again
from secateur.compression import make as of_make
from secateur.compression.candidates import Site, Table
from secateur.errors import ModelError, RecipeError, SecateurError
from secateur.formats.grid import grid
from secateur.kernels import int4, library
from secateur.measure.size import bytes_in_memory

needs_kernels = pytest.mark.skipif(library() is None, reason="the sparse kernels are not built")


def on_grid(seed: int, rows: int, cols: int, group: int, *, bits: int = 4, symmetric: bool = True) -> torch.Tensor:
    weight = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))
    return grid(weight, bits, group, symmetric=symmetric).round(weight)


def right(x: torch.Tensor, layer: Int4Linear) -> tuple[torch.Tensor, torch.Tensor]:
    """The product in float64, and how far rounding may move it: of float32 for few tokens, of bfloat16 for many."""
    weight = layer.weight.double()
    largest = 16 * layer.scale.double().repeat_interleave(layer.group, 1)  # of what is added up for few tokens
    size, many = (2**-7, weight.abs()) if x.numel() > int4._FEW * x.shape[-1] else (1e-6, largest)
    y, allowed = x.double() @ weight.T, size * (x.double().abs() @ many.T)
    if layer.bias is not None:
        y, allowed = y + layer.bias.double(), allowed + size * layer.bias.double().abs()
    return y, allowed + 1e-6


@given(
    st.integers(0, 1 << 30), st.integers(1, 50),
    st.sampled_from([(32, 32), (96, 32), (128, 64), (256, 256), (384, 128)]),
    st.sampled_from([0, 1, 2, 3, 4, 5, 8, 9, 40]), st.booleans(), st.booleans(), st.integers(2, 4),
)  # fmt: skip
def test_products(
    seed: int, rows: int, cut: tuple[int, int], tokens: int, symmetric: bool, biased: bool, bits: int
) -> None:
    cols, group = cut
    weight = on_grid(seed, rows, cols, group, bits=bits, symmetric=symmetric)
    generator = torch.Generator().manual_seed(seed)
    bias = torch.randn(rows, generator=generator) if biased else None
    layer = Int4Linear(weight, bias)
    assert torch.equal(layer.weight, weight)  # its own integers, none of them moved
    x = torch.randn(tokens, cols, generator=generator)
    y, allowed = right(x, layer)
    found = layer(x)
    assert found.shape == y.shape and found.dtype == x.dtype
    assert bool(((found.double() - y).abs() <= allowed).all())


def test_few_and_many_tokens_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = Int4Linear(on_grid(0, 40, 64, 32, symmetric=False), torch.randn(40)), torch.randn(8, 64)
    few = layer(x)
    monkeypatch.setattr(int4, "_FEW", 0)
    y, allowed = right(x, layer)
    monkeypatch.setattr(int4, "_PIECE", 64 * 7)  # rows in pieces, the last of which is smaller
    many = layer(x)
    assert not torch.equal(few, many) and bool(((many.double() - y).abs() <= allowed).all())
    monkeypatch.setattr(int4, "instructions", set)  # a processor that does not multiply bfloat16
    exact = F.linear(x.double(), layer.weight.double(), layer.bias.double())
    torch.testing.assert_close(layer(x).double(), exact, atol=1e-5, rtol=1e-5)
    monkeypatch.setattr(int4, "library", lambda: None)
    monkeypatch.setattr(int4, "_FEW", 8)
    torch.testing.assert_close(layer(x).double(), exact, atol=1e-5, rtol=1e-5)


def test_inputs_of_any_kind() -> None:
    layer = Int4Linear(on_grid(1, 20, 64, 64), torch.randn(20))
    x = torch.randn(2, 3, 64)
    y = layer(x)
    assert y.shape == (2, 3, 20) and torch.equal(layer(x[1, 2]), y[1, 2])
    wide = torch.randn(3, 128)[:, ::2]
    assert torch.equal(layer(wide), layer(wide.contiguous()))
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert layer(x.to(dtype)).dtype == dtype
    assert torch.equal(layer(x.bfloat16()), layer(x.bfloat16().float()).bfloat16())
    assert not bool(layer(torch.full((1, 64), float("nan"))).isfinite().any())
    relu = Int4Linear(layer.weight, layer.bias, activation="relu")
    assert torch.equal(relu(x), y.relu())
    for bad, message in ((torch.ones(1, 63), "64 inputs"), (torch.ones(1, 64, dtype=torch.long), "takes floats")):
        with pytest.raises(SecateurError, match=message):
            layer(bad)


def test_values_that_change_are_seen() -> None:
    layer = Int4Linear(on_grid(2, 16, 32, 32), None)
    x = torch.ones(1, 32)
    before, twin = layer(x), copy.deepcopy(layer)
    with torch.no_grad():
        layer.values.fill_(0x88)  # the code of zero
    assert torch.equal(layer(x), torch.zeros(1, 16)) and torch.equal(twin(x), before)
    other = Int4Linear(on_grid(3, 16, 32, 32), None)
    twin.load_state_dict(other.state_dict())
    assert torch.equal(twin(x), other(x))
    layer.scale = layer.scale.double()
    with pytest.raises(SecateurError, match="converted"):
        layer(x)
    with pytest.raises(ModelError, match="float32 arithmetic"):
        twin.bfloat16()


def test_operators_are_known_to_torch() -> None:
    layer = Int4Linear(on_grid(4, 5, 64, 32, symmetric=False), torch.randn(5))
    x = torch.randn(3, 64)
    torch.library.opcheck(
        torch.ops.secateur.dense_int4.default, (x, layer.values, layer.scale, layer.zero, layer.bias, 1)
    )
    program = torch.export.export(nn.Sequential(layer), (x,))
    torch.testing.assert_close(program.module()(x), layer(x))
    torch.testing.assert_close(torch.vmap(layer)(x[:, None]).squeeze(1), layer(x))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))
    with pytest.raises(SecateurError, match="for inference"):
        nn.Sequential(nn.Linear(64, 64), layer)(x).sum().backward()


def test_a_weight_on_no_grid_is_refused() -> None:
    weight = on_grid(5, 4, 64, 32)
    for bad in (weight + 1e-3 * torch.randn(4, 64), on_grid(5, 4, 64, 32, bits=5), on_grid(5, 4, 48, 48), weight.log()):
        with pytest.raises(ModelError, match="not on a grid of 4 bits"):
            Int4Linear(bad, None)
    with pytest.raises(ModelError, match="not on a grid"):
        Int4Linear(weight + 1, None, grid(weight, 4, 32))


@pytest.fixture
def int4_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(_: Table, site: Site, shape: tuple[int, ...], kinds: Sequence[str], cold: bool) -> dict[str, float]:
        ways = site.ways(kinds, site.linear and shape[0] <= 4)
        return {"dense": 1.0} | {way: 0.5 if way == "int4.dense" else 0.9 for way in ways}

    monkeypatch.setattr(Table, "seconds", seconds)
    monkeypatch.setattr(of_make, "latency", lambda models, *_: {name: {"dense": 1.0}.get(name, 0.5) for name in models})


def quantized_model(**how: Any) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32, bias=False), nn.Linear(32, 7)).eval()
    for layer, seed in ((model[0], 0), (model[2], 1)):
        layer.weight.data = on_grid(seed, layer.out_features, layer.in_features, 32, **how)
    return model


@needs_kernels
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_quantized_model_is_chosen_saved_and_loaded(int4_wins: None, symmetric: bool, tmp_path: Path) -> None:
    model = quantized_model(symmetric=symmetric)
    x = torch.randn(6, 64)
    fast = compress(model, x, kinds=["float32", "int4"], cache=False)
    assert [(c.kind, c.index) for c in fast.compression.choices] == [("int4", "dense")] * 2 + [("dense", "")]
    assert "0% zeros, and no integers of 4 bits" in fast.compression.choices[2].reason
    assert isinstance(fast[0], Int4Linear) and fast[0].activation == "relu" and type(fast[3]) is nn.Linear
    assert torch.equal(fast[2].weight, model[2].weight) and (fast[0].zero is None) == symmetric
    assert "dense int4" in str(fast.compression) and 0 < fast.compression.error < 0.02
    assert bytes_in_memory(fast) < 0.3 * bytes_in_memory(model)
    kept = int(model[0].weight.count_nonzero()) + int(model[0].bias.count_nonzero())
    assert fast[0].stored == 64 * 96 + 96 and fast[0].nonzeros == kept
    loaded = secateur.load(secateur.save(fast, tmp_path / "fast"), copy.deepcopy(model))
    assert torch.equal(loaded(x), fast(x)) and isinstance(loaded[2], Int4Linear)
    assert torch.equal(loaded[0].weight, model[0].weight)
    again = dense_again(copy.deepcopy(fast))
    assert torch.equal(again(x), model(x)) and isinstance(again[2], nn.Linear)


@needs_kernels
def test_a_model_of_floats_is_not_rounded(int4_wins: None) -> None:
    model = nn.Sequential(nn.Linear(64, 64)).eval()
    x = torch.randn(1, 64)
    with torch.no_grad():
        model[0].weight[:, ::2] = 0
    for kinds, reason in (
        (["int4"], "no integers of 4 bits in groups of 256, 128, 64, 32 inputs"),
        (["int4", "float32"], ""),
    ):
        found = compress(model, x, kinds=kinds, cache=False).compression.choices[0]
        assert found.kind != "int4" and found.reason.startswith(reason)
    with pytest.raises(RecipeError, match="int4"):
        compress(model, x, kinds=["int3"], cache=False)


def test_parts_that_do_not_fit_are_refused() -> None:
    values, scale = torch.zeros(2, 32, dtype=torch.uint8), torch.ones(2, 2)
    zero = torch.zeros(2, 2, dtype=torch.int8)
    Int4Linear.restored(values, scale.bfloat16(), zero, None, "none")
    for parts in (
        (values, scale[:1], None), (values, -scale, None), (values.char(), scale, None), (values.view(-1), scale, None),
        (values, torch.ones(2, 3), None), (values, scale, zero[:1]), (values, scale, zero + 8),
        (values, scale, zero.int()),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="values of 4 bits"):
            Int4Linear.restored(*parts, None, "none")
