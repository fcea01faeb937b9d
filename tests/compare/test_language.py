"""Held-out text, kinds of tokens, and positions of sketches."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from secateur.compare.language import KINDS, Held, kind_of, losses
from secateur.compare.positions import OF_LAYER, POSITIONS, positions, sketch_of
from secateur.compare.sketch import unpack
from secateur.data import Windows, windows
from secateur.errors import DataError, NumericalError


class Bigram(nn.Module):
    """The next token depends on this one alone."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        return SimpleNamespace(logits=self.table[input_ids])


def text(count: int, length: int = 6, vocabulary: int = 5) -> Tensor:
    return torch.randint(vocabulary, (count, length), generator=torch.Generator().manual_seed(count))


def test_losses_are_the_definition() -> None:
    table = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
    ids = text(3)
    found = losses(Bigram(table), ids)
    expected = [-table.log_softmax(-1)[row[k], row[k + 1]] for row in ids for k in range(5)]
    torch.testing.assert_close(found.nats, torch.stack(expected))
    assert found.count == 15
    assert found.perplexity == pytest.approx(math.exp(float(torch.stack(expected).mean())), rel=1e-5)
    kinds = torch.tensor([0, 1, 2, 3, 3])
    by_kind = found.by_kind(kinds)
    weights = {name: int((kinds[found.tokens] == k).sum()) for k, name in enumerate(KINDS)}
    total = sum(weights[name] * math.log(value) for name, value in by_kind.items())
    assert total / 15 == pytest.approx(math.log(found.perplexity), rel=1e-5), "kinds add up to the whole"


def test_a_model_that_says_nan_is_refused() -> None:
    with pytest.raises(NumericalError, match="NaN or infinite"):
        losses(Bigram(torch.full((5, 5), math.nan)), text(2))


@given(st.integers(3, 40))
def test_validation_and_test_share_no_window(count: int) -> None:
    ids = torch.arange(count * 4).reshape(count, 4)
    held = Held.of(Windows(ids, "x", ""))
    assert len(held.valid) + len(held.test) == count and len(held.valid) == count // 3
    assert not set(held.valid.flatten().tolist()) & set(held.test.flatten().tolist())


def test_too_little_text_to_hold_out() -> None:
    with pytest.raises(DataError, match="three or more"):
        Held.of(Windows(text(2), "x", ""))


@pytest.mark.parametrize(
    "piece, kind",
    [("▁the", 3), ("the", 4), ("Ġ", 0), ("Ċ", 0), ("Ġ1945", 1), ("½", 1), ("ĠWar", 2), ("We", 2), ("'s", 4), ("--", 0)],
)
def test_kinds_of_pieces(piece: str, kind: int) -> None:
    assert kind_of(piece) == kind


def test_a_seed_draws_other_windows_none_twice() -> None:
    def tokenizer(text: str, **_: Any) -> Any:
        return SimpleNamespace(input_ids=[ord(c) % 97 for c in text])

    drawn = [windows("text:calibration", tokenizer, count=8, length=64, seed=s).ids for s in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert len({tuple(row.tolist()) for row in drawn[0]}) == 8


@given(st.integers(1, 5000), st.integers(1, 1024), st.integers(0, 50))
def test_positions_are_distinct_and_fixed(numel: int, count: int, layer: int) -> None:
    found = positions(numel, count, layer)
    assert len(found) == min(numel, count) == len(set(found.tolist())) and int(found.max()) < numel
    assert torch.equal(found, positions(numel, count, layer))


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 60)), min_size=1, max_size=4), st.integers(0, 99))
def test_a_sketch_holds_the_bits_at_its_positions(shapes: list[tuple[int, int]], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    masks = [torch.rand(o, i, generator=generator) < 0.5 for o, i in shapes]
    bits = unpack(sketch_of(masks, len(masks)))
    count = min(OF_LAYER, POSITIONS // len(masks))
    for k, (mask, found) in enumerate(zip(masks, bits, strict=True)):
        assert found.tolist() == mask.flatten()[positions(mask.numel(), count, k)].tolist()
