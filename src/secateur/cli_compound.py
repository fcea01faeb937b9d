"""What the commands do with compounds, and with decompositions, which are compounds of one step on a task."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .compound import Compound, is_compound
from .compound.command import plan_source, prune_source
from .compound.run import Compounded
from .compound.tasks import plan_task
from .data import CALIBRATION
from .errors import OutputError, RecipeError
from .fuse import methods as decompositions
from .options import pairs
from .tasks import find, names_a_task
from .terminal import bar, command, interruptible, out_console
from .when import train


def asked(method: str | None, file: Path | None, axes: Mapping[str, Any], **options: Any) -> Compound | None:
    """The compound that a recipe file holds; None where it is another recipe.

    Raises:
        RecipeError: options beside it, which would have no step to go to.
    """
    if file is None or not file.is_file() or not is_compound(file):
        return None
    given = {**{k: v for k, v in axes.items() if k != "seed"}, **options, "method": method}
    if beside := sorted(k for k, v in given.items() if v not in (None, [], False)):
        raise RecipeError(f"{file} says all in its steps: write --{beside[0]} into the step that it belongs to")
    made = Compound.load(file)
    return made if axes.get("seed") is None else Compound(made.steps, made.name, int(axes["seed"]))


def of_decomposition(
    method: str | None, axes: Mapping[str, Any], knobs: list[str], target: str | None
) -> Compound | None:  # fmt: skip
    """A decomposition as a compound of one step; None of another method."""
    if method not in decompositions():
        return None
    taken = ("sparsity", "allocation", "only", "skip", "seed")
    if others := sorted(k for k, v in axes.items() if v and k not in taken):
        raise RecipeError(f"'{method}' replaces layers by smaller ones: it has no --{others[0]}")
    own = {k: v for k, v in axes.items() if k in taken and k != "seed"}
    step = {"method": method, **own, **({} if target is None else {"target": target}), **pairs(knobs)}
    return Compound.of({"steps": [{"decompose": step}], "name": str(method), "seed": axes.get("seed") or 0})


def prune(
    source: str, compound: Compound, out: Path, *, example: str | None, data: str, count: int, length: int, force: bool,
    as_json: bool, storage: str | None = None,
) -> None:  # fmt: skip
    """``secateur prune MODEL --recipe compound.yaml``."""
    named = None if data == CALIBRATION else data
    with interruptible(f"stopped: {out} was not written"):
        made = prune_source(
            source, compound, out, example=example, data=named, count=count, length=length, force=force,
            storage=storage, command=command(),
        )  # fmt: skip
    _said(made, out, as_json)


def plan(
    source: str, compound: Compound, *, example: str | None, data: str | None, as_json: bool
) -> None:  # fmt: skip
    """``secateur plan MODEL --recipe compound.yaml``."""
    made = (
        plan_task(find(source), compound, source=source)
        if names_a_task(source)
        else plan_source(source, compound, example=example, data=data)
    )
    print(json.dumps(made.to_dict()) if as_json else made)


def train_task(
    task: str, compound: Compound, out: Path, *, options: Mapping[str, Any], force: bool, as_json: bool, **more: Any
) -> None:  # fmt: skip
    """``secateur train TASK --recipe compound.yaml``."""
    if force and out.exists():
        import shutil

        if not (out / "run.json").is_file():
            raise OutputError(f"{out} was not written by secateur: delete it yourself, or choose another --out")
        shutil.rmtree(out)
    again = f"stopped: {out} was not written; the same command goes on where it was"
    with interruptible(again), bar(compound.name, None, not as_json) as show:
        made: Compounded = train(
            task, compound, out=out, options=options, command=command(),
            progress=lambda name, done, of: show(done, of), **more,
        )  # fmt: skip
    _said(made, out, as_json)


def _said(made: Compounded, out: Path, as_json: bool) -> None:
    if as_json:
        print(json.dumps(made.run))
        return
    print(made)
    if metric := made.run.get("metric"):
        print(
            f"{metric['name']}, {metric['split']}: {metric['before']:.4f} dense, {metric['after']:.4f} after all steps"
        )
    out_console.print(f"model   {out}", soft_wrap=True, markup=False)
