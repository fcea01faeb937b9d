"""Weight sharing and Huffman codes: lossless where they should be, near the entropy, and against brute force."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from secateur.errors import ModelError, RecipeError
from secateur.formats.huffman import code_lengths, decode, encode
from secateur.formats.sharing import cluster, restored, share


@given(st.integers(1, 40), st.integers(0, 5000), st.floats(0.05, 3), st.integers(0, 2**20))
def test_huffman_round_trip_and_entropy(count: int, length: int, skew: float, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    chance = torch.arange(1, count + 1).double() ** -skew
    symbols = torch.multinomial(chance, length, replacement=True, generator=rng) if length else torch.zeros(0).long()
    made = encode(symbols, count)
    assert torch.equal(decode(made), symbols)
    if length:
        share_of = torch.bincount(symbols).double() / length
        entropy = float(-(share_of[share_of > 0] * share_of[share_of > 0].log2()).sum())
        bits = float((made.lengths.double()[symbols]).mean())
        assert entropy - 1e-9 <= bits <= entropy + 1, "Shannon's bounds"
        assert made.data.numel() == -(-int(made.lengths.long()[symbols].sum()) // 8)


def test_huffman_is_optimal() -> None:
    """Against all lengths that satisfy Kraft's inequality."""
    counts = torch.tensor([13, 2, 7, 1, 4])
    best = min(
        sum(int(c) * n for c, n in zip(counts, lengths, strict=True))
        for lengths in itertools.product(range(1, 6), repeat=5)
        if sum(2.0**-n for n in lengths) <= 1
    )
    assert int((counts * code_lengths(counts)).sum()) == best


def test_long_words_are_cut() -> None:
    counts = torch.tensor([2**k for k in range(30)])  # a plain Huffman code has words of 29 bits
    lengths = code_lengths(counts)
    assert int(lengths.max()) <= 16 and float((2.0 ** -lengths.double()).sum()) <= 1
    symbols = torch.arange(30).repeat(3)
    assert torch.equal(decode(encode(torch.cat([symbols, torch.full((70000,), 29)]), 30))[:90], symbols)


def test_damaged_streams_are_refused() -> None:
    made = encode(torch.arange(3000) % 7, 7)
    for bad in (
        {"starts": made.starts + 10**6},
        {"lengths": torch.ones(7, dtype=torch.uint8)},
        {"starts": made.starts[:-1]},
        {"data": made.data[:10]},
    ):
        with pytest.raises(ModelError, match="damaged"):
            decode(type(made)(**{**vars(made), **bad}))


@given(st.integers(1, 5), st.integers(1, 300), st.integers(0, 2**20))
def test_clusters(bits: int, length: int, seed: int) -> None:
    x = torch.randn(length, generator=torch.Generator().manual_seed(seed))
    last = torch.inf
    for rounds in range(4):
        centers, nearest = cluster(x, bits, rounds)
        error = float((centers[nearest].double() - x.double()).square().sum())
        assert error <= last * (1 + 1e-6) + 1e-12, "no round makes it worse"
        last = error
    assert centers.numel() <= 2**bits and torch.equal(centers, centers.sort().values)
    gap = (x[:, None] - centers).abs()
    assert torch.allclose(gap.min(1).values, gap.gather(1, nearest[:, None])[:, 0], atol=1e-6)


@given(st.sampled_from([0.0, 0.5, 0.97, 1.0]), st.integers(1, 8), st.integers(0, 2**20))
def test_shared_matrices(sparsity: float, bits: int, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    weight = torch.randn(11, 37, generator=rng)
    weight[torch.rand(weight.shape, generator=rng) < sparsity] = 0
    made = share(weight, bits)
    dense = made.dense()
    assert torch.equal(dense == 0, weight == 0) or bits < 3  # a center may fall on zero by chance where they are few
    assert dense.count_nonzero() <= weight.count_nonzero() and len(dense[dense != 0].unique()) <= 2**bits
    assert torch.equal(restored(made.stored()).dense(), dense)
    again = share(dense, 8)
    assert torch.equal(again.dense(), dense), "what has few values already is stored without loss"


def test_size_on_disk(tmp_path: Path) -> None:
    """90 % zeros at 5 bits: the published storage of Deep compression is a few percent of float32."""
    weight = torch.randn(300, 784)
    weight[torch.rand(weight.shape) < 0.9] = 0
    made = share(weight, 5)
    save_file(made.stored(), tmp_path / "w.safetensors")
    size = (tmp_path / "w.safetensors").stat().st_size
    assert made.bytes() <= size <= made.bytes() + 1500
    assert size < 0.04 * weight.numel() * 4
    assert torch.equal(restored(load_file(tmp_path / "w.safetensors")).dense(), made.dense())


def test_refusals() -> None:
    with pytest.raises(RecipeError, match="only finite matrices"):
        share(torch.full((2, 2), torch.nan))
    with pytest.raises(RecipeError, match="bits must be"):
        share(torch.ones(2, 2), 9)
