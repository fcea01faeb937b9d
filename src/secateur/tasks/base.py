"""A task: a model, data, a loss and a metric; what a training run needs to know, and nothing of how it is pruned."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from ..errors import DataError, ModelError, RecipeError, UnknownName
from ..layers import evaluating
from ..models import named
from ..registry import get, parts

Split = Literal["train", "valid", "test"]


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    """The loss of pairs of inputs and class indices."""
    inputs, labels = batch
    return nn.functional.cross_entropy(model(inputs), labels)


def accuracy(model: nn.Module, batches: Iterable[Any]) -> float:
    """The share of the labels that the largest output names."""
    right = total = 0
    for inputs, labels in batches:
        right += int((model(inputs).argmax(-1) == labels).sum())
        total += labels.numel()
    if total == 0:
        raise DataError("a metric needs at least one batch")
    return right / total


def by_class(names: Sequence[str] = ()) -> Callable[[nn.Module, Iterable[Any]], dict[str, float]]:
    """A measure of what is lost where: the accuracy of each class, by its name or its number."""

    def measure(model: nn.Module, batches: Iterable[Any]) -> dict[str, float]:
        right: dict[int, int] = {}
        total: dict[int, int] = {}
        for inputs, labels in batches:
            for label, hit in zip(labels.flatten().tolist(), (model(inputs).argmax(-1) == labels).flatten().tolist(), strict=True):  # fmt: skip  # noqa: E501
                total[label] = total.get(label, 0) + 1
                right[label] = right.get(label, 0) + int(hit)
        return {names[k] if k < len(names) else f"class {k}": right[k] / total[k] for k in sorted(total)}

    return measure


def sgd(model: nn.Module) -> Optimizer:
    """Momentum and weight decay as networks for images are trained."""
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)


def adamw(model: nn.Module, rate: float = 2e-3) -> Optimizer:
    """As small transformers are trained."""
    return torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01)


def triangle(t: float) -> float:
    """Up from a twentieth to the full rate in the first fifth of the run, then down to nothing, in straight lines.

    >>> [round(triangle(t), 3) for t in (0.0, 0.2, 0.6, 1.0)]
    [0.05, 1.0, 0.5, 0.0]
    """
    return 0.05 + 0.95 * t / 0.2 if t < 0.2 else (1.0 - t) / 0.8


@dataclass(frozen=True, eq=False)
class Task:
    """A model, data, a loss and a metric.

    Attributes:
        model: ``model(seed)`` makes a fresh network. The global generator has that seed when it is called.
        batches: ``batches(split, seed, epoch)`` gives the batches of ``"train"``, ``"valid"`` or ``"test"``; the same
            arguments give the same batches, and ``"valid"`` comes out of the training data.
        loss: ``loss(model, batch)``, a scalar.
        metric: ``metric(model, batches)``, a number; the model is in evaluation mode, without gradients.
        optimizer: ``optimizer(model)``, with the highest learning rate that the run has.
        schedule: share of the run -> factor of the learning rate.
        epochs: how long a run is, unless it is asked for another length.
        groups: ``groups(model, batches)``, the metric of parts of the data by their names, such as of each class; None
            for what the metric itself suggests.
        metric_name, higher_is_better: what the metric is called, and which way is better.
        name, options: what the task is called, and the sizes that it was made with.
        example: inputs of one forward pass; None for the first input of the validation data.
    """

    model: Callable[[int], nn.Module]
    batches: Callable[[Split, int, int], Iterable[Any]]
    loss: Callable[[nn.Module, Any], Tensor] = cross_entropy
    metric: Callable[[nn.Module, Iterable[Any]], float] = accuracy
    optimizer: Callable[[nn.Module], Optimizer] = sgd
    schedule: Callable[[float], float] = triangle
    epochs: int = 5
    groups: Callable[[nn.Module, Iterable[Any]], Mapping[str, float]] | None = None
    metric_name: str = "accuracy"
    higher_is_better: bool = True
    name: str = "task"
    options: Mapping[str, Any] = field(default_factory=dict)
    example: Callable[[], Any] | None = None

    def example_input(self) -> Any:
        """Inputs of one forward pass: the task's own, or the first of the first validation batch."""
        if self.example is not None:
            return self.example()
        for batch in self.batches("valid", 0, 0):
            inputs = batch[0] if isinstance(batch, (tuple, list)) else batch
            return tree_map(lambda x: x[:1] if isinstance(x, Tensor) else x, inputs)
        raise DataError(f"task '{self.name}' has no validation batch")

    @torch.no_grad()
    def measure(self, model: nn.Module, split: Split = "valid") -> float:
        """The metric on a split."""
        device = next(model.parameters()).device
        with evaluating(model):
            value = float(self.metric(model, (placed(b, device) for b in self.batches(split, 0, 0))))
        return value

    def describe(self) -> dict[str, Any]:
        """The record for ``run.json``."""
        return {
            "name": self.name, "options": dict(self.options), "metric": self.metric_name,
            "higher_is_better": self.higher_is_better,
        }  # fmt: skip


