"""The transform: train all sub-networks of a model at once, search among them, and take the best one out."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..calibrate import recalibrate
from ..errors import RecipeError
from ..recipe import Recipe
from ..registry import get, register
from ..search.explore import Trial
from ..search.space import Counts, Space
from .course import Course, in_order
from .elastic import Elastic
from .extract import extracted
from .goal import QUANTITIES, Goal
from .sandwich import sandwich
from .subnet import Supernet
from .train import train_supernet

#: Searches with a lower limit, where what was predicted to be fast enough is not.
_ROUNDS = 3
#: Strategies that read facts of each node, which blocks and kernels have not.
_FACTS = ("amc", "graph")
#: How many of the best sub-networks of a search are measured.
_MEASURED = 8


def foreseen(run: Course, **knobs: Any) -> None:
    """Say before any training what cannot be; a latency is not foreseen.

    Args:
        run: with a fresh model.

    Raises:
        RecipeError, ModelError: with one sentence.
    """
    elastic = _elastic(run, **knobs)
    if run.target.quantity != "latency":
        _promised(run, elastic)


def _elastic(
    run: Course, *, span: float, random: int, low: float, depth: float, kernel: int, multiple: int, order: str,
    budget: int, strategy: str, calibration: int, **_: Any,
) -> Elastic:  # fmt: skip
    """What may vary in the model, where all that was asked for can be."""
    if not span > 0:
        raise RecipeError(f"supernet: span is how long all sub-networks are trained, above 0, not {span:g}")
    counts = {"random": (random, 0), "multiple": (multiple, 1), "budget": (budget, 1), "calibration": (calibration, 1)}
    for name, (count, least) in counts.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < least:
            raise RecipeError(f"supernet: {name} is a whole number, at least {least}, not {count!r}")
    get("search", strategy)
    if strategy in _FACTS:
        raise RecipeError(f"supernet: strategy '{strategy}' looks at layers; choose evolution, bayesian, random-search")
    recipe = Recipe.of(order, seed=run.seed, recovery="none", allocation="uniform")
    if recipe.needs_data:
        raise RecipeError(f"supernet: order '{order}' ranks by data; choose one that does not, such as l1-norm")
    return Elastic(run.model, recipe, run.example(), low=low, depth=depth, kernel=kernel, multiple=multiple)


@register(
    "transform", paper="1908.09791", survey=("A3.4", "B2", "D3", "F5"), when="during", trains=train_supernet,
    span="span",
    length=0.25, quantities=QUANTITIES, foreseen=foreseen,
)  # fmt: skip
def supernet(
    run: Course,
    *,
    span: float = 1.0,
    random: int = 2,
    distil: bool = True,
    low: float = 0.25,
    depth: float = 0.5,
    kernel: int = 3,
    multiple: int = 8,
    order: str = "l1-norm",
    budget: int = 60,
    strategy: str = "evolution",
    calibration: int = 8,
) -> nn.Module:
    """Train all widths, depths and kernel sizes of a model at once, search among them, take the best one out.

    :: loss(largest, y) + sum over the smallest and n random sub-networks s of KL(largest(x) || s(x)), each step

    What may vary is found in the model: families of coupled channels, neurons and heads, of which the best by the
    method ``order`` stay, at least ``low`` of them, in multiples of ``multiple``; stages of blocks that leave nothing
    missing, of which the last are left out, at least the share ``depth`` of them stays; and convolutions larger than
    ``kernel``, of which the center stays, through a small matrix that is learned. The dense model is trained first;
    then for ``span`` times its epochs the largest sub-network learns from the labels, and the smallest and ``random``
    drawn ones from the largest (``distil``; from the labels without it). Then ``strategy`` tries ``budget``
    sub-networks that all meet the target, each with batch norms measured anew on ``calibration`` batches; the best on
    the validation data is taken out, proven, and fine-tuned.

    A latency is predicted in the search, from measured sub-networks, and what is chosen is measured.

    Choose it where widths, depths and kernels are to be found for a machine or a budget, and training is no obstacle.

    Beware: a step costs as much as the ``random`` + 2 sub-networks that it trains, in time and in memory; distillation
    takes the last axis of the outputs for classes.

    Source: Cai et al., Once-for-all, arXiv 1908.09791, section 3, and the official code (mit-han-lab/once-for-all):
    elastic widths by importance, depths by leaving the last blocks of a stage out, kernels as centers through matrices
    that channels share. There kernels, depths and widths come in by turns (progressive shrinking), each with a run of
    its own; a step trains one to four random sub-networks on the labels and on the outputs of the dense model; and a
    network that predicts the accuracy stands in for the validation data while it searches. Yu and Huang, Universally
    slimmable networks, arXiv 1903.05134, sections 3.2 to 3.4, and the official code (JiahuiYu/slimmable_networks, with
    random widths in each layer, four networks a step): the sandwich rule, distillation in place, and statistics of
    batch norms after training, as means over batches. There the first channels stay.
    """
    elastic = _elastic(
        run, span=span, random=random, low=low, depth=depth, kernel=kernel, multiple=multiple, order=order,
        budget=budget, strategy=strategy, calibration=calibration,
    )  # fmt: skip
    known = run.kept("goal.json", lambda: _promised(run, elastic))  # refused before all of them are trained
    elastic.rank(run.model)
    net = Supernet(run.model, elastic)
    run.train("supernet", run.model, span * run.epochs, 1, loss=sandwich(
        net, run.task.loss, random=random, distilled=distil
    ), passes=2 + random)  # fmt: skip
    few = run.few(calibration)
    goal = Goal(elastic, run.target, net.small(elastic.most), net.small, seed=run.seed, known=known)
    best, trials = chosen(run, elastic, net, goal, budget, strategy, few)
    small, proof = extracted(net, best.counts, run.target)
    sign = 1.0 if run.task.higher_is_better else -1.0
    run.found = {
        "nodes": [{"name": n.name, "of": n.units, "sizes": list(n.sizes)} for n in elastic.nodes],
        "counts": list(best.counts), "valid": sign * best.value,
        "largest": sign * run.value(net.small(elastic.most), few),
        "trials": [t.to_dict() for t in trials],
        "quantity": run.target.quantity, "limit": goal.limit, "reached": goal.reached(best.counts),
        "total": goal.total, "latency": goal.record(), "error": proof.error,
    }  # fmt: skip
    run.notes += [*elastic.notes, *told(elastic, best.counts), reached(goal, best.counts)]
    net.close()
    recalibrate(small, few)
    run.train("fine-tuning", small, run.length * run.epochs, 2, rate=run.rate)
    return small


def _promised(run: Course, elastic: Elastic) -> dict[str, Any]:
    """What latencies are predicted by, where the smallest sub-network is within the target.

    Raises:
        RecipeError: it is not.
    """
    goal = Goal(
        elastic, run.target, run.model, lambda counts: Supernet.small_of(run.model, elastic, counts), seed=run.seed
    )
    if not goal.met(elastic.least):
        raise RecipeError(goal.refusal(goal.reached(elastic.least)))
    return goal.record()


def chosen(
    run: Course, elastic: Elastic, net: Supernet, goal: Goal, budget: int, strategy: str, few: list[Any]
) -> tuple[Trial, list[Trial]]:
    """The best sub-network within the target, and all that were tried, in the searches that it took.

    Raises:
        RecipeError: none that was tried is.
    """
    limit, values = goal.limit, dict[Counts, float]()

    def value(counts: Counts) -> float:
        if counts not in values:
            values[counts] = run.value(net.small(counts), few)
        return values[counts]

    tried: list[Trial] = []
    for number in range(1, _ROUNDS + 1):
        least = goal.cost(elastic.least)
        space = Space(elastic.nodes, goal.cost, max(limit, least))
        name = "search" if number == 1 else f"search-{number}"
        trials = run.search(name, space, value, strategy, budget)
        tried += trials
        some = in_order(trials)[: _MEASURED if goal.measured else 1]
        if goal.measured:
            _remembered(run, goal, f"{name}.json", some)
        for trial in some:
            if goal.met(trial.counts):
                return trial, tried
        # What was predicted to be fast enough is not: ask for less, by as much as it was off.
        limit = goal.limit * min(0.95, goal.limit / min(goal.reached(t.counts) for t in some)) ** number
    fastest = min(goal.reached(t.counts) for t in some)
    raise RecipeError(goal.refusal(fastest, "the fastest sub-network that was measured"))


def _remembered(run: Course, goal: Goal, file: str, some: list[Trial]) -> None:
    """Measure sub-networks until one is within the target, once: a run that goes on decides as it did."""

    def measure() -> dict[str, Any]:
        found: list[float] = []
        for trial in some:
            found.append(goal.share(trial.counts))
            if goal.met(trial.counts):
                break
        return {"shares": found}

    shares = run.kept(file, measure)["shares"]
    goal.shares |= {t.counts: float(s) for t, s in zip(some, shares, strict=False)}


def told(elastic: Elastic, counts: Counts) -> list[str]:
    """What stays of stages and kernels, and of how many families, as notes."""
    widths, depths, sizes = elastic.split(counts)
    families = [n.units for n in elastic.subject.space.nodes]
    notes = [f"widths: {sum(widths)} of {sum(families)} units of {len(families)} families stay"]
    if elastic.stages:
        each = ", ".join(f"{n.name}: {c} of {n.units}" for n, c in zip(elastic.stage_nodes, depths, strict=True))
        notes.append(f"depths: blocks that stay of {each}")
    if smaller := [f"{k.path} {s} of {k.sizes[-1]}" for k, s in zip(elastic.kernels, sizes, strict=True)]:
        notes.append(f"kernels: {', '.join(smaller)}")
    return notes


def reached(goal: Goal, counts: Counts) -> str:
    """How the target was met, as a note."""
    if goal.measured:
        return (
            f"latency: measured at {100 * goal.reached(counts):.1f}% of the whole model's, {100 * goal.limit:.1f}% was "
            "asked for"
        )
    return f"{goal.target.quantity}: {goal.reached(counts):,.0f} of {goal.total:,.0f}, {goal.limit:,.0f} was asked for"
