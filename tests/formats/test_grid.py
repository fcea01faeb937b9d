"""The grids of integers and their layout in files."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from secateur.errors import ModelError, RecipeError
from secateur.formats.grid import Grid, grid, grid_of, parse_integers, short, steps_of
from secateur.formats.integers import described, pack_words, packed, unpack_words, unpacked


@st.composite
def matrices(draw: st.DrawFn) -> tuple[Tensor, int]:
    """A matrix with zeros in it and a group that divides its columns."""
    group, groups, rows = draw(st.sampled_from([1, 3, 8])), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    scale = 10.0 ** draw(st.integers(-6, 6))
    weight = torch.randn(rows, group * groups, generator=rng) * scale + draw(st.sampled_from([0.0, 3.0])) * scale
    gone = torch.rand(weight.shape, generator=rng) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    return weight.masked_fill(gone, 0.0), group


@given(matrices(), st.integers(2, 8), st.booleans(), st.sampled_from(["mse", "absmax"]))
def test_laws(given: tuple[Tensor, int], bits: int, symmetric: bool, clip: str) -> None:
    weight, group = given
    found = grid(weight, bits, group, symmetric=symmetric, clip=clip)
    codes, rounded = found.codes(weight), found.round(weight)
    half = 2 ** (bits - 1)
    assert codes.dtype == torch.int8 and int(codes.min()) >= -half and int(codes.max()) <= half - 1
    assert bool((rounded[weight == 0] == 0).all()), "zero is on the grid: masks survive"
    assert torch.equal(found.round(rounded), rounded) and torch.equal(found.codes(rounded), codes)
    assert torch.equal(torch.stack([found.column(weight[:, j], j) for j in range(weight.shape[1])], 1), rounded)
    step = found.scale.repeat_interleave(group, 1)
    zero = 0.0 if found.zero is None else found.zero.repeat_interleave(group, 1)
    inside = ((-half - zero) * step <= weight) & (weight <= (half - 1 - zero) * step)
    error = (rounded - weight).abs()
    assert bool((error[inside] <= step[inside] * (0.5 + 1e-5)).all())
    if clip == "absmax":
        assert bool((error <= step * (0.5 + 1e-5)).all()), "nothing is clipped"


@given(matrices(), st.integers(2, 8), st.booleans())
def test_the_search_is_never_worse(given: tuple[Tensor, int], bits: int, symmetric: bool) -> None:
    weight, group = given

    def error(clip: str) -> float:
        found = grid(weight, bits, group, symmetric=symmetric, clip=clip)
        return float((found.round(weight).double() - weight.double()).square().sum())

    assert error("mse") <= error("absmax") * (1 + 1e-5)


def test_a_mask_leaves_the_range_to_the_survivors() -> None:
    weight = torch.tensor([[100.0, 1.0, -0.5, 0.25]])
    found = grid(weight, 4, 0, clip="absmax", mask=weight < 50)
    assert float(found.scale) == float(short(torch.tensor(2 / 15)))


def test_an_asymmetric_grid_by_hand() -> None:
    weight = torch.tensor([[0.0, 1.0, 2.0, 15.0]])
    found = grid(weight, 4, 0, symmetric=False, clip="absmax")
    assert found.zero is not None and float(found.zero) == -8 and float(found.scale) == 1.0
    assert found.codes(weight).tolist() == [[-8, -7, -6, 7]] and torch.equal(found.round(weight), weight)


def test_short_scales() -> None:
    scale = torch.rand(1000) * 10.0 ** torch.randint(-20, 20, (1000,))
    found = short(scale)
    assert torch.equal(found.bfloat16().float(), found) and bool((found >= scale).all())
    assert bool((found <= scale * (1 + 2**-7)).all())


@given(st.integers(2, 8), st.integers(1, 70), st.integers(0, 2**20))
def test_words_round_trip(bits: int, columns: int, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (3, columns), generator=rng).to(torch.int8)
    words = pack_words(codes, bits)
    assert words.shape == (3, -(-columns * bits // 32)) and words.dtype == torch.int32
    assert torch.equal(unpack_words(words, bits, columns), codes)
    # By the definition of the layout: code k lies from bit k * bits on.
    value = sum((int(c) + 2 ** (bits - 1)) << (k * bits) for k, c in enumerate(codes[0].tolist()))
    assert [int(w) % 2**32 for w in words[0].tolist()] == [(value >> (32 * k)) % 2**32 for k in range(words.shape[1])]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group"), [(4, 16), (3, 8), (8, 0)])
def test_files_hold_the_weights_exactly(bits: int, group: int, symmetric: bool) -> None:
    weight = torch.randn(6, 32)
    found = grid(weight, bits, group, symmetric=symmetric)
    on_grid = found.round(weight)
    parts = {**packed("a", on_grid, found), "b.weight": weight, "a.bias": weight[0]}
    back = unpacked(parts, described(bits, group, symmetric, ["b"]), torch.float32)
    assert set(back) == {"a.weight", "b.weight", "a.bias"} and torch.equal(back["a.weight"], on_grid)
    assert parts["a.weight_packed"].numel() * 4 == 6 * 32 * bits // 8
    # A model in bfloat16 keeps its codes, though its weights have fewer digits than the grid's values.
    assert torch.equal(found.codes(on_grid.bfloat16().float()), found.codes(on_grid))


def test_damaged_files_are_refused() -> None:
    found = grid(torch.randn(4, 32), 4, 16)
    parts, config = packed("a", torch.randn(4, 32), found), described(4, 16, True, [])
    for bad in (
        {k: v for k, v in parts.items() if "scale" not in k},
        {**parts, "a.weight_shape": torch.tensor([4, 640])},
        {**parts, "a.weight_scale": parts["a.weight_scale"][:2]},
    ):
        with pytest.raises(ModelError, match="pack-quantized"):
            unpacked(bad, config, torch.float32)


@pytest.mark.parametrize(
    ("knobs", "sentence"),
    [
        (
            {"group": 24},
            "a group of 24 inputs is not a divisor of the 64 inputs of the matrix: choose a group of 8, or 0",
        ),
        ({"group": 7}, "choose a group of 0"),
        ({"bits": 1}, "bits must be"),
        ({"clip": "most"}, "mse or absmax"),
        ({"group": -1}, "or 0 for all"),
    ],
)
def test_refusals(knobs: dict[str, object], sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        grid(torch.zeros(2, 64), **{"bits": 4, "group": 64, **knobs})  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["int1", "int9", "float4", "int4:", "4"])
def test_names_that_are_not_understood(text: str) -> None:
    with pytest.raises(RecipeError, match="write int4"):
        parse_integers(text)


def test_an_empty_group_has_a_grid() -> None:
    found: Grid = grid(torch.zeros(2, 8), 4, 4)
    assert torch.equal(found.round(torch.zeros(2, 8)), torch.zeros(2, 8))


@given(st.integers(1, 5), st.integers(1, 40), st.integers(0, 2**20), st.sampled_from([0.0, 0.5, 1.0]))
def test_a_row_of_integers_is_known_again(rows: int, columns: int, seed: int, gone: float) -> None:
    """The step found is the scale times the common factor of the codes, and gives every weight back exactly."""
    rng = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=rng) * torch.rand(rows, 1, generator=rng)
    weight[torch.rand(rows, columns, generator=rng) < gone] = 0
    made = grid(weight, 8, 0)
    codes = made.codes(weight)
    values = made.values(codes)
    found = steps_of(values)
    for row, scale, step, code in zip(values, made.scale[:, 0], found, codes, strict=True):
        common = math.gcd(*code.tolist())
        assert float(step) == (float(scale) * common if common else 1.0)
        assert torch.equal((row / step).round() * step, row)


def test_other_rows_have_no_step() -> None:
    torch.manual_seed(0)
    assert steps_of(torch.randn(3, 50)).tolist() == [0, 0, 0]
    assert steps_of(torch.tensor([[1e-30, 1e30, 0.0]])).tolist() == [0]
    assert steps_of(torch.tensor([[200.0, 1.0], [127.0, 1.0]])).tolist() == [0, 1]


@given(matrices(), st.integers(2, 4), st.booleans())
def test_a_matrix_of_integers_in_groups_is_known_again(given: tuple[Tensor, int], bits: int, symmetric: bool) -> None:
    """Whatever was rounded to a grid of 4 bits or fewer lies on the one that is found, with scales as short."""
    weight, group = given
    values = grid(weight, bits, group, symmetric=symmetric).round(weight)
    found = grid_of(values, group)
    assert found is not None and found.bits == 4 and found.group == group
    codes = found.codes(values)
    assert torch.equal(found.values(codes), values) and torch.equal(short(found.scale), found.scale)
    assert int(codes.min()) >= -8 and int(codes.max()) <= 7
    if found.zero is not None:
        assert not symmetric and int(found.zero.min()) >= -8 and int(found.zero.max()) <= 7


def test_other_matrices_have_no_grid() -> None:
    assert grid_of(torch.tensor([[15.0, 1.0]]), 2) is not None  # 0 to 15
    assert grid_of(torch.tensor([[15.0, -1.0]]), 2) is None  # -1 to 15 are 17 values
    assert grid_of(torch.tensor([[1.0, 2.0], [1.0, 16.0]]), 2) is None, "one row of two"
    for bad in (torch.randn(2, 4), torch.ones(1, 3), torch.tensor([[1.0, math.inf]]), torch.empty(0, 2)):
        assert grid_of(bad, 2) is None
