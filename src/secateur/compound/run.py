"""Carry out a compound on a model, step by step, and what comes of it."""

from __future__ import annotations

import datetime
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ..coupled import example_inputs, vocabulary
from ..data import Windows, windows
from ..disk import beside
from ..errors import DataError, RecipeError
from ..formats import OnGrid
from ..layers import evaluating
from ..masks import Masks
from ..measure import Peak, machine, versions
from ..models import next_token_loss
from ..prune import MEMORY
from ..stream.storage import STORAGES
from ..when.result import check_zeros
from .apply import Given, State, apply, dense_copy
from .figures import figures, whole_model
from .recipe import Compound
from .recover import stored_teacher


@dataclass(eq=False)
class Compounded:
    """What a compound made of a model, with the record of every step. Prints as a table.

    Attributes:
        model: to be used from now on; the one that was given may have been changed on the way.
        masks: what single weights are left, of layers where some are gone.
        grids: of layers that are stored as integers, or as values that they share.
        run: the content of ``run.json``: before, after, and each step with its own record.
    """

    model: nn.Module
    compound: Compound
    masks: Masks
    run: dict[str, Any] = field(repr=False)
    grids: dict[str, OnGrid] = field(default_factory=dict, repr=False)
    storage: str | None = None

    @property
    def sparsity(self) -> float:
        """Fraction of the weights under a mask that is zero."""
        return self.masks.sparsity

    def save(
        self, out: str | Path, tokenizer: Any = None, force: bool = False, storage: str | None = None
    ) -> Path:  # fmt: skip
        """Write the model, its masks, ``recipe.yaml`` and ``run.json``; `secateur.load` reads it.

        Args:
            storage: ``stock``, or ``smallest``: each matrix in the fewest bytes, without masks; what the compound was
                carried out for where it is not said.

        Raises:
            OutputError: ``out`` exists and is not empty, and is not to be replaced (``force``).
            RecipeError: the model has no such form.
        """
        from .disk import write

        smallest = is_smallest(self.compound, storage or self.storage)
        with beside(out, force) as part:
            write(self, part, smallest)
            if tokenizer is not None:
                tokenizer.save_pretrained(part)
        return Path(out)

    def __str__(self) -> str:
        return table(str(self.compound), self.run["before"], self.run["steps"], self.run["notes"])


#: What a table of steps shows: key, heading, width.
_COLUMNS = (("params", "parameters", 16), ("nonzero", "not zero", 16), ("bytes", "bytes", 16), ("flops", "FLOPs", 18))


def table(title: str, before: Mapping[str, Any], steps: list[dict[str, Any]], notes: list[str]) -> str:
    """Counts in front of the first step and behind each; of a task its metric too."""
    metric = next((s["metric"]["name"] for s in steps if s.get("metric")), None)
    wide = max([len(s["title"]) for s in steps] + [5]) + 4
    heads = "".join(f"{h:>{w}}" for _, h, w in _COLUMNS) + (f"{metric:>12}" if metric else "")
    lines = [title, f"{'step':{wide}}{heads}", _line("dense", before, before, wide)]
    lines += [_line(f"{k}  {s['title']}", s["after"], s, wide) for k, s in enumerate(steps, 1)]
    return "\n".join([*lines, *(f"note: {n}" for n in notes)])


def _line(name: str, counts: Mapping[str, Any], step: Mapping[str, Any], wide: int) -> str:
    cells = "".join(f"{'-' if counts.get(k) is None else format(counts[k], ','):>{w}}" for k, _, w in _COLUMNS)
    metric = step.get("metric")
    return f"{name:{wide}}{cells}" + (f"{metric['value']:>12.4f}" if metric else "")


def carry_out(
    model: nn.Module,
    compound: Compound,
    *,
    data: Any = None,
    loss: Any = None,
    tokenizer: Any = None,
    windows_count: int | None = None,
    length: int = 512,
    example: Any = None,
    memory: int = MEMORY,
    element: int | None = None,
    storage: str | None = None,
    **axes: Any,
) -> Compounded:
    """Do all steps on a model; what `secateur.prune` does with a compound.

    Args:
        storage: that it will be saved in, see `Compounded.save`; bytes are counted by it.

    Raises:
        RecipeError: something that a step needs was not given; before the first step.
    """
    refuse_axes(axes)
    if isinstance(data, str):
        data = windows(data, tokenizer, count=windows_count, length=length)
    if vocabulary(model):
        loss = next_token_loss if loss is None else loss
        example = example_inputs(None, model) if example is None else example
    elif data is not None and not isinstance(data, Windows):
        data = data if isinstance(data, Mapping) or hasattr(data, "shape") else list(data)
        if isinstance(data, list) and not data:
            raise DataError("the calibration data is empty: give at least one batch")
    smallest = is_smallest(compound, storage)
    given = Given(data, loss, example, memory, seed=compound.seed, element=element, smallest=smallest)
    _check(compound, given)
    return finish(model, compound, given)


