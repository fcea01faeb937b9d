"""Search for what each layer should keep, with the user's own evaluation of the model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import granularity
from ..calibrate import Loss, batches_of, recalibrate
from ..errors import OutputError, RecipeError
from ..layers import evaluating
from ..prune import recipe_of
from ..recipe import Recipe
from ..structured import Target
from ..structured.plan import inputs
from .explore import Trial, best_of, explore
from .families import Families
from .matrices import Matrices
from .space import Counts
from .subject import Bounds, Subject, restored

Evaluate = Callable[[nn.Module], float]


@dataclass(frozen=True, eq=False)
class Found:
    """What a search found. Prints as a table.

    Attributes:
        recipe: an ordinary recipe with what each layer keeps, for `prune`, `plan` or a file.
        strategy: that proposed.
        names: of the layers, or families of units.
        trials: every evaluation, in order; the first is the uniform allocation.
        quantity, total, limit: what was counted, how much the whole model has, and how much might stay.
    """

    recipe: Recipe
    strategy: str
    names: tuple[str, ...]
    trials: list[Trial] = field(repr=False)
    quantity: str
    total: float
    limit: float

    @property
    def best(self) -> Trial:
        """The trial with the highest value."""
        return best_of(self.trials)

    @property
    def uniform(self) -> Trial:
        """The uniform allocation at the same target."""
        return self.trials[0]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {
            "recipe": self.recipe.to_dict(), "strategy": self.strategy, "names": list(self.names),
            "quantity": self.quantity, "total": self.total, "limit": self.limit, "best": self.best.number,
            "trials": [t.to_dict() for t in self.trials],
        }  # fmt: skip

    def __str__(self) -> str:
        best, uniform = self.best, self.uniform
        width = max(len(n) for n in self.names)
        lines = [
            f"{self.strategy}: {len(self.trials)} evaluations at {self.quantity} {best.cost:,.0f} of {self.total:,.0f} "
            f"(target {self.limit:,.0f})",
            f"{'':{width}}{'uniform':>12}{'found':>12}",
            f"{'value':{width}}{uniform.value:>12.4f}{best.value:>12.4f}",
        ]
        rows = zip(self.names, uniform.keeps, best.keeps, strict=True)
        return "\n".join([*lines, *(f"{n:{width}}{a:>12.4f}{b:>12.4f}" for n, a, b in rows)])


def search(
    model: nn.Module,
    method: str | Recipe = "magnitude",
    *,
    evaluate: Evaluate,
    strategy: str = "evolution",
    budget: int = 60,
    target: str | None = None,
    example: Any = None,
    data: Any = None,
    loss: Loss | None = None,
    recalibrated: bool = False,
    low: float = 0.2,
    bounds: Mapping[str, Sequence[float]] | None = None,
    multiple: int = 8,
    options: Mapping[str, Any] | None = None,
    history: str | Path | None = None,
    progress: Callable[[Trial], None] | None = None,
    **axes: Any,
) -> Found:
    """Find what each layer keeps, at a target that every try meets.

    Each try prunes the model, lets ``evaluate`` judge it, and puts everything back bit by bit: afterwards the model
    is what it was. The first try is the uniform allocation, the second the method's own where that is another.

    Args:
        model: any module.
        method: a named method or a `Recipe` that prunes once: its criterion, granularity and solver are used. The
            recovery that a method for units brings is left out unless ``recovery`` is given: it would heal each try.
        evaluate: ``evaluate(model) -> float``, higher is better, on data that is not the test data. The model is in
            evaluation mode, without gradients; one that trains a little first opens ``torch.enable_grad()``.
        strategy: ``random-search``, ``evolution``, ``bayesian``, ``amc`` or ``graph`` (``secateur methods``).
        budget: how many evaluations there may be.
        target: what remains, e.g. ``"flops 50%"``; for units of the whole model also ``"params to 2M"``. Without it
            the recipe's ``sparsity``. With a granularity of weights, FLOPs are those of the weights that stay.
        example: inputs of one forward pass; needed for units, for FLOPs and by the strategy ``graph``.
        data, loss: as for `prune`.
        recalibrated: measure the statistics of batch norms anew on ``data`` before each evaluation.
        low: the least that stays of a layer, as a share of what a uniform allocation would keep.
        bounds: glob over names -> smallest and largest keep, e.g. ``{"*.head": (1, 1)}``.
        multiple: for units, sizes that remain are multiples of it.
        options: knobs of the strategy.
        history: file that every trial is appended to, and from which a search that was stopped goes on.
        progress: called with every trial.
        axes: fields of the recipe that override the method's: ``sparsity``, ``granularity``, ``seed``, ...

    Raises:
        RecipeError, DataError, ModelError, NumericalError: with what to do.

    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    >>> x = torch.randn(64, 8); y = net(x).detach()
    >>> found = search(net, sparsity=0.5, evaluate=lambda m: -float((m(x) - y).square().mean()), budget=8)
    >>> found.best.value >= found.uniform.value, found.best.cost, torch.equal(net(x), y)
    (True, 48.0, True)
    """
    recipe = _recipe(method, axes, target, example)
    given = None if example is None else inputs(example)
    wanted = None if target is None else Target.parse(target)
    limits = Bounds.read(low, bounds)
    common: dict[str, Any] = {"target": wanted, "data": data, "loss": loss, "bounds": limits}
    subject: Subject
    if granularity.parse(recipe.granularity).coupled:
        if given is None:
            raise RecipeError(
                f"granularity '{recipe.granularity}' follows one forward pass: give inputs for it with example="
            )
        subject = Families(model, recipe, example=given, multiple=multiple, **common)
    else:
        subject = Matrices(model, recipe, example=given, **common)
    batches = batches_of(data) if recalibrated and data is not None else []
    if recalibrated and not batches:
        raise RecipeError("batch norms are measured anew on data: give data=, or leave out recalibrated")
    return run(
        subject, strategy, evaluate, budget=budget, batches=batches, options=options, history=history,
        progress=progress,
    )  # fmt: skip


def run(
    subject: Subject,
    strategy: str,
    evaluate: Evaluate,
    *,
    budget: int,
    batches: Sequence[Any] = (),
    options: Mapping[str, Any] | None = None,
    history: str | Path | None = None,
    progress: Callable[[Trial], None] | None = None,
) -> Found:
    """Search on a model that is seen as a `Subject`; ``batches`` are those that batch norms are measured on."""
    space, recipe, model = subject.space, subject.recipe, subject.model
    space.check()
    knobs = dict(options or {})
    first = {"uniform": [1.0] * len(space)}
    if subject.starts_from_own:
        first["recipe"] = subject.own()
    header = {
        "secateur": "search", "recipe": recipe.digest, "strategy": strategy, "options": knobs, "budget": budget,
        "limit": space.limit, "names": [n.name for n in space.nodes],
    }  # fmt: skip
    log = None if history is None else Log(Path(history), header)

    def value(counts: Counts) -> float:
        with restored(model), evaluating(model):
            subject.apply(counts)
            if batches:
                recalibrate(model, batches)
            model.eval()
            with torch.no_grad():
                return _number(evaluate(model))

    def done(trial: Trial) -> None:
        if log is not None and trial.number >= len(log.rows):
            log.add(trial)
        if progress is not None:
            progress(trial)

    trials = explore(
        space, strategy, value, budget=budget, seed=recipe.seed, first=first, knobs=knobs,
        record=() if log is None else log.rows, done=done,
    )  # fmt: skip
    return Found(
        subject.recipe_of(best_of(trials).counts), strategy, tuple(n.name for n in space.nodes), trials,
        subject.quantity, subject.total, space.limit,
    )  # fmt: skip


def _number(value: Any) -> float:
    if isinstance(value, Tensor) and value.numel() == 1:
        return float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise RecipeError(f"evaluate() returns a number, higher is better, not {type(value).__name__}")
    return float(value)


def _recipe(method: str | Recipe, axes: Mapping[str, Any], target: str | None, example: Any) -> Recipe:
    """The recipe that is searched; an example alone does not make units of it."""
    pattern = granularity.parse(axes["granularity"]) if axes.get("granularity") else None
    single = pattern is not None and not pattern.coupled
    recipe = recipe_of(method, axes, None if single else target, None)
    pattern = granularity.parse(recipe.granularity)
    if pattern.whole:
        raise RecipeError(
            f"granularity '{recipe.granularity}' takes whole pieces, which have no ratio to search: choose element, "
            "row, N:M, block, coupled, filter or channel"
        )
    if recipe.steps > 1:
        raise RecipeError("a search prunes in one step: leave steps at 1")
    if pattern.coupled and "recovery" not in axes and recipe.recovery == "refit" and not isinstance(method, Recipe):
        return recipe.override(recovery="none")
    return recipe


class Log:
    """A file of trials, one line each behind a line that says of which search; a torn last line is forgotten.

    Raises:
        OutputError: the file is of another search.
    """

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        self._path = path
        self.rows: list[dict[str, Any]] = []
        lines = list(_whole_lines(path))
        if lines and lines[0] != json.loads(json.dumps(header)):
            raise OutputError(f"{path} is the history of another search: name another file, or delete it")
        self.rows = lines[1:]
        if not lines:
            path.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(line) + "\n" for line in (header, *self.rows))
        path.write_text(text, encoding="utf-8")

    def add(self, trial: Trial) -> None:
        """Append a trial."""
        self.rows.append(trial.to_dict())
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(trial.to_dict()) + "\n")


def _whole_lines(path: Path) -> Iterable[dict[str, Any]]:
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8").split("\n"):
        try:
            found = json.loads(line)
        except ValueError:
            return
        if isinstance(found, dict):
            yield found
