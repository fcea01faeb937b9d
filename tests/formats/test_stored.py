"""The smallest files: exact round trips, bytes as predicted, and damage that is seen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from secateur.errors import ModelError, RecipeError
from secateur.formats import Grid, bytes_of, grid
from secateur.formats.grid import grids_of
from secateur.formats.integers import packed
from secateur.formats.sharing import codebook
from secateur.formats.stored import FORMS, decode, encode, pack_bits, unpack_bits


def sizes(tensors: dict[str, Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors.values())


def on_grid(shape: tuple[int, int], bits: int, group: int, symmetric: bool, gone: float) -> tuple[Tensor, Grid]:
    rng = torch.Generator().manual_seed(shape[0] + 7 * shape[1] + bits)
    weight = torch.randn(shape, generator=rng)
    weight[torch.rand(shape, generator=rng) < gone] = 0
    found = grid(weight, bits, group, symmetric=symmetric)
    return found.round(weight), found


@given(st.integers(1, 16), st.integers(0, 300))
def test_bits_come_back(bits: int, n: int) -> None:
    numbers = torch.randint(0, 2**bits, (n,), generator=torch.Generator().manual_seed(n))
    made = pack_bits(numbers, bits)
    assert made.numel() == -(-n * bits // 8) and torch.equal(unpack_bits(made, bits, n), numbers)


def test_bits_beyond_one_part() -> None:
    numbers = torch.arange((1 << 19) + 5) % 8
    assert torch.equal(unpack_bits(pack_bits(numbers, 3), 3, len(numbers)), numbers)


@given(
    st.integers(1, 9), st.sampled_from([(8, 0), (12, 4), (16, 8), (10, 5)]), st.integers(2, 8), st.booleans(),
    st.sampled_from([0.0, 0.4, 0.9, 1.0]), st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
def test_what_is_stored_comes_back_in_the_bytes_predicted(
    rows: int, cut: tuple[int, int], bits: int, symmetric: bool, gone: float, dtype: torch.dtype
) -> None:
    columns, group = cut
    weight, found = on_grid((rows, columns), bits, group, symmetric, gone)
    weight = weight.to(dtype)
    least = []
    for form in FORMS:
        tensors, facts = encode(weight, found, form)
        back = decode(tensors, json.loads(json.dumps(facts)))
        assert back.dtype == dtype and torch.equal(back, weight)
        predicted = bytes_of(
            form, (rows, columns), nonzeros=int(weight.count_nonzero()), bits=bits, group=group, symmetric=symmetric,
            itemsize=dtype.itemsize,
        )  # fmt: skip
        assert sizes(tensors) == predicted
        least.append(predicted)
    assert sizes(encode(weight, found)[0]) == min(least), "the smallest is chosen"
    stock = packed("x", weight, found)
    assert sizes(stock) == bytes_of("pack-quantized", (rows, columns), bits=bits, group=group, symmetric=symmetric)


def test_which_is_smallest() -> None:
    weight, found = on_grid((64, 128), 4, 64, True, 0.0)
    assert encode(weight, found)[1]["form"] == "integers"
    weight, found = on_grid((64, 128), 4, 64, True, 0.5)
    assert encode(weight, found)[1]["form"] == "bitmask+integers"  # 1 + 4 / 2 bits, not 4
    assert encode(weight + 1e-3 * torch.randn(64, 128) * (weight != 0))[1]["form"] == "bitmask"
    assert encode(torch.randn(4, 4))[1]["form"] == "dense"


def test_integers_are_known_without_their_grid() -> None:
    """A scale for each row, as training on rounded weights leaves it."""
    for bits in (2, 4, 8):
        weight, found = on_grid((16, 96), bits, 0, True, 0.1)
        tensors, facts = encode(weight)
        assert facts["form"].endswith("integers") and facts["bits"] <= bits
        assert torch.equal(decode(tensors, facts), weight) and sizes(tensors) <= sizes(encode(weight, found)[0])
    assert encode(torch.tensor([[float("inf"), 0.0, 0.0, 0.0] * 4]))[1]["form"] == "bitmask"


@given(
    st.sampled_from([(6, 96, 32), (4, 128, 64), (3, 64, 16), (5, 48, 0)]), st.integers(2, 8), st.booleans(),
    st.sampled_from([0.0, 0.5]),
)  # fmt: skip
def test_groups_and_grids_that_are_not_symmetric_are_known_too(
    sizes_of: tuple[int, int, int], bits: int, symmetric: bool, gone: float
) -> None:
    rows, columns, group = sizes_of
    weight, found = on_grid((rows, columns), bits, group, symmetric, gone)
    tensors, facts = encode(weight)
    assert torch.equal(decode(tensors, facts), weight)
    assert sizes(tensors) <= sizes(encode(weight, found)[0]) + 2 * tensors.get("scale", torch.zeros(0)).numel()
    again = grids_of(weight, group, bits)
    assert again and all(torch.equal(g.round(weight), weight) and g.bits == bits for g in again)
    assert grids_of(torch.randn(8, columns), group) == []


def test_values_that_many_share_are_known_too() -> None:
    weight = torch.randn(64, 128)
    weight[weight.abs() < 0.8] = 0
    book = codebook(weight, 3)
    weight = book.round(weight)
    tensors, facts = encode(weight)
    assert facts["form"] == "shared" and torch.equal(decode(tensors, facts), weight)
    assert sizes(tensors) == sizes(encode(weight, book)[0])


def test_shared_values_and_other_shapes() -> None:
    kernel = torch.randn(6, 3, 3, 3)
    kernel[kernel.abs() < 0.8] = 0
    book = codebook(kernel, 3)
    kernel = book.round(kernel)
    tensors, facts = encode(kernel, book)
    assert facts["form"] == "shared" and torch.equal(decode(tensors, facts), kernel)
    assert torch.equal(decode(*encode(kernel)), kernel)


def test_what_was_changed_is_refused() -> None:
    weight, found = on_grid((4, 8), 4, 0, True, 0.2)
    with pytest.raises(RecipeError, match="changed after it was quantized"):
        encode(weight * 1.01, found, "integers")
    with pytest.raises(RecipeError, match="changed after it was quantized"):
        encode(torch.randn(4, 8), codebook(torch.randn(4, 8), 2))
    with pytest.raises(RecipeError, match="can be stored as dense, bitmask, not"):
        encode(weight, None, "integers")
    with pytest.raises(RecipeError, match="is not a divisor of the 10 inputs"):
        bytes_of("integers", (4, 10), group=4)


@pytest.mark.parametrize("form", ["bitmask", "integers", "bitmask+integers", "shared"])
def test_damage_is_seen(form: str) -> None:
    weight, found = on_grid((4, 8), 4, 4, False, 0.5)
    tensors, facts = encode(weight, codebook(weight, 4) if form == "shared" else found, form)
    wrong: list[tuple[dict[str, Tensor], dict[str, object]]] = []
    for part in tensors:
        wrong.append(({k: t for k, t in tensors.items() if k != part}, facts))
        if form != "shared":
            wrong.append(({**tensors, part: tensors[part][:-1]}, facts))
    wrong += [(tensors, {**facts, "shape": [4, 9]}), (tensors, {**facts, "form": "zip"})]
    wrong.append((tensors, {**facts, "dtype": "object"}))
    for parts, told in wrong:
        with pytest.raises(ModelError, match="damaged"):
            decode(parts, told)


def test_files(tmp_path: Path) -> None:
    """A module's directory: read, and refused where it was changed."""
    import secateur

    net = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
    made = secateur.prune(net, secateur.Recipe.of("magnitude", sparsity=0.5).quantized("int4:8"))
    made.save(tmp_path / "o", storage="smallest")
    fresh = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
    again = secateur.load(tmp_path / "o", fresh)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))
    with pytest.raises(ModelError, match="needs a fresh model"):
        secateur.load(tmp_path / "o")
    with pytest.raises(ModelError, match="does not fit the model"):
        secateur.load(tmp_path / "o", torch.nn.Sequential(torch.nn.Linear(16, 8)))
    with pytest.raises(ModelError, match="does not fit the model"):
        secateur.load(
            tmp_path / "o", torch.nn.Sequential(torch.nn.Linear(16, 9), torch.nn.ReLU(), torch.nn.Linear(9, 4))
        )
    (file,) = (tmp_path / "o").glob("stored-*.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(ModelError, match="was changed or cut off"):
        secateur.load(tmp_path / "o", fresh)
    (tmp_path / "o" / "stored.json").write_text("{}")
    with pytest.raises(ModelError, match="another version"):
        secateur.load(tmp_path / "o", fresh)
