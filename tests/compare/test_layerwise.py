"""Profiles, overlap of masks, collapse, and the sketch that overlap is made of."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.compare.layerwise import collapses, jaccard, overlaps, profiles
from secateur.compare.rows import Row
from secateur.compare.sketch import pack, unpack
from secateur.errors import DataError

from .made import row


@given(st.lists(st.lists(st.booleans(), max_size=20), max_size=5))
@settings(max_examples=60, deadline=None)
def test_sketches_come_back(layers: list[list[bool]]) -> None:
    found = unpack(pack([np.array(layer, bool) for layer in layers]))
    assert [layer.tolist() for layer in found] == layers


@pytest.mark.parametrize(
    "bad", [{}, {"bits": "oA==", "counts": [9]}, {"bits": "*", "counts": [1]}, {"bits": "oA==", "counts": [9, -1]}]
)
def test_what_is_no_sketch_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="a sketch of a mask"):
        unpack(bad)


def test_expected_overlap_is_that_of_independent_masks() -> None:
    generator = np.random.default_rng(0)
    sizes, keep = (400, 900), ((100, 300), (400, 90))
    found = []
    for _ in range(300):
        masks = [[generator.permutation(np.arange(n) < kept) for n, kept in zip(sizes, of, strict=True)] for of in keep]
        found.append(jaccard(*masks))
    seen, expected = np.array(found, float).T
    assert len(set(expected.tolist())) == 1
    both = 100 * 400 / 400 + 300 * 90 / 900
    assert expected[0] == pytest.approx(both / (100 + 300 + 400 + 90 - both))
    assert seen.mean() == pytest.approx(expected[0], abs=4 * seen.std() / np.sqrt(300))


@given(st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_overlap_is_that_of_sets(seed: int) -> None:
    generator = np.random.default_rng(seed)
    masks = [[generator.random(n) < generator.random() for n in (3, 0, 7, 1)] for _ in range(2)]
    one, two = ({(layer, i) for layer, bits in enumerate(mask) for i in np.flatnonzero(bits)} for mask in masks)
    found, expected = jaccard(*masks)
    assert found == (pytest.approx(len(one & two) / len(one | two)) if one | two else None)
    meet = sum(a.sum() * b.sum() / max(1, len(a)) for a, b in zip(*masks, strict=True))
    assert expected == (pytest.approx(meet / (len(one) + len(two) - meet)) if one | two else None)


def masked(label: str, seed: int, bits: list[list[bool]]) -> Row:
    return row(label, "0.5", seed, 0.5, sketch=pack([np.array(layer) for layer in bits]))


def test_overlaps_by_hand() -> None:
    one, two = [[True, True, False, False], [True, False]], [[True, False, True, False], [True, False]]
    made = [masked("a", 0, one), masked("b", 0, two), masked("a", 1, one), masked("b", 1, one)]
    made += [masked("c", 0, [[True, True]]), row("d", "0.5", 0, 0.5), row("e", "0.5", 0, None, failed=True)]
    found = {(one.left, one.right): one for one in overlaps(made)}
    assert set(found) == {("a", "a"), ("b", "b"), ("a", "b")}  # c has other positions, and one seed
    between = found["a", "b"]
    assert (between.jaccard.value, between.jaccard.n) == (pytest.approx((2 / 4 + 1) / 2), 2)
    assert between.expected == pytest.approx(1.5 / (6 - 1.5))
    assert between.layers == (
        (pytest.approx((1 / 3 + 1) / 2), pytest.approx(1 / 3)),
        (1.0, pytest.approx(0.25 / 0.75 * 1.0)),
    )
    assert found["a", "a"].jaccard.value == 1.0 and found["a", "a"].jaccard.low is None
    assert found["b", "b"].jaccard.value == pytest.approx(0.5)
    assert overlaps([masked("a", 0, [[False]]), masked("b", 0, [[False]])]) == []


def layered(label: str, target: str, seed: int, kept: list[int], sizes: tuple[int, ...] = (10, 2000)) -> Row:
    layers = [{"name": f"l{i}", "parameters": n, "kept": k} for i, (n, k) in enumerate(zip(sizes, kept, strict=True))]
    return row(label, target, seed, 0.5, layers=layers)


def test_profiles_and_collapse() -> None:
    made = [
        layered("a", "0.9", 0, [1, 200]),
        layered("a", "0.9", 1, [3, 200]),
        layered("a", "0.99", 0, [0, 20]),
        layered("a", "0.99", 1, [1, 2]),
        layered("a", "0.9", 2, [1, 1], sizes=(5, 5)),
        layered("b", "0.9", 0, [2, 200]),
        row("c", "0.9", 0, 0.5),
    ]
    found = {(one.label, one.target): one for one in profiles(made)}
    assert set(found) == {("a", "0.9"), ("a", "0.99"), ("b", "0.9")}
    first = found["a", "0.9"].layers[0]
    assert (first.density, first.low, first.high) == (pytest.approx(0.2), pytest.approx(0.1), pytest.approx(0.3))
    assert found["a", "0.9"].n == 2  # the run with other layers is not averaged with them
    gone = {one.label: one for one in collapses(made)}
    assert gone["a"].first == "0.99" and gone["b"].first is None and gone["c"].targets == ()
    (at,) = gone["a"].targets
    assert (at.gone, at.almost, at.seeds, at.n) == (("l0",), ("l1",), 2, 2)
    assert gone["a"].to_dict()["first"] == "0.99"
