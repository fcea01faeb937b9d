"""Intervals, paired differences, corrections: against scipy, tables, plain loops, and by their properties."""

from __future__ import annotations

import builtins
import math
from typing import Any

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.compare import statistics
from secateur.compare.cells import Measure, cells, tables
from secateur.compare.statistics import (
    adjust,
    bca_interval,
    block_error,
    bootstrap_needs,
    dunnett,
    dunnett_p,
    levels,
    mean,
    paired,
    t_interval,
    tukey,
)
from secateur.errors import DataError, SecateurError

from .made import row, rows

numbers = st.floats(-1e3, 1e3).map(lambda x: round(x, 3))


@given(st.lists(numbers, min_size=2, max_size=8), st.sampled_from([0.5, 0.9, 0.95, 0.999]))
@settings(max_examples=40, deadline=None)
def test_interval_of_a_mean_is_scipys(values: list[float], level: float) -> None:
    found = mean(values, level=level)
    if len(set(values)) == 1:
        assert (found.value, found.low, found.high) == (values[0], values[0], values[0])
        return
    theirs = scipy.stats.ttest_1samp(values, 0.0).confidence_interval(level)
    assert found.low == pytest.approx(theirs.low, rel=1e-9, abs=1e-9)
    assert found.high == pytest.approx(theirs.high, rel=1e-9, abs=1e-9)
    assert found.n == len(values) and found.failures == 0


def test_paired_difference_is_scipys_and_takes_the_seeds_that_both_have() -> None:
    left, right = {0: 0.9, 1: 0.8, 2: 0.85, 7: 0.1}, {2: 0.8, 1: 0.77, 0: 0.84, 9: 0.99}
    found = paired(left, right)
    theirs = scipy.stats.ttest_rel([0.9, 0.8, 0.85], [0.84, 0.77, 0.8])
    assert found.n == 3
    assert found.p == pytest.approx(theirs.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(theirs.confidence_interval(0.95)))


def test_ratios_are_differences_of_logarithms() -> None:
    left, right = {0: 20.0, 1: 33.0, 2: 40.0}, {0: 10.0, 1: 15.0, 2: 25.0}
    found = paired(left, right, scale="ratio")
    logs = paired({k: math.log(v) for k, v in left.items()}, {k: math.log(v) for k, v in right.items()})
    assert found.value == pytest.approx((2 * 2.2 * 1.6) ** (1 / 3))
    assert (found.low, found.high, found.p) == pytest.approx(
        (math.exp(logs.low or 0), math.exp(logs.high or 0), logs.p)
    )
    swapped = paired(right, left, scale="ratio")
    assert swapped.value == pytest.approx(1 / found.value) and swapped.low == pytest.approx(1 / found.high)
    assert mean([1.0, 100.0], scale="ratio").value == pytest.approx(10.0)
    with pytest.raises(DataError, match="positive, not 0"):
        mean([0.0, 1.0], scale="ratio")


