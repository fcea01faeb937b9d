"""Dense layers of smaller values: their products, their choice, their files."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import secateur
from secateur.compression import DenseLinear, compress, dense_again
from secateur.compression import make as of_make
from secateur.compression.candidates import Site, Table, _measure
from secateur.compression.dense import DENSE
from secateur.errors import ModelError, SecateurError
from secateur.kernels import library, quantized
from secateur.measure.flops import effective_flops, flops
from secateur.measure.size import bytes_in_memory

needs_int8 = pytest.mark.skipif(not quantized.available(), reason="torch has no int8 kernels here")


@given(st.integers(0, 1 << 30), st.integers(1, 40), st.integers(1, 70), st.integers(0, 9), st.sampled_from(DENSE))
def test_products(seed: int, rows: int, cols: int, tokens: int, kind: str) -> None:
    """Within the rounding of the values, and of the activations to a range of 127 (seven bits) over their extent."""
    generator = torch.Generator().manual_seed(seed)
    weight, bias = (torch.randn(*s, generator=generator) for s in ((rows, cols), (rows,)))
    x = torch.randn(tokens, cols, generator=generator)
    layer = DenseLinear(weight, bias, kind)
    right = x.double() @ layer.weight.double().T + bias.double()
    if kind == "bfloat16":
        allowed = 2**-7 * (x.abs().double() @ weight.abs().double().T + bias.abs().double() + 1e-3)
    else:
        step = (x.max().clamp(min=0) - x.min().clamp(max=0)) / 127 if x.numel() else torch.zeros(())
        allowed = 0.51 * step.double() * layer.weight.double().abs().sum(1)[None] + 1e-4
    y = layer(x)
    assert y.shape == right.shape and y.dtype == x.dtype
    assert bool(((y.double() - right).abs() <= allowed).all())
    assert float((layer.weight - weight).abs().max()) <= float(weight.abs().max()) * (
        2**-8 if kind == "bfloat16" else 1 / 250
    )


def test_int8_is_exact_where_it_holds_both_sides() -> None:
    weight = torch.tensor([[127.0, -3.0, 0.0], [127.0, 127.0, -127.0]])
    layer = DenseLinear(weight, None, "int8-dynamic")
    x = torch.tensor([[127.0, 0.0, 127.0]])  # the ends of a range are exact with seven bits and with eight
    assert torch.equal(layer.weight, weight) and torch.allclose(layer(x), x @ weight.T, atol=1e-2)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite(bad: float) -> None:
    layer = DenseLinear(torch.ones(2, 3), None, "int8-dynamic")
    x = torch.tensor([[bad, 1.0, 1.0], [1.0, 1.0, 1.0]])
    y = layer(x)
    assert not bool(y[0].isfinite().any()) and torch.allclose(y[1], torch.full((2,), 3.0))


def test_operators_are_known_to_torch() -> None:
    layer = DenseLinear(torch.randn(5, 6), torch.randn(5), "int8-dynamic")
    x = torch.randn(3, 6)
    arguments = (x, layer.values, layer.scale, layer.bias)
    torch.library.opcheck(torch.ops.secateur.dense_int8.default, arguments)
    program = torch.export.export(nn.Sequential(layer), (x,))
    torch.testing.assert_close(program.module()(x), layer(x))
    torch.testing.assert_close(torch.vmap(layer)(x[:, None]).shape, (3, 1, 5))
    with pytest.raises(SecateurError, match="for inference"):
        nn.Sequential(nn.Linear(6, 6), layer)(x).sum().backward()


def test_values_that_change_are_seen() -> None:
    layer = DenseLinear(torch.ones(2, 3), None, "int8-dynamic")
    x = torch.ones(1, 3)
    before, twin = layer(x), copy.deepcopy(layer)
    with torch.no_grad():
        layer.values.zero_()
        layer.scale.mul_(1.0)
    assert torch.equal(layer(x), torch.zeros(1, 2)) and torch.equal(twin(x), before)
    layer.scale = layer.scale.double()
    with pytest.raises(SecateurError, match="converted"):
        layer(x)


def test_bad_weights_are_refused() -> None:
    for weight in (torch.tensor([[float("nan")]]), torch.tensor([[3.4e38]])):
        with pytest.raises(ModelError, match="not finite"):
            DenseLinear(weight, None, "bfloat16")
    with pytest.raises(ModelError, match="float32 arithmetic"):
        DenseLinear(torch.ones(1, 1), None, "bfloat16").half()


@pytest.fixture
def dense_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(_: Table, site: Site, shape: tuple[int, ...], kinds: Sequence[str], cold: bool) -> dict[str, float]:
        ways = site.ways(kinds, site.linear and shape[0] <= 4)
        return {"dense": 1.0} | {way: 0.5 if way.endswith("dense") else 0.9 for way in ways}

    monkeypatch.setattr(Table, "seconds", seconds)
    monkeypatch.setattr(of_make, "latency", lambda models, *_: {name: {"dense": 1.0}.get(name, 0.5) for name in models})


@needs_int8
@pytest.mark.skipif(library() is None, reason="the sparse kernels are not built")
@pytest.mark.parametrize("kind", DENSE)
def test_a_model_without_zeros_is_chosen_saved_and_loaded(dense_wins: None, kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 4)).eval()
    x = torch.randn(6, 20)
    untouched = compress(model, x, cache=False)
    assert untouched is model and untouched.compression.choices[0].reason == "0% zeros"
    fast = compress(model, x, kinds=[kind], cache=False)
    assert [(c.kind, c.index) for c in fast.compression.choices] == [(kind, "dense")] * 2
    assert isinstance(fast[0], DenseLinear) and fast[0].activation == "relu"
    assert f"dense {kind}" in str(fast.compression) and 0 < fast.compression.error < 0.05
    kept = sum(int(m.values.count_nonzero()) for m in (fast[0], fast[2]))  # int8 rounds a few to zero
    assert effective_flops(fast, x).total == 2 * 6 * kept and flops(fast, x).total == 2 * 6 * (600 + 120)
    assert bytes_in_memory(fast) == 720 * 2 + 34 * 4 * (1 if kind == "bfloat16" else 2)
    size = {"bfloat16": 2, "int8-dynamic": 1}[kind]
    assert fast[0].values.element_size() == size and fast[0].stored == 20 * 30 + 30
    folder = secateur.save(fast, tmp_path / "fast")
    loaded = secateur.load(folder, copy.deepcopy(model))
    assert torch.equal(loaded(x), fast(x)) and isinstance(loaded[2], DenseLinear)
    again = dense_again(copy.deepcopy(fast))
    assert torch.allclose(again(x), model(x), atol=0.05) and isinstance(again[2], nn.Linear)


def test_parts_that_do_not_fit_are_refused() -> None:
    good, scale = torch.ones(2, 3, dtype=torch.int8), torch.ones(2)
    for values, scales in (
        (good, scale[:1]), (good, None), (good.float(), scale), (good, -scale), (good.view(-1), scale),
        (torch.full((2, 2), float("nan"), dtype=torch.bfloat16), None),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="dense values"):
            DenseLinear.restored(values, scales, None, "none")


def test_candidates_without_hope_are_given_up_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is far slower runs twice; what cannot hold the weight takes for ever."""
    calls = {"slow": 0, "fast": 0}

    class Fake(nn.Module):
        def __init__(self, name: str, pause: float) -> None:
            super().__init__()
            self.name, self.pause = name, pause

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            calls[self.name] += 1
            time.sleep(self.pause)
            return x

    def made(self: Site, kind: str, index: str, *_: object) -> nn.Module:
        if kind == "bfloat16":
            raise ModelError("too large")
        return Fake("slow", 0.1) if kind == "int8" else Fake("fast", 0.001)

    monkeypatch.setattr(Site, "made", made)
    layer = nn.Linear(8, 8)
    layer.forward = Fake("fast", 0.01).forward  # type: ignore[method-assign]
    found = _measure(Site("a", layer), (3,), ["int8.col", "float32.col", "bfloat16.col"], cold=False, repeats=5)
    assert calls == {"slow": 2, "fast": 14} and found["bfloat16.col"] == math.inf
    assert found["float32.col"] < found["dense"] < found["int8.col"]
