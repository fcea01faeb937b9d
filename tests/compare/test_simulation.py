"""Intervals cover at their nominal rate, and false verdicts come at most at the stated rate, by simulation.

Counts are held against binomial bounds that a correct rate leaves once in a hundred thousand times; seeds are fixed.
"""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from secateur.compare.leaders import leaders
from secateur.compare.rows import Row
from secateur.compare.statistics import Floats, bca_interval, block_error, dunnett, levels, t_interval, tukey
from secateur.compare.verdicts import Rules, against, all_pairs

from .made import rows

RARE = 1e-5


def near(count: int, rounds: int, rate: float) -> bool:
    low, high = scipy.stats.binom(rounds, rate).ppf([RARE, 1 - RARE])
    return bool(low <= count <= high)


def at_most(count: int, rounds: int, rate: float) -> bool:
    return bool(count <= scipy.stats.binom(rounds, rate).isf(RARE))


def draw(rounds: int, contenders: int, n: int, seed: int, kind: str = "normal") -> Floats:
    """Scores of equal contenders that share the effect of their seeds."""
    generator = np.random.default_rng(seed)
    shape = (rounds, contenders, n)
    own = generator.normal(size=shape) if kind == "normal" else generator.exponential(size=shape) - 1
    return own + 3 * generator.normal(size=(rounds, 1, n))


def study(scores_kn: Floats, scale: str = "difference") -> list[Row]:
    named = {f"m{i}": list(of) for i, of in enumerate(scores_kn)}
    if scale == "ratio":
        return rows({k: np.exp(of) for k, of in named.items()}, metric="perplexity", up=False)
    return rows(named)


@pytest.mark.parametrize("level", [0.8, 0.95])
@pytest.mark.parametrize("n", [2, 3, 10])
def test_student_intervals_cover(n: int, level: float) -> None:
    scores = draw(20_000, 2, n, n)
    centre, half, p = t_interval(scores[:, 0] - scores[:, 1] + 0.7, level)
    assert near(int((np.abs(centre - 0.7) <= half).sum()), 20_000, level)
    _, _, p = t_interval(scores[:, 0] - scores[:, 1])
    assert near(int((p <= 1 - level).sum()), 20_000, 1 - level)


def test_bounds_would_notice() -> None:
    """Normal quantiles in place of Student's, or pairs taken for independent: both are far out."""
    scores = draw(20_000, 2, 3, 0)
    gap = scores[:, 0] - scores[:, 1]
    half = 1.96 * gap.std(1, ddof=1) / np.sqrt(3)
    assert not near(int((np.abs(gap.mean(1)) <= half).sum()), 20_000, 0.95)
    apart = scipy.stats.ttest_ind(scores[:, 0], scores[:, 1], axis=1).pvalue
    assert not near(int((apart <= 0.05).sum()), 20_000, 0.05)


def test_a_bootstrap_of_three_cannot_cover() -> None:
    values = draw(300, 1, 3, 0)[:, 0]
    inside = sum(low <= 0 <= high for low, high in (bca_interval(of) for of in values[:60]))
    assert inside <= sum(of.min() <= 0 <= of.max() for of in values[:60])
    assert at_most(int(((values.min(1) <= 0) & (values.max(1) >= 0)).sum()), 300, 0.75)


@pytest.mark.parametrize("kind", ["normal", "skewed"])
@pytest.mark.parametrize("scale", ["difference", "ratio"])
def test_false_verdicts_among_equals(kind: str, scale: str) -> None:
    rounds = 250
    for seed, compare in ((1, lambda made: against(made, "m0")), (2, all_pairs)):
        false = 0
        for scores in draw(rounds, 5, 3, seed, kind):
            false += any(one.verdict in ("better", "worse") for one in compare(study(scores, scale)))
        assert at_most(false, rounds, 0.05)


def test_first_step_of_holm_over_many_rounds() -> None:
    """Among equals any verdict is false if the smallest p is at most that of the first step; own spreads may differ."""
    for seed, loud in ((0, 1.0), (1, 10.0)):
        scores = draw(20_000, 8, 3, seed)
        scores[:, 3] *= loud
        _, _, p = t_interval(scores[:, 1:] - scores[:, :1])
        at = np.array([levels(list(of), 0.95) for of in p[:500]])
        assert (((p[:500] <= 1 - at).any(1)) == (p[:500].min(1) <= 0.05 / 7)).all()
        assert at_most(int((p.min(1) <= 0.05 / 7).sum()), 20_000, 0.05)


def test_false_verdicts_where_some_differ() -> None:
    """Two are as good as the reference, two are not: neither a verdict on the first two nor one the wrong way."""
    rounds, false, found = 400, 0, 0
    means = np.array([0.0, 0.0, 0.0, 4.0, -40.0])[:, None]
    for scores in draw(rounds, 5, 4, 3) + means:
        verdicts = {one.left: one.verdict for one in against(study(scores), "m0")}
        wrong = [verdicts["m1"] in ("better", "worse"), verdicts["m2"] in ("better", "worse")]
        false += any([*wrong, verdicts["m3"] == "worse", verdicts["m4"] == "better"])
        found += verdicts["m4"] == "worse"
    assert at_most(false, rounds, 0.05)
    assert found == rounds  # what can be seen is seen


def test_bonferroni_intervals_cover_all_at_once() -> None:
    rounds, missed = 400, 0
    means = 2.0 * np.arange(6)
    for scores in draw(rounds, 6, 3, 4) + means[:, None]:
        found = against(study(scores), "m0", rules=Rules(correction="bonferroni"))
        truth = {f"m{i}": means[i] for i in range(6)}
        missed += any(not (one.estimate.low or 0) <= truth[one.left] <= (one.estimate.high or 0) for one in found)
    assert at_most(missed, rounds, 0.05)


def test_pooled_bounds_are_exact_where_noise_is_alike() -> None:
    scores = draw(20_000, 6, 3, 5)
    variance, freedom = block_error(scores)
    error = np.sqrt(2 * variance / 3)
    means = scores.mean(2)
    reference = np.abs(means[:, 1:] - means[:, :1]).max(1) > dunnett(0.95, 5, freedom) * error
    assert near(int(reference.sum()), 20_000, 0.05)
    pairs = np.ptp(means, 1) > tukey(0.95, 6, freedom) * error
    assert near(int(pairs.sum()), 20_000, 0.05)


@pytest.mark.parametrize("gap", [0.0, 0.5, 3.0])
def test_the_true_best_is_among_the_leaders(gap: float) -> None:
    rounds, lost, sizes = 250, 0, 0
    for scores in draw(rounds, 4, 3, 6):
        scores[0] += max(gap, 1e-9)
        (found,) = leaders(study(scores))
        lost += "m0" not in found.members
        sizes += len(found.members)
    assert at_most(lost, rounds, 0.05)
    assert sizes > rounds  # and it is a set: seldom one alone