@pytest.mark.parametrize("bad", [None, math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_a_failure(bad: float | None) -> None:
    found = mean([1.0, bad, 3.0])
    assert (found.value, found.n, found.failures) == (2.0, 2, 1)
    both = paired({0: 1.0, 1: bad, 2: 2.0}, {0: 0.0, 1: 0.0, 2: bad, 3: 4.0})
    assert (both.value, both.n, both.failures, both.low) == (1.0, 1, 2, None)
    assert mean([bad]).text() == "no score"


def test_no_spread_gives_no_width_whatever_rounding_does() -> None:
    found = paired({0: 0.1, 1: 0.1, 2: 0.1}, {0: 0.0, 1: 0.0, 2: 0.0})
    assert (found.low, found.high, found.p, found.spread, found.shown) == (0.1, 0.1, 0.0, 0.0, 1)
    equal = paired({0: 0.1, 1: 0.1}, {0: 0.1, 1: 0.1})
    assert (equal.p, equal.shown) == (1.0, 0)


def test_bca_is_efrons_and_refuses_few_seeds() -> None:
    values = np.random.default_rng(3).exponential(size=20)
    # The algorithm again, with a plain loop (Efron and Tibshirani 1993, section 14.3).
    generator = np.random.default_rng(1)
    means = np.array([generator.choice(values, 20).mean() for _ in range(20_000)])
    z0 = scipy.stats.norm.ppf((means < values.mean()).mean())
    jack = np.array([np.delete(values, i).mean() for i in range(20)])
    away = jack.mean() - jack
    a = (away**3).sum() / (6 * (away**2).sum() ** 1.5)
    ends = []
    for z in scipy.stats.norm.ppf([0.025, 0.975]):
        ends.append(np.quantile(means, scipy.stats.norm.cdf(z0 + (z0 + z) / (1 - a * (z0 + z)))))
    found = mean(values, how="bca")
    assert (found.low, found.high) == pytest.approx(tuple(ends), rel=0.03)
    assert bca_interval(values, seed=0) == bca_interval(values, seed=0)
    assert bca_interval(np.full(7, 0.3)) == (0.3, 0.3)
    with pytest.raises(DataError, match="needs 6 seeds or more, not 5"):
        mean([1.0, 2.0, 3.0, 4.0, 5.0], how="bca")
    assert bootstrap_needs(0.95) == 6


@given(st.lists(st.floats(0, 1), max_size=8), st.sampled_from([0.5, 0.95]))
@settings(max_examples=60)
def test_corrections_against_their_definitions(p: list[float], level: float) -> None:
    m = len(p)
    order = sorted(range(m), key=lambda i: p[i])
    for rank, index in enumerate(order):  # Holm: the largest of the steps up to this one
        expected = max((min(1.0, (m - k) * p[order[k]]) for k in range(rank + 1)), default=0.0)
        assert adjust(p)[index] == expected
    assert all(a <= b for a, b in zip(adjust(p), adjust(p, "bonferroni"), strict=True))
    assert adjust(p, "none") == p
    for correction in ("holm", "bonferroni", "none"):
        at = levels(p, level, correction)
        assert all(level - 1e-12 <= x < 1 for x in at)
        for raw, adjusted, one in zip(p, adjust(p, correction), at, strict=True):
            if abs(adjusted - (1 - level)) > 1e-9:
                assert (adjusted <= 1 - level) == (raw <= 1 - one + 1e-15)


@given(st.lists(st.lists(numbers, min_size=3, max_size=3), min_size=1, max_size=6))
@settings(max_examples=40, deadline=None)
def test_interval_excludes_zero_exactly_if_the_corrected_p_rejects(groups: list[list[float]]) -> None:
    values = np.array(groups)
    _, _, p = t_interval(values)
    for correction in ("holm", "bonferroni", "none"):
        centre, half, _ = t_interval(values, np.array(levels(list(p), 0.95, correction)))
        for low, high, adjusted in zip(centre - half, centre + half, adjust(list(p), correction), strict=True):
            if abs(adjusted - 0.05) > 1e-6:
                assert (low > 0 or high < 0) == (adjusted <= 0.05)


def test_dunnett_and_tukey_bounds_are_those_of_the_tables() -> None:
    # Dunnett 1964, two-sided, 5 %: degrees of freedom 5, 10, 20 with 2, 4 and 9 treatments; 1955, one-sided.
    table = {(5, 2): 3.03, (10, 4): 2.89, (20, 2): 2.38, (20, 4): 2.65, (20, 9): 2.95}
    for (freedom, others), bound in table.items():
        assert dunnett(0.95, others, freedom) == pytest.approx(bound, abs=0.006)
    assert dunnett(0.95, 4, 10, 1) == pytest.approx(2.47, abs=0.006)
    # With one comparison it is Student's t; with two contenders Tukey's bound is too.
    for freedom in (2, 5, 30):
        assert dunnett(0.95, 1, freedom) == pytest.approx(scipy.stats.t.isf(0.025, freedom), rel=1e-6)
        assert dunnett(0.95, 1, freedom, 1) == pytest.approx(scipy.stats.t.isf(0.05, freedom), rel=1e-6)
        assert tukey(0.95, 2, freedom) == pytest.approx(scipy.stats.t.isf(0.025, freedom), rel=1e-6)
    assert tukey(0.95, 4, 20) == pytest.approx(3.96 / math.sqrt(2), abs=0.01)
    # By scipy's multivariate t.
    shape = np.full((3, 3), 0.5) + 0.5 * np.eye(3)
    theirs = scipy.stats.multivariate_t(np.zeros(3), shape, df=6, seed=0)
    inside = theirs.cdf(np.full(3, 2.2), lower_limit=np.full(3, -2.2), maxpts=200_000)
    assert dunnett_p(2.2, 3, 6) == pytest.approx(1 - inside, abs=2e-3)


def test_block_error_is_that_of_the_analysis_of_variance() -> None:
    scores = np.random.default_rng(0).normal(size=(4, 3))
    total = ((scores - scores.mean()) ** 2).sum()
    for axis, size in ((1, 3), (0, 4)):
        total -= size * ((scores.mean(axis) - scores.mean()) ** 2).sum()
    variance, freedom = block_error(scores)
    assert freedom == 6 and float(variance) == pytest.approx(total / 6)
    two, _ = block_error(scores[:2])  # of two contenders it is half the variance of their difference
    assert float(two) == pytest.approx((scores[0] - scores[1]).var(ddof=1) / 2)


def test_cells_hold_seeds_failures_and_other_figures() -> None:
    made = rows({"a": [0.5, None, math.nan], "b": [0.6, 0.7]}, cost={"seconds": 4.0})
    table = tables([*made, row("dense", "", 0, 0.9)], dense=True)[("toy", "0.9")]
    assert set(table) == {"a", "b", "dense"}
    assert (table["a"].finite, table["a"].failures) == ({0: 0.5}, 2)
    seconds = cells(made, Measure("seconds", ("cost", "seconds")))["toy", "0.9", "a"]
    assert (dict(seconds.scores), seconds.higher_is_better) == ({0: 4.0, 1: None, 2: 4.0}, False)
    tuned = row("a", "0.9", 0, 0.99)
    assert cells([*made, type(tuned)(**{**tuned.to_dict(), "role": "tune"})]) == cells(made)
    with pytest.raises(DataError, match="two runs of 'a' of 'toy' at 0.9 have seed 0"):
        cells([*made, row("a", "0.9", 0, 0.4)])
    with pytest.raises(DataError, match="by ratio, and one is not positive"):
        cells(rows({"a": [0.0]}, metric="perplexity", up=False))
    with pytest.raises(DataError, match="scored by accuracy and by bits"):
        cells([*made, row("c", "0.9", 0, 1.0, metric="bits", up=False)])


def test_without_scipy_there_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def lacking(name: str, *args: Any, **more: Any) -> Any:
        if name.startswith("scipy"):
            raise ImportError(name)
        return real(name, *args, **more)

    monkeypatch.setattr(builtins, "__import__", lacking)
    with pytest.raises(SecateurError, match=r"need scipy: pip install 'secateur\[compare\]'"):
        statistics.mean([1.0, 2.0])
