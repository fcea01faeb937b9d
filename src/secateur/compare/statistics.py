"""Means over seeds with intervals, paired differences, and corrections for many comparisons.

Seeds are the sample: an interval says how the mean would move with other seeds. It says nothing about another test
set, another model or another data set. Scores that multiply (perplexity) are averaged and compared as logarithms: the
mean is geometric, a difference is a ratio.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError, SecateurError
from .cells import Scale

Floats = NDArray[np.float64]
How = Literal["t", "bca"]
Correction = Literal["holm", "bonferroni", "none"]

LEVEL = 0.95
RESAMPLES = 9999


def stats() -> Any:
    """`scipy.stats`, which an extra brings.

    Raises:
        SecateurError: it is not installed.
    """
    try:
        import scipy.stats
    except ImportError:
        raise SecateurError("intervals over seeds need scipy: pip install 'secateur[compare]'") from None
    return scipy.stats


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds, or a paired difference, with its interval.

    Attributes:
        value: the mean; geometric where the scale is ``ratio``. None where no run has a score.
        low, high: the interval; None with fewer than two values.
        level: probability with which such an interval covers the true mean, taken alone.
        n: values that it is made of.
        failures: runs, or pairs of runs, that are not in it because one failed or is not finite.
        spread: standard deviation over seeds; on the ``ratio`` scale of the logarithms.
        scale: ``difference``, or ``ratio``: then a paired comparison is left / right, and 1 is no difference.
        p: two-sided, of no difference; None for a mean, a bootstrap, or fewer than two values.
        how: ``t`` or ``bca``.
    """

    value: float | None
    low: float | None
    high: float | None
    level: float
    n: int
    failures: int = 0
    spread: float | None = None
    scale: Scale = "difference"
    p: float | None = None
    how: str = "t"

    @property
    def shown(self) -> int:
        """1 where the interval lies above no difference, -1 where below, 0 where it includes it or is missing."""
        none = 1.0 if self.scale == "ratio" else 0.0
        if self.low is None or self.high is None:
            return 0
        return (self.low > none) - (self.high < none)

    def text(self, digits: int = 4) -> str:
        """
        >>> Estimate(0.9121, 0.9012, 0.9230, 0.95, 3).text(3)
        '0.912 [0.901, 0.923]'
        """
        if self.value is None:
            return "no score"
        interval = f" [{self.low:.{digits}g}, {self.high:.{digits}g}]" if self.low is not None else ""
        return f"{self.value:.{digits}g}{interval}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def t_interval(values: Floats, level: float | Floats = LEVEL) -> tuple[Floats, Floats, Floats]:
    """Mean, half width of Student's interval, and two-sided p of a mean of zero, along the last axis.

    Values that are all the same give an interval of no width.

    >>> mean, half, p = t_interval(np.array([1.0, 2.0, 3.0]))
    >>> float(mean), round(float(half), 3), round(float(p), 4)
    (2.0, 2.484, 0.0742)
    """
    n = values.shape[-1]
    if n < 2:
        raise DataError(f"an interval needs two values or more, not {n}")
    same = values.max(-1) == values.min(-1)
    mean = np.where(same, values[..., 0], values.mean(-1))
    error = np.where(same, 0.0, values.std(-1, ddof=1) / math.sqrt(n))
    stats()
    from scipy.special import stdtr, stdtrit  # Student's distribution without the cost of an object

    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(error > 0, np.abs(mean) / error, np.where(mean == 0, 0.0, np.inf))
    return mean, -stdtrit(n - 1, (1 - np.asarray(level)) / 2) * error, 2 * stdtr(n - 1, -ratio)


def bootstrap_needs(level: float = LEVEL) -> int:
    """Seeds below which no bootstrap of the mean can cover at a level.

    Its interval lies within the smallest and the largest value. Where noise is symmetric, all n values lie on one
    side of the true mean with probability 2 ** (1 - n).

    >>> bootstrap_needs(0.95), bootstrap_needs(0.99)
    (6, 8)
    """
    return math.ceil(1 - math.log2(1 - level))