def is_smallest(compound: Compound, storage: str | None) -> bool:
    """Whether each matrix is stored in the fewest bytes: it was asked for, or nothing else holds shared values.

    Raises:
        RecipeError: the storage is not known, or what the steps make has no such form.
    """
    if storage is not None and storage not in STORAGES:
        raise RecipeError(f"storage is {' or '.join(STORAGES)}, not '{storage}'")
    if compound.shares and storage == "stock":
        raise RecipeError("no stock tool reads shared values: leave storage out, or quantize to integers")
    smallest = compound.shares or storage == "smallest"
    for number, step in enumerate(compound.steps, 1):
        if smallest and step.takes & {"factors", "tokens"}:
            raise RecipeError(
                f"step {number} ({step}) makes a model with a format of its own, which has no smallest form: leave "
                "--storage out" + (", and quantize to integers" if compound.shares else "")
            )
    return smallest


def refuse_axes(axes: Mapping[str, Any]) -> None:
    """What a user wrote beside a compound, and would have no step to go to."""
    if axes:
        raise RecipeError(f"a compound says all in its steps: '{min(axes)}' belongs to one of them")


def _check(compound: Compound, given: Given) -> None:
    ways = {
        "data": (given.data, "pass data= (--data)"), "loss": (given.loss, "pass loss="),
        "example": (given.example, "pass example= (--example)"),
        "task": (given.task, "train a task (secateur train)"),
    }  # fmt: skip
    for number, step in enumerate(compound.steps, 1):
        for what in sorted(step.needs()):
            if ways[what][0] is None:
                article = "an" if what == "example" else "a"
                named = what if what == "data" else f"{article} {what}"
                raise RecipeError(f"step {number} ({step}) needs {named}: {ways[what][1]}")


def finish(model: nn.Module, compound: Compound, given: Given, metric: Any = None) -> Compounded:
    """The steps, one after the other, and the record of all of them.

    Args:
        metric: of a model, after each step; a dictionary with ``name`` and ``value``.
    """
    begun = time.perf_counter()
    state = State(model)
    steps: list[dict[str, Any]] = []
    with Peak() as peak:
        if lessons := compound.lessons():
            state.stored = stored_teacher(model, lessons, given)
            state.dense = dense_copy(model) if state.stored is None else None
        with evaluating(model):
            before = figures(model, {}, given.example, given.element, given.smallest)
        before = before if metric is None else {**before, "metric": metric(model)}
        for number, step in enumerate(compound.steps, 1):
            given.progress(f"step {number}", number - 1, len(compound.steps))
            started = time.perf_counter()
            record = apply(state, step, given, number)
            check_zeros(whole_model(state.model), state.masks)
            with evaluating(state.model):
                after = figures(state.model, state.grids, given.example, given.element, given.smallest)
            steps.append({
                "title": str(step), "step": step.to_dict(), "after": after, "record": record,
                **({} if metric is None else {"metric": metric(state.model)}),
                "seconds": round(time.perf_counter() - started, 3),
            })  # fmt: skip
    masks = Masks(state.masks)
    notes = dict.fromkeys(n for s in steps for n in s["record"].get("notes") or ())
    run = {
        "secateur": versions().get("secateur", "0"),
        "created": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "command": "",
        "compound": compound.to_dict(),
        "digest": compound.digest,
        "cite": compound.cite(),
        "model": {"source": "module", "class": type(model).__name__},
        "data": given.data.describe() if isinstance(given.data, Windows) else None,
        "sparsity": {"pruned_layers": masks.sparsity},
        "before": before,
        "after": steps[-1]["after"],
        "steps": steps,
        "curves": state.curves,
        "notes": [*notes, *state.notes],
        "timings": {"total": round(time.perf_counter() - begun, 3)},
        "peak_memory": peak.bytes,
        "versions": versions(),
        "machine": machine(),
    }
    storage = "smallest" if given.smallest else None
    return Compounded(state.model, compound, masks, run, dict(state.grids), storage)
