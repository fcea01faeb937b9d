"""What `secateur.train` does for a transform that ends in a sub-network."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import RecipeError
from ..layers import find_layers
from ..masks import Masks
from ..measure import Peak, count_parameters
from ..processes import unequal, world
from ..recipe import Recipe
from ..record import run_record
from ..structured.targets import Target
from ..tasks.checkpoint import own_generators
from ..when.healing import fresh_model
from ..when.own import Asked, Own
from ..when.result import Trained
from .course import Course


def train_supernet(task: Any, method: str, asked: Asked) -> Trained:
    """Train a task densely, then as the method says; what is found is fine-tuned and returned.

    A ``length`` of 0 leaves fine-tuning out.

    Raises:
        RecipeError, DataError, ModelError, NumericalError, OutputError: with one sentence.
    """
    own = Own(task, method, asked)
    if asked.target is None:
        raise RecipeError(f"'{method}' searches within a target: give one, such as --target 'flops 50%'")
    found, target = own.task, Target.parse(asked.target)
    with own_generators(), Peak() as peak:
        if asked.model is None:
            fresh = fresh_model(found, asked.seed).to(own.device)
            own.part.facts["foreseen"](Course(found, fresh, target, own.epochs, asked.seed), **own.knobs)
        net = own.dense()
        before = _figures(own, net)
        course = Course(
            found, net, target, own.epochs, asked.seed, length=own.length, rate=asked.rate, device=own.device,
            folder=own.work, every=asked.every, tags={**own.tags(net, own.knobs), "target": asked.target},
            progress=own.say, curves=own.curves,
        )  # fmt: skip
        small = own.part.function(course, **own.knobs).eval()
        after = _figures(own, small)
    own.earlier += course.earlier
    gone = 1 - after["parameters"] / before["parameters"]
    recipe = Recipe(method=method, granularity="coupled", sparsity=max(0.0, gone), seed=asked.seed)
    record = run_record(
        recipe=recipe, records=[], skipped=find_layers(small, only=("*",))[1],
        model={"source": f"task {found.name}", "class": type(small).__name__, "parameters": after["parameters"],
               "blocks": 0},
        data={"source": f"task {found.name}"}, timings={"total": own.seconds()}, peak_memory=peak.bytes,
        command=asked.command, before=before, after=after, notes=[*course.notes, *unequal(net)],
    )  # fmt: skip
    record |= {
        "task": found.describe(), "epochs": own.epochs, "length": own.length, "rate": asked.rate, "when": "during",
        "score": asked.score, "target": asked.target, "processes": world(), "curves": course.curves, "rounds": [],
        "knobs": own.knobs, "passes": course.passes, "tried": course.tried, method: course.found,
    }  # fmt: skip
    result = Trained(small, recipe, Masks({}), record)
    own.write(result)
    return result


def _figures(own: Own, model: nn.Module) -> dict[str, Any]:
    parameters, nonzero = count_parameters(model)
    value = own.task.measure(model, own.asked.score)
    return {"metric": {"name": own.task.metric_name, "value": value}, "parameters": parameters, "nonzero": nonzero}