def bca_interval(values: Floats, level: float = LEVEL, seed: int = 0) -> tuple[float, float]:
    """The bias-corrected and accelerated bootstrap interval of a mean (Efron 1987), whatever the number of values."""
    if values.max() == values.min():
        return float(values[0]), float(values[0])
    generator = np.random.default_rng(seed)
    found = stats().bootstrap(
        (values,), np.mean, confidence_level=level, n_resamples=RESAMPLES, method="BCa", rng=generator
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def mean(
    values: Iterable[float | None],
    *,
    scale: Scale = "difference",
    level: float = LEVEL,
    how: How = "t",
    seed: int = 0,
) -> Estimate:
    """The mean over seeds with its interval; None and values that are not finite count as failures.

    Args:
        scale: ``ratio`` averages logarithms.
        how: ``t`` (exact for normal noise), or ``bca``, a bootstrap for many seeds and skewed noise.
        seed: of the bootstrap.

    >>> mean([0.90, 0.92, None]).text(), mean([0.90, 0.92, None]).failures
    ('0.91 [0.7829, 1.037]', 1)
    >>> mean([10.0, 20.0, 40.0], scale="ratio").text(3)
    '20 [3.57, 112]'
    """
    return _estimate(list(values), scale, level, how, seed, test=False)


def paired(
    left: Mapping[int, float | None],
    right: Mapping[int, float | None],
    *,
    scale: Scale = "difference",
    level: float = LEVEL,
    how: How = "t",
    seed: int = 0,
) -> Estimate:
    """Left minus right (or left / right) over the seeds that both have, with its interval.

    >>> paired({0: 3.0, 1: 5.0, 2: None}, {0: 1.0, 1: 2.0, 2: 2.0, 3: 9.0}).value
    2.5
    """
    differences: list[float | None] = []
    for name in sorted(left.keys() & right.keys()):
        ours, theirs = left[name], right[name]
        if ours is None or theirs is None or not (math.isfinite(ours) and math.isfinite(theirs)):
            differences.append(None)
        else:
            differences.append(_up(ours, scale) - _up(theirs, scale))
    found = _estimate(differences, "difference", level, how, seed, test=True)
    return on_scale(found, scale)


def on_scale(found: Estimate, scale: Scale) -> Estimate:
    """An estimate of a difference of logarithms as one of a ratio; any other stays as it is."""
    if scale == "difference":
        return found
    value, low, high = (None if x is None else _exp(x) for x in (found.value, found.low, found.high))
    return replace(found, value=value, low=low, high=high, scale=scale)


def up(values: Floats, scale: Scale) -> Floats:
    """Values on the scale on which they are averaged."""
    return np.log(values) if scale == "ratio" else values


def _estimate(values: Sequence[float | None], scale: Scale, level: float, how: How, seed: int, test: bool) -> Estimate:
    if not 0 < level < 1:
        raise DataError(f"a level is a probability between 0 and 1, not {level:g}")
    kept = np.array([_up(x, scale) for x in values if x is not None and math.isfinite(x)])
    n, failures = len(kept), len(values) - len(kept)
    if n < 2:
        alone = float(kept[0]) if n else None
        return on_scale(Estimate(alone, None, None, level, n, failures, how=how), scale)
    centre, half, p = t_interval(kept, level)
    low, high = float(centre - half), float(centre + half)
    if how == "bca":
        if n < (needs := bootstrap_needs(level)):
            raise DataError(
                f"a bootstrap interval at {level:.4g} needs {needs} seeds or more, not {n}: with fewer it cannot cover "
                "at that level; use Student's t"
            )
        low, high = bca_interval(kept, level, seed)
    spread = 0.0 if kept.max() == kept.min() else float(kept.std(ddof=1))
    known = float(p) if test and how == "t" else None
    return on_scale(Estimate(float(centre), low, high, level, n, failures, spread, p=known, how=how), scale)


def _up(x: float, scale: Scale) -> float:
    if scale == "difference":
        return x
    if x <= 0:
        raise DataError(f"scores that are compared by ratio are positive, not {x:g}")
    return math.log(x)


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


def adjust(p: Sequence[float], correction: Correction = "holm") -> list[float]:
    """p values corrected for their number: reject those at most 1 - level, and any false rejection has at most that
    chance, however the comparisons depend on each other.

    >>> adjust([0.01, 0.04, 0.03]), adjust([0.01, 0.04, 0.03], "bonferroni")
    ([0.03, 0.06, 0.06], [0.03, 0.12, 0.09])

    Source: Holm, A simple sequentially rejective multiple test procedure, Scand. J. Statist. 6, 1979.
    """
    if correction == "none":
        return [float(x) for x in p]
    m = len(p)
    if correction == "bonferroni":
        return [min(1.0, float(x) * m) for x in p]
    found, so_far = [0.0] * m, 0.0
    for step, index in enumerate(np.argsort(p, kind="stable")):
        so_far = max(so_far, min(1.0, float(p[index]) * (m - step)))
        found[index] = so_far
    return found


def levels(p: Sequence[float], level: float = LEVEL, correction: Correction = "holm") -> list[float]:
    """For each comparison the level at which its interval excludes no difference exactly if the corrected p rejects.

    ``bonferroni``: one level for all, and all intervals cover at once. ``holm``: each at the level of the step that
    tested it; alone each covers at ``level`` or more, but all at once only the Bonferroni ones do.

    >>> [round(x, 4) for x in levels([0.001, 0.04, 0.03])]
    [0.9833, 0.975, 0.975]
    """
    m, alpha = len(p), 1 - level
    if correction == "none":
        return [level] * m
    if correction == "bonferroni":
        return [1 - alpha / max(1, m)] * m
    found, still = [0.0] * m, True
    tests = m
    for step, index in enumerate(np.argsort(p, kind="stable")):
        if still:
            tests = m - step
            still = float(p[index]) * tests <= alpha
        found[index] = 1 - alpha / tests
    return found


def tukey(level: float, contenders: int, freedom: float) -> float:
    """Standard errors of a difference that all pairs of contenders stay within, at a level (Tukey).

    >>> round(tukey(0.95, 3, 10), 3)
    2.741
    """
    return float(stats().studentized_range.ppf(level, contenders, freedom)) / math.sqrt(2)


def tukey_p(errors: float, contenders: int, freedom: float) -> float:
    """How often some pair of equal contenders lies that many standard errors apart, or more."""
    return float(stats().studentized_range.sf(abs(errors) * math.sqrt(2), contenders, freedom))


@lru_cache(maxsize=256)
def dunnett(level: float, others: int, freedom: float, sides: int = 2) -> float:
    """Standard errors of a difference that all others against one contender stay within, at a level.

    All are measured equally often, so any two differences have a correlation of one half.

    >>> round(dunnett(0.95, 3, 20), 2), round(dunnett(0.95, 3, 20, sides=1), 2)
    (2.54, 2.19)

    Source: Dunnett, A multiple comparison procedure for comparing several treatments with a control, JASA 50, 1955.
    """
    stats()
    import scipy.optimize

    return float(scipy.optimize.brentq(lambda at: dunnett_p(at, others, freedom, sides) - 1 + level, 0.0, 400.0))


def dunnett_p(errors: float, others: int, freedom: float, sides: int = 2) -> float:
    """How often some other of as good contenders lies that many standard errors off the one, or more."""
    normal, of_normal, points, of_points = _grid(freedom)
    reach = errors * math.sqrt(2) * (points / math.sqrt(freedom))[:, None]
    cumulative = stats().norm.cdf
    inside = cumulative(normal + reach) - (cumulative(normal - reach) if sides == 2 else 0.0)
    return 1 - float(of_points @ (inside**others @ of_normal))


@lru_cache(maxsize=32)
def _grid(freedom: float) -> tuple[Floats, Floats, Floats, Floats]:
    """Nodes and weights: the error of the contender that all share (normal), and the error's estimate (chi)."""
    nodes, weights = np.polynomial.legendre.leggauss(120)
    chi = stats().chi(freedom)
    low, high = float(chi.ppf(1e-13)), float(chi.isf(1e-13))
    points = low + (high - low) * (nodes + 1) / 2
    normal = 8.5 * nodes
    return normal, 8.5 * weights * stats().norm.pdf(normal), points, (high - low) / 2 * weights * chi.pdf(points)


def block_error(scores_kn: Floats) -> tuple[Floats, float]:
    """Variance of one score once contender and seed are taken off, and its degrees of freedom: (k - 1)(n - 1).

    Contenders share it, so their noise must be alike; axes before the last two are kept.

    >>> variance, freedom = block_error(np.array([[1.0, 2.0, 3.0], [2.0, 3.0, 4.0]]))
    >>> float(variance), freedom
    (0.0, 2.0)
    """
    k, n = scores_kn.shape[-2:]
    rest = scores_kn - scores_kn.mean(-1, keepdims=True) - scores_kn.mean(-2, keepdims=True)
    rest = rest + scores_kn.mean((-2, -1), keepdims=True)
    freedom = float((k - 1) * (n - 1))
    return (rest**2).sum((-2, -1)) / freedom, freedom
