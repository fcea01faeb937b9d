"""How often the intervals of a comparison cover, and how often its verdicts are false, by simulation.

Twelve contenders run under the same n seeds: a score is the contender's true mean, plus a part that the seed gives to
all, plus noise of its own. Skewed noise is log-normal. Where nothing else is said all true means are the same, so that
every verdict "better" or "worse" is false. The bound is 5 %, and coverage should be 95 %.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats
from common import RESULTS, environment, table, write_json

from secateur.compare.statistics import LEVEL, Floats, block_error, dunnett, t_interval

CONTENDERS = 12
ALPHA = 1 - LEVEL


def noise(kind: str, shape: tuple[int, ...], generator: np.random.Generator) -> Floats:
    """Noise of mean 0 and standard deviation 1."""
    if kind == "normal":
        return generator.standard_normal(shape)
    sigma = 0.75  # skewness 3.3
    mean, spread = np.exp(sigma**2 / 2), np.sqrt((np.exp(sigma**2) - 1) * np.exp(sigma**2))
    return (generator.lognormal(0.0, sigma, shape) - mean) / spread


def covers(centre: Floats, half: Floats, truth: Floats | float = 0.0) -> Floats:
    return np.abs(centre - truth) <= half


def bca(values: Floats) -> float:
    """Coverage of zero by the bootstrap."""
    found = scipy.stats.bootstrap(
        (values,), np.mean, axis=-1, n_resamples=999, batch=100, method="BCa", rng=np.random.default_rng(0)
    ).confidence_interval
    return float(((found.low <= 0) & (found.high >= 0)).mean())


def cell(kind: str, n: int, rounds: int, seed: int) -> dict[str, float]:
    """All figures at one number of seeds."""
    generator = np.random.default_rng(seed)
    k, m = CONTENDERS, CONTENDERS - 1
    scores = noise(kind, (rounds, k, n), generator) + 2 * noise("normal", (rounds, 1, n), generator)
    alone = noise(kind, (rounds, n), generator)
    found = {"t: mean": float(covers(*t_interval(alone)[:2]).mean())}
    found["bca: mean"] = bca(alone[: rounds // 10])
    unlike = alone - noise("normal", (rounds, n), generator)  # the one side skewed, the other not
    found["t: paired difference"] = float(covers(*t_interval(unlike)[:2]).mean())

    apart = scores[:, 1:] - scores[:, :1]
    _, _, p = t_interval(apart)
    found["false: no correction"] = float((p.min(1) <= ALPHA).mean())
    found["false: Holm"] = float((p.min(1) <= ALPHA / m).mean())  # its first step decides whether any is false
    found["false: pooled"] = float(pooled(scores).any(1).mean())
    loud = scores.copy()
    loud[:, 1] += 4 * noise(kind, (rounds, n), generator)
    _, _, p_loud = t_interval(loud[:, 1:] - loud[:, :1])
    found["false: Holm, one contender noisy"] = float((p_loud.min(1) <= ALPHA / m).mean())
    found["false: pooled, one contender noisy"] = float(pooled(loud).any(1).mean())

    # The best of twelve by its mean, and what is then claimed of it on the same seeds.
    best = scores.mean(2).argmax(1)
    picked = np.take_along_axis(scores, best[:, None, None], 1)[:, 0]
    rest = (scores.sum(1) - picked) / (k - 1)
    over_rest = t_interval(picked - rest)
    found["false: picked best beats the mean of the rest, no correction"] = float((over_rest[2] <= ALPHA).mean())
    quiet = noise(kind, (rounds, k, n), generator)
    top = np.take_along_axis(quiet, quiet.mean(2).argmax(1)[:, None, None], 1)[:, 0]
    found["t: mean of the picked best"] = float(covers(*t_interval(top)[:2]).mean())
    found["t: mean of the picked best, corrected for twelve"] = float(
        covers(*t_interval(top, 1 - ALPHA / k)[:2]).mean()
    )
    found["false: true best not among the leaders"] = excluded(scores)

    # Power: one contender that is better by three standard deviations of its noise.
    better = scores.copy()
    better[:, 1] += 3.0
    _, _, p_better = t_interval(better[:, 1] - better[:, 0])
    found["found: 3 deviations, Holm"] = float((p_better <= ALPHA / m).mean())
    found["found: 3 deviations, pooled"] = float(pooled(better)[:, 0].mean())
    return found


def pooled(scores: Floats) -> Floats:
    """Which of the others Dunnett's bound tells from the first contender."""
    k, n = scores.shape[-2:]
    variance, freedom = block_error(scores)
    apart = scores[:, 1:].mean(2) - scores[:, :1].mean(2)
    return np.abs(apart) > dunnett(LEVEL, k - 1, freedom) * np.sqrt(2 * variance / n)[:, None]


def excluded(scores: Floats) -> float:
    """How often the first contender, better than all by a hair, is shown to be worse than another."""
    scores = scores.copy()
    scores[:, 0] += 1e-3
    centre, half, _ = t_interval(scores[:, 1:] - scores[:, :1], 1 - 2 * ALPHA / (CONTENDERS - 1))
    return float((centre - half > 0).any(1).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[3, 5, 10], help="numbers of seeds of a study")
    parser.add_argument("--seed", type=int, default=0, help="of the simulation")
    parser.add_argument("--out", type=Path, default=RESULTS / "verdicts.json")
    given = parser.parse_args()
    columns = [(kind, n) for kind in ("normal", "skewed") for n in given.seeds]
    figures: dict[str, dict[str, float]] = {
        f"{kind}, n = {n}": cell(kind, n, given.rounds, given.seed) for kind, n in columns
    }
    names = list(next(iter(figures.values())))
    print(table(["", *figures], [[name, *[f"{of[name]:.1%}" for of in figures.values()]] for name in names]))
    setup: dict[str, Any] = {"rounds": given.rounds, "seed": given.seed, "contenders": CONTENDERS, "level": LEVEL}
    write_json(given.out, {"setup": setup, "environment": environment(1), "figures": figures})


if __name__ == "__main__":
    main()
