"""What `secateur.train` does for a transform that ends in a sub-network."""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from ..disk import refuse
from ..errors import RecipeError
from ..layers import find_layers
from ..masks import Masks
from ..measure import Peak, count_parameters
from ..recipe import Recipe
from ..record import run_record
from ..registry import get
from ..structured.targets import Target
from ..tasks import find
from ..tasks.base import Split
from ..tasks.checkpoint import own_generators
from ..tasks.loop import OFTEN
from ..when.course import Progress
from ..when.result import Trained, digest_of
from ..when.train import train
from .course import Course


def train_supernet(
    task: Any,
    method: str,
    *,
    epochs: float | None = None,
    length: float = 0.25,
    rate: float = 0.1,
    out: str | Path | None = None,
    model: nn.Module | None = None,
    target: str | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    every: float = OFTEN,
    dense: str | Path | None = None,
    score: Split = "test",
    options: Mapping[str, Any] | None = None,
    knobs: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    command: str = "",
) -> Trained:
    """Train a task densely, then as the method says; what is found is fine-tuned and returned.

    Args:
        epochs: of the dense run; the task's own by default.
        length, rate: of the fine-tuning of what is found, as shares of ``epochs`` and of the task's learning rate; a
            ``length`` of 0 leaves it out.
        target: what goes: ``"flops 50%"``, ``"params 50%"``, ``"bytes 50%"`` or ``"latency 50%"``.
        knobs: of the method.
        out, model, seed, device, every, dense, score, options, progress, command: see `train`.

    Raises:
        RecipeError, DataError, ModelError, NumericalError, OutputError: with one sentence.
    """
    found = find(task, **(options or {}))
    part = get("transform", method)
    given = part.knobs_with(knobs or {})
    if target is None:
        raise RecipeError(f"'{method}' searches within a target: give one, such as --target 'flops 50%'")
    wanted = Target.parse(target)
    if score not in get_args(Split)[1:]:
        raise RecipeError(f"score is valid or test, not '{score}'")
    if length < 0 or not rate > 0:
        raise RecipeError(f"length is at least 0 and rate above 0: not {length:g}, {rate:g}")
    whole = float(found.epochs if epochs is None else epochs)
    folder = None if out is None else Path(out)
    work = None if folder is None else folder.with_name(folder.name + ".run")
    if folder is not None:
        refuse(folder)
    begun = time.perf_counter()
    with own_generators(), Peak() as peak:
        curves: list[dict[str, Any]] = []
        if model is None:
            first = train(
                found, epochs=whole, seed=seed, device=device, every=every, score=score, progress=progress,
                dense=dense or (None if work is None else work / "dense"),
            )  # fmt: skip
            net, curves = first.model, list(first.run["curves"])
        else:
            net = copy.deepcopy(model).to(device)
        start = {"metric": {"name": found.metric_name, "value": found.measure(net, score)}}
        before = {**start, **_parameters(net)}
        tags = {
            "task": {**found.describe(), "options": {k: str(v) for k, v in found.options.items()}}, "method": method,
            "knobs": {k: str(v) for k, v in sorted(given.items())}, "epochs": whole, "length": length, "rate": rate,
            "seed": seed, "target": target, "given": digest_of(net.state_dict()),
        }  # fmt: skip
        course = Course(
            found, net, wanted, whole, seed, length, rate, torch.device(device), work, every, tags,
            progress or (lambda *_: None), curves,
        )  # fmt: skip
        small = part.function(course, **given).eval()
        after: dict[str, Any] = {
            "metric": {"name": found.metric_name, "value": found.measure(small, score)},
            **_parameters(small),
        }
    gone = 1 - after["parameters"] / before["parameters"]
    recipe = Recipe(method=method, granularity="coupled", sparsity=max(0.0, gone), seed=seed)
    record = run_record(
        recipe=recipe, records=[], skipped=find_layers(small, only=("*",))[1],
        model={"source": f"task {found.name}", "class": type(small).__name__, "parameters": after["parameters"],
               "blocks": 0},
        data={"source": f"task {found.name}"}, timings={"total": time.perf_counter() - begun}, peak_memory=peak.bytes,
        command=command, before=before, after=after, notes=course.notes,
    )  # fmt: skip
    record |= {
        "task": found.describe(), "epochs": whole, "length": length, "rate": rate, "when": "during", "score": score,
        "target": target, "curves": course.curves, "rounds": [], "knobs": given, method: course.found,
    }  # fmt: skip
    result = Trained(small, recipe, Masks({}), record)
    if folder is not None:
        result.save(folder)
        shutil.rmtree(folder.with_name(folder.name + ".run"), ignore_errors=True)
    return result


def _parameters(model: nn.Module) -> dict[str, int]:
    parameters, nonzero = count_parameters(model)
    return {"parameters": parameters, "nonzero": nonzero}
