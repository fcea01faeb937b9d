"""Strategies that draw and recombine: the control, evolution, and a model of the objective (optuna)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import RecipeError
from ..registry import register
from .explore import Moves, Trial
from .space import Space


@register("search", name="random-search", survey="D3")
def random_search(space: Space, budget: int, generator: torch.Generator, trials: Sequence[Trial]) -> Moves:
    """Random ratios, each layer's drawn by itself; the best of all stays.

    :: keep_l ~ U(0, 1), then scaled to the target

    Choose it as the control: a strategy that learns must beat it at the same number of evaluations.

    Source: the control of every search; Li and Talwalkar, Random search and reproducibility for NAS, arXiv 1902.07638.
    """
    while True:
        yield torch.rand(len(space), generator=generator, dtype=torch.float64).tolist()


@register("search", paper="1903.10258", survey=("C2.2", "D3"))
def evolution(
    space: Space,
    budget: int,
    generator: torch.Generator,
    trials: Sequence[Trial],
    *,
    population: int | None = None,
    parents: int | None = None,
    rate: float = 0.1,
    sigma: float = 0.5,
) -> Moves:
    """Mutation and crossover of the best ratio vectors so far, in generations.

    :: mutant_l = parent_l exp(sigma z_l) with probability rate;  child_l = one of two parents' at random

    A generation is half mutants and half children of the ``parents`` best of all trials; the first is half random,
    half around the given allocations. ``population`` is a fifth of the budget and ``parents`` a fifth of that, unless
    given; no mutant has less than one changed gene in the mean.

    Choose it as the default: it asks for nothing but an evaluation.

    Beware: what it finds fits the data of ``evaluate``: report on other data.

    Source: Liu et al., MetaPruning, arXiv 1903.10258, section 3.2 and the official code, whose genes are sizes on a
    grid that mutate to any other; here they are fractions, which change by a factor.
    """
    n = len(space)
    size = population or max(4, budget // 5)
    best = parents or max(2, size // 5)

    def chance(p: float) -> Tensor:
        return torch.rand(n, generator=generator, dtype=torch.float64) < p

    def factors() -> Tensor:
        return (sigma * torch.randn(n, generator=generator, dtype=torch.float64)).exp()

    pool = {trial.counts: trial for trial in trials}
    given = [torch.tensor(trial.keeps, dtype=torch.float64) for trial in trials]
    for k in range(size):
        uniform = torch.rand(n, generator=generator, dtype=torch.float64)
        trial = yield (given[k % len(given)] * factors() if given and k % 2 else uniform).tolist()
        pool[trial.counts] = trial
    while True:
        elite = [torch.tensor(t.keeps, dtype=torch.float64) for t in sorted(pool.values(), key=_order)[:best]]
        for k in range(size):
            a, b = (elite[i] for i in torch.randint(len(elite), (2,), generator=generator).tolist())
            if k % 2 and len(elite) > 1:
                wanted = torch.where(chance(0.5), a, b)
            else:
                wanted = torch.where(chance(max(rate, 1.0 / n)), a * factors(), a)
            trial = yield wanted.tolist()
            pool[trial.counts] = trial


def _order(trial: Trial) -> tuple[float, int]:
    return -trial.value, trial.number


@register("search", survey="D3", extra="optuna")
def bayesian(
    space: Space,
    budget: int,
    generator: torch.Generator,
    trials: Sequence[Trial],
    *,
    sampler: str = "tpe",
) -> Moves:
    """A model of the objective proposes what promises most: optuna's TPE or Gaussian process (``sampler: gp``).

    :: keep = argmax of l(keep) / g(keep), the densities of good and of other trials (TPE)

    Choose it where evaluations are expensive and layers few: below about 20 of them.

    Beware: needs optuna: pip install 'secateur[search]'.

    Source: Bergstra et al., Algorithms for hyper-parameter optimization, 2011; Akiba et al., Optuna, arXiv 1907.10902.
    """
    optuna = _optuna()
    seed = int(torch.randint(2**31 - 1, (1,), generator=generator))
    if sampler not in ("tpe", "gp"):
        raise RecipeError(f"sampler is tpe or gp, not '{sampler}'")
    chosen = optuna.samplers.GPSampler if sampler == "gp" else optuna.samplers.TPESampler
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize", sampler=chosen(seed=seed))
    optuna.logging.set_verbosity(level)
    names = [f"{i} {node.name}" for i, node in enumerate(space.nodes)]
    ranges = {name: optuna.distributions.FloatDistribution(0.0, 1.0) for name in names}
    for trial in trials:
        params = dict(zip(names, trial.keeps, strict=True))
        study.add_trial(optuna.trial.create_trial(params=params, distributions=ranges, value=trial.value))
    while True:
        asked = study.ask(ranges)
        trial = yield [asked.params[name] for name in names]
        study.tell(asked, trial.value)


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise RecipeError("strategy 'bayesian' needs optuna: pip install 'secateur[search]'") from None
    return optuna
