"""Train a task with a method: before, during or after training, in rounds, with recovery; one loop for all of them."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from ..disk import refuse
from ..errors import RecipeError
from ..fuse import methods as decompositions
from ..granularity import parse
from ..layers import find_layers
from ..masks import Masks
from ..measure import Peak
from ..processes import alone, decided, rank
from ..prune import Several
from ..recipe import Recipe
from ..registry import get, parts
from ..runtime import is_runtime
from ..stream.storage import layout
from ..tasks import find
from ..tasks.base import Split
from ..tasks.checkpoint import own_generators
from ..tasks.loop import OFTEN
from .course import Course, Progress, early, settled, trains
from .dynamic import TrainedDynamic, train_dynamic
from .healing import NO_WAY_BACK, fitting, fresh_model
from .own import Asked, own_options
from .result import Trained


def train(
    task: Any,
    method: str | Recipe | Several | None = None,
    *,
    epochs: float | None = None,
    out: str | Path | None = None,
    model: nn.Module | None = None,
    masks: Mapping[str, Tensor] | None = None,
    when: str | None = None,
    calibration: int = 8,
    device: str | torch.device = "cpu",
    every: float = OFTEN,
    dense: str | Path | None = None,
    target: str | None = None,
    multiple: int = 8,
    score: Split = "test",
    storage: str | None = None,
    options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    command: str = "",
    **axes: Any,
) -> Any:
    """Train a task, and prune it as the method says.

    Without a method the training is dense. A method of before or during training keeps its masks through the whole
    run (`attach`). One of after training trains densely first; then each of its rounds (``steps``) prunes and recovers:
    by fine-tuning, distillation, rewinding, or from scratch. A method of run time whose gates are learned (fbs) trains
    densely, then with its gates, and gives a `TrainedDynamic`; a supernet trains densely, then as all its sub-networks,
    and gives the best of them.

    Under ``torchrun``, with a process group, the processes make one run: each takes its share of every training batch,
    and the first one writes.

    Args:
        task: the name of a ready task (``secateur tasks``), ``FILE.py:NAME``, or an object with ``model`` and
            ``batches``; see `tasks.Task`.
        method: a named method, a `Recipe`, or a `Compound`, of which a `Compounded` is returned; so it is of a
            decomposition.
        epochs: of a whole training run; the task's own by default.
        out: a directory to write. The run's checkpoints lie beside it (``OUT.run``) until it is there: the same call
            goes on where it was stopped, and ends with the same weights, bit by bit.
        model: trained already: the dense run is left out. It stays as it is.
        masks: held from the first step on in place of a method: a ticket found on another task.
        when: ``before``, ``during`` or ``after``; the named method's own by default.
        calibration: training batches for methods that measure on data.
        device: where it is trained.
        every: seconds between two checkpoints within an epoch.
        dense: a folder where dense runs are kept, for all calls that begin with the same one.
        target: for methods over units of the whole model, what goes, such as ``"flops 50%"``; see `structured.Target`.
            Without it ``sparsity`` is the share of the parameters that goes.
        multiple: for those, sizes that remain are multiples of it.
        score: the split that the figures before and after are measured on. With ``valid`` nothing looks at the test
            data: for runs that choose a setting.
        storage: how ``out`` is written, see `Trained.save`.
        options: sizes of a ready task.
        progress: called with what is being done, the steps done and their number.
        axes: fields of the recipe: ``sparsity``, ``steps`` (rounds), ``recovery``, ``seed``, ``knobs``, ...

    Raises:
        RecipeError, DataError, ModelError, NumericalError, OutputError: with one sentence.

    >>> made = train("digits", "gmp", sparsity=0.8, epochs=0.25, knobs={"driver": {"every": 2}})
    >>> round(made.sparsity, 2)
    0.8
    """
    if isinstance(method, str) and (runner := runner_of(method)) is not None:
        _refuse_storage(storage)
        if masks is not None or when not in (None, parts("transform")[method].facts["when"]):
            raise RecipeError(f"'{method}' has a way of training of its own: leave out masks and when")
        axes |= {k: v for k, v in (("multiple", multiple), ("calibration", calibration)) if v != 8}
        return runner(task, method, Asked(
            epochs=epochs, out=out, model=model, target=target, device=device, every=every, dense=dense, score=score,
            options=options, progress=progress, command=command, **own_options(method, axes),
        ))  # fmt: skip
    if is_runtime(method, trained=False):
        raise RecipeError(
            f"'{method}' works at run time and is not trained: secateur.prune(model, '{method}', ...) puts it into a "
            f"model that is (secateur prune FILE.py:NAME --method {method})"
        )
    if method in decompositions() or not (method is None or isinstance(method, (str, Recipe))):
        from ..compound.tasks import train_method

        alone("a run of several steps, or of a decomposition,")
        if masks is not None or when not in (None, "after"):
            raise RecipeError("steps that change layers come after training, and with no masks of another run")
        return train_method(
            task, method, epochs=epochs, out=out, model=model, calibration=calibration, device=device, dense=dense,
            target=target, score=score, options=options, progress=progress, command=command, storage=storage, **axes,
        )  # fmt: skip
    found = find(task, **(options or {}))
    recipe, moment = recipe_and_moment(method, axes, masks, when)
    if score not in get_args(Split)[1:]:
        raise RecipeError(f"score is valid or test, not '{score}'")
    if target is not None and not parse(recipe.granularity).coupled:
        why = (
            f"method '{recipe.method}' works on '{recipe.granularity}': give a sparsity, or choose granularity coupled"
        )
        raise RecipeError(
            f"a target is for units of the whole model, and {why if method else 'no method is named that removes some'}"
        )
    folder = None if out is None else Path(out)
    layout(recipe, storage)  # says what it does not know before the work
    length = float(found.epochs if epochs is None else epochs)
    rewinds = "keeps" in get("recovery", recipe.recovery).facts and recipe.knobs_of("recovery")["weights"]
    if rewinds and (moment != "after" or model is not None or parse(recipe.granularity).coupled):
        raise RecipeError(NO_WAY_BACK)
    if folder is not None:
        decided(lambda: refuse(folder))
    with own_generators(), Peak() as peak:
        run = Course(
            found, recipe, moment, length, None if folder is None else folder.with_name(folder.name + ".run"),
            given=model, ticket=masks, calibration=calibration, device=torch.device(device), every=every,
            progress=progress or (lambda *_: None), shared=None if dense is None else Path(dense), target=target,
            multiple=multiple, score=score,
        )  # fmt: skip
        net = run.go()
    record = run.record(net, peak.bytes, command)
    result = Trained(net.eval(), recipe, Masks(run.masks), record)
    if folder is not None and rank() == 0:
        result.save(folder, storage)
        shutil.rmtree(folder.with_name(folder.name + ".run"), ignore_errors=True)
    return result


def runner_of(method: str) -> Callable[[Any, str, Asked], Trained | TrainedDynamic] | None:
    """What trains a transform that has to be trained: its own function (the fact ``trains``), or that of all gates."""
    part = parts("transform").get(method)
    if part is None:
        return None
    own: Callable[[Any, str, Asked], Trained | TrainedDynamic] | None = part.facts.get("trains")
    return own or (train_dynamic if is_runtime(method, trained=True) else None)


def _refuse_storage(storage: str | None) -> None:
    if storage is not None:
        raise RecipeError("a model with gates, or with layers of another kind, has its own format: leave storage out")


def rounds_of(base: Recipe, recipe: Recipe) -> int:
    """How many rounds a recipe of a method takes: of what a round of the method leaves, so many as its target wants.

    >>> base = Recipe.of("iterative-magnitude")
    >>> [rounds_of(base, base.override(sparsity=s)) for s in (0.2, 0.9, 0.98)]
    [1, 11, 18]
    """
    if not (trains(recipe) and recipe.schedule == "geometric" and base.steps > 1):
        return recipe.steps
    if recipe.sparsity == 0:
        return 1
    share = (1 - base.sparsity) ** (1 / base.steps)
    return max(1, math.ceil(math.log(1 - recipe.sparsity) / math.log(share) - 1e-6))


def recipe_and_moment(
    method: str | Recipe | None, axes: dict[str, Any], masks: Any, when: str | None
) -> tuple[Recipe, str]:  # fmt: skip
    """The recipe that `train` follows, with as many rounds as its target asks for, and when it prunes."""
    if when not in (None, "before", "during", "after"):
        raise RecipeError(f"when is before, during or after, not '{when}'")
    if method is None:
        if extra := sorted(set(axes) - {"seed"}):
            raise RecipeError(f"{extra[0]} belongs to a method, and none is named: say which")
        return Recipe(method="dense" if masks is None else "given masks", sparsity=0.0, **axes), "before"
    if masks is not None:
        raise RecipeError("masks stand in place of a method: leave one of them out")
    if isinstance(method, Recipe):
        base, recipe = method, method.override(**axes)
    else:
        base, recipe = Recipe.of(method), Recipe.of(method, **axes)
    if axes.get("steps") is None:
        recipe = recipe.override(steps=rounds_of(base, recipe))
    named = parts("method").get(recipe.method)
    own = named.facts["when"] if named is not None else "after"
    asked = early(recipe) or (settled(recipe) and recipe.learns)
    if recipe.driver != "once" and not (early(recipe) or (own == "after" and asked)):
        own = "during"
    moment = when or own
    if moment == "after" and recipe.driver != "once" and not asked:
        raise RecipeError(f"driver '{recipe.driver}' works while the model trains, not after: choose driver once")
    return recipe, moment


def supermask(task: Any, masks: Mapping[str, Tensor], *, seed: int = 0, signed: bool = False) -> float:
    """The metric on the test data of masked initial weights, without any training.

    Args:
        seed: of the initial weights, as the run had that found the masks.
        signed: each weight that stays becomes its sign times the standard deviation of its layer.

    Source: Zhou et al., Deconstructing lottery tickets, arXiv 1905.01067, section 4.
    """
    found = find(task)
    model = fresh_model(found, seed)
    held, _ = fitting(masks, model)
    if signed:
        for layer in find_layers(model, only=tuple(held))[0]:
            weight = layer.weight()
            layer.write(weight.sign() * weight.std())
    Masks(held).apply(model)
    return found.measure(model, "test")
