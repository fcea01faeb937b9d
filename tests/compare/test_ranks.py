"""Ranks: Demšar's tables and example, scipy's Friedman test, and what becomes of holes and failures."""

from __future__ import annotations

import json

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.compare.ranks import critical_difference, friedman, groups_of, nemenyi, rank
from secateur.errors import DataError

from .made import rows


def test_critical_values_are_those_of_demsar_table_5() -> None:
    at_95 = [1.960, 2.343, 2.569, 2.728, 2.850, 2.949, 3.031, 3.102, 3.164]
    at_90 = [1.645, 2.052, 2.291, 2.459, 2.589, 2.693, 2.780, 2.855, 2.920]
    for k, (q95, q90) in enumerate(zip(at_95, at_90, strict=True), 2):
        assert nemenyi(k, 0.95) == pytest.approx(q95, abs=1.1e-3)
        assert nemenyi(k, 0.90) == pytest.approx(q90, abs=1.1e-3)
    # Section 3.2.4: four classifiers on fourteen data sets, 1.25 and 1.12.
    assert critical_difference(4, 14) == pytest.approx(1.25, abs=5e-3)
    assert critical_difference(4, 14, 0.9) == pytest.approx(1.12, abs=5e-3)


def test_friedman_on_demsars_example() -> None:
    # Table 6: AUC of C4.5 with m = 0, m = 1 (tuned) and so on; section 3.2.4: chi square 9.28, F 3.69.
    auc = [
        [0.763, 0.768, 0.771, 0.798],
        [0.599, 0.591, 0.590, 0.569],
        [0.954, 0.971, 0.968, 0.967],
        [0.628, 0.661, 0.654, 0.657],
        [0.882, 0.888, 0.886, 0.898],
        [0.936, 0.931, 0.916, 0.931],
        [0.661, 0.668, 0.609, 0.685],
        [0.583, 0.583, 0.563, 0.625],
        [0.775, 0.838, 0.866, 0.875],
        [1.000, 1.000, 1.000, 1.000],
        [0.940, 0.962, 0.965, 0.962],
        [0.619, 0.666, 0.614, 0.669],
        [0.972, 0.981, 0.9751, 0.975],
        [0.957, 0.978, 0.946, 0.970],
    ]
    ranks = np.array([scipy.stats.rankdata([-x for x in row]) for row in auc])
    assert ranks.mean(0) == pytest.approx([3.143, 2.000, 2.893, 1.964], abs=1e-3)
    k, n = 4, 14
    plain = 12 * n / (k * (k + 1)) * ((ranks.mean(0) ** 2).sum() - k * (k + 1) ** 2 / 4)
    assert plain == pytest.approx(9.28, abs=5e-3)
    assert (n - 1) * plain / (n * (k - 1) - plain) == pytest.approx(3.69, abs=5e-3)
    chi, p, _, f_p = friedman(ranks)  # corrected for ties, which the paper's are not
    theirs = scipy.stats.friedmanchisquare(*ranks.T)
    assert (chi, p) == pytest.approx((theirs.statistic, theirs.pvalue))
    assert chi > plain and f_p < p


@given(st.integers(0, 10_000), st.integers(3, 5), st.integers(2, 6))
@settings(max_examples=25, deadline=None)
def test_friedman_is_scipys_with_ties(seed: int, k: int, n: int) -> None:
    scores = np.random.default_rng(seed).integers(0, 4, (n, k))
    ranks = np.array([scipy.stats.rankdata(row) for row in scores])
    chi, p, f, f_p = friedman(ranks)
    if all(len(set(row)) == 1 for row in scores):
        assert (chi, p, f, f_p) == (0.0, 1.0, 0.0, 1.0)
    else:
        theirs = scipy.stats.friedmanchisquare(*ranks.T)
        assert (chi, p) == pytest.approx((theirs.statistic, theirs.pvalue), abs=1e-9)


@given(st.lists(st.floats(1, 9), min_size=1, max_size=8), st.floats(0.1, 4))
@settings(max_examples=60, deadline=None)
def test_groups_are_all_largest_runs(means: list[float], critical: float) -> None:
    means = sorted(means)
    k = len(means)
    runs = {(i, j) for i in range(k) for j in range(i + 1, k) if means[j] - means[i] < critical}
    largest = {(i, j) for i, j in runs if not any((a, b) != (i, j) and a <= i and j <= b for a, b in runs)}
    assert set(groups_of(means, critical)) == largest


def study(shift: float = 1.0, blocks: int = 10) -> list[object]:
    generator = np.random.default_rng(5)
    made: list[object] = []
    for block in range(blocks):
        for m in range(4):
            scores = m * shift + 0.1 * generator.normal(size=2)
            made += rows({f"m{m}": scores}, f"0.{block + 10}", subject=f"s{block % 2}")
    return made


def test_rank_names_the_best_and_those_behind() -> None:
    found = rank(study())  # type: ignore[arg-type]
    assert found.labels == ("m3", "m2", "m1", "m0") and found.means == (1.0, 2.0, 3.0, 4.0)
    assert found.critical == pytest.approx(critical_difference(4, 10))
    assert found.groups == (("m3", "m2"), ("m2", "m1"), ("m1", "m0")) and found.shown
    assert found.text == "m3 ranks best in 10 blocks; shown to rank behind it: m1, m0"
    assert json.loads(json.dumps(found.to_dict()))["blocks"][0] == "s0 at 0.10"
    by_subject = rank(study(), by="subject")  # type: ignore[arg-type]
    assert by_subject.blocks == ("s0", "s1") and by_subject.means == (1.0, 2.0, 3.0, 4.0)
    with pytest.raises(DataError, match="not by 'seed'"):
        rank([], by="seed")  # type: ignore[arg-type]


def test_nothing_shown_is_said() -> None:
    found = rank(study(0.0))  # type: ignore[arg-type]
    assert not found.shown and found.groups == (tuple(found.labels),)
    assert found.text == "no difference between the ranks of 4 contenders shown in 10 blocks"
    few = rank(rows({"a": [1.0], "b": [2.0]}))
    assert few.critical is None and few.labels == ("b", "a")
    assert few.text == "ranks need two contenders in two blocks, and there are 2 in 1"
    assert rank([]).labels == ()


def test_failures_are_last_and_holes_are_left_out() -> None:
    made = rows({"a": [0.9, None], "b": [0.1, 0.1], "c": [0.2, 0.2]}, "0.5")
    made += rows({"a": [0.9, 0.9], "b": [0.1, 0.1], "c": [0.1, 0.1]}, "0.9")
    found = rank(made)
    assert dict(found.table) == {"a": (3.0, 1.0), "b": (2.0, 2.5), "c": (1.0, 2.5)}
    holes = rank([*made, *rows({"d": [0.5, 0.5]}, "0.9"), *rows({"a": [0.4]}, "0.95")])
    assert holes.left_out == ("toy at 0.95", "d") and set(holes.labels) == {"a", "b", "c"}
    lower = rank([*rows({"a": [9.0], "b": [8.0]}, "0.5", up=False), *rows({"a": [9.0], "b": [8.0]}, "0.9", up=False)])
    assert lower.labels == ("b", "a")