def placed(batch: Any, device: torch.device) -> Any:
    """A batch, its tensors on a device."""
    return tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, batch)


def is_task(found: Any) -> bool:
    """Whether an object, or what a class makes, has what a task has: a model and batches."""
    return all(callable(getattr(found, a, None)) for a in ("model", "batches"))


def as_task(found: Any, name: str = "task") -> Task:
    """A `Task` of any object, or class, that has ``model`` and ``batches``; what it lacks takes its default.

    Raises:
        ModelError: it has neither.

    >>> class Mine:
    ...     epochs = 2
    ...     def model(self, seed): return nn.Linear(2, 2)
    ...     def batches(self, split, seed, epoch): return [(torch.ones(1, 2), torch.zeros(1, dtype=torch.long))]
    >>> as_task(Mine).epochs
    2
    """
    if isinstance(found, Task):
        return found
    if inspect.isfunction(found) and not is_task(found):
        raise ModelError(
            f"'{name}' is a function, and a task is an object, or a class, with model(seed) and batches(split, seed, "
            f"epoch): name what {name}() gives in the file, as in TASK = {name}()"
        )
    if not is_task(found):
        raise ModelError(
            f"'{name}' is not a task: it needs model(seed) and batches(split, seed, epoch); see secateur tasks"
        )
    made = found() if inspect.isclass(found) else found
    fields = {f.name for f in dataclasses.fields(Task)} - {"name"}
    given = {f: getattr(made, f) for f in fields if hasattr(made, f)}
    return Task(**given, name=str(getattr(made, "name", name)))


def find(source: Any, **options: Any) -> Task:
    """A task by the name of a ready one, ``FILE.py:NAME``, or an object that is one.

    Args:
        options: sizes of a ready task, see ``secateur explain NAME``.

    Raises:
        UnknownName: no ready task is called so.
        ModelError: the file has no such task.
        RecipeError: options that the task does not have.

    >>> find("digits", epochs=1).epochs
    1
    """
    if not isinstance(source, str):
        if options:
            raise RecipeError(f"a task that you wrote has no options {sorted(options)}: set them where it is made")
        return as_task(source, getattr(source, "__name__", type(source).__name__))
    path, colon, name = source.rpartition(":")
    if colon and path.endswith(".py"):
        found = named(Path(path), name)
        if found is None:
            raise ModelError(f"{path} has nothing named '{name}'")
        return find(as_task(found, name), **options)
    if source not in parts("task"):
        raise UnknownName("task", source, parts("task"), "secateur tasks, or FILE.py:NAME")
    part = get("task", source)
    given = part.knobs_with(options)
    for knob, value in given.items():
        if isinstance(value, bool) or not isinstance(value, type(part.knobs[knob])):
            raise RecipeError(f"task '{source}': {knob} is a number like {part.knobs[knob]}, not {value!r}")
        if value <= 0:
            raise RecipeError(f"task '{source}': {knob} is {value}, and must be above 0")
    made: Task = part.function(**given)
    return dataclasses.replace(made, name=source, options=given)


def names_a_task(source: str) -> bool:
    """Whether what a user wrote where a model or a task may stand is a task."""
    path, colon, name = source.rpartition(":")
    if colon and path.endswith(".py"):
        return Path(path).is_file() and is_task(named(Path(path), name))
    return source in parts("task")
