"""Commands that train: ``train``, ``tasks``, and ``prune`` where it is given a task."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from . import cli_compound, registry
from .errors import OutputError, RecipeError
from .masks import Masks
from .options import (
    Alloc,
    Crit,
    Device,
    Epochs,
    Force,
    Goal,
    Gran,
    Json,
    Method,
    Multiple,
    Only,
    Out,
    RecipeFile,
    Recovery,
    Schedule,
    Seed,
    Set,
    Skip,
    Solver,
    Sparsity,
    Steps,
    Storage,
    axes_of,
    part_knobs,
    read_recipe,
    split_knobs,
)
from .processes import joined
from .recipe import Recipe
from .terminal import bar, command, err_console, interruptible, out_console
from .when import train as run
from .when.train import runner_of


def train(
    task: Annotated[str, typer.Argument(help="A ready task (secateur tasks) or FILE.py:NAME.")],
    out: Out,
    method: Method = None,
    recipe_file: RecipeFile = None,
    sparsity: Sparsity = None,
    epochs: Epochs = None,
    seed: Seed = None,
    granularity: Gran = None,
    allocation: Alloc = None,
    criterion: Crit = None,
    solver: Solver = None,
    recovery: Recovery = None,
    schedule: Schedule = None,
    steps: Steps = None,
    only: Only = None,
    skip: Skip = None,
    knobs: Set = None,
    target: Goal = None,
    multiple: Multiple = 8,
    when: Annotated[
        str | None, typer.Option("--when", help="before, during or after training (default: the method's own).")
    ] = None,
    masks: Annotated[
        Path | None, typer.Option("--masks", help="A masks.safetensors to train under in place of a method.")
    ] = None,
    score: Annotated[
        str, typer.Option("--score", help="What the result is measured on: test, or valid to choose a setting by.")
    ] = "test",
    storage: Storage = None,
    device: Device = "cpu",
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Train a task, densely or with a method of pruning; --set task.NAME=VALUE sets its sizes.

    Interrupted at any moment, the same command goes on where it was, and ends with the same weights. Several processes
    make one run: torchrun --nproc-per-node 2 -m secateur train ...
    """
    axes = axes_of(locals())
    train_source(
        task, method, recipe_file, axes, knobs or [], out, force=force, as_json=as_json, epochs=epochs, when=when,
        masks=None if masks is None else Masks.load(masks), device=device, target=target, multiple=multiple,
        score=score, storage=storage,
    )  # fmt: skip


def train_source(
    task: str, method: str | None, recipe_file: Path | None, axes: dict[str, Any], knobs: list[str], out: Path, *,
    force: bool = False, as_json: bool = False, **more: Any,
) -> None:  # fmt: skip
    """What ``train`` and ``prune`` do with a task; ``more`` is for `secateur.train`."""
    given = dict(axes)
    options, own = split_knobs(knobs)
    target = more.get("target")
    compound = cli_compound.asked(method, recipe_file, axes, target=target, masks=more.get("masks"), set=own)
    if compound := compound or cli_compound.of_decomposition(method, axes, own, target):
        rest = {k: v for k, v in more.items() if k in ("epochs", "device", "score", "storage")}
        return cli_compound.train_task(task, compound, out, options=options, force=force, as_json=as_json, **rest)
    chosen: str | Recipe | None = method
    if recipe_file is not None:
        chosen, given = read_recipe(method, recipe_file, axes, own), {}
    elif own:
        given["knobs"] = _knobs(method, own)
    again = f"stopped: {out} was not written; the same command goes on where it was"
    with (
        interruptible(again),
        joined(more["device"]) as place,
        bar(method or "dense", None, not (as_json or place)) as show,
    ):
        if force and out.exists() and not place:
            _remove(out)
        made = run(
            task, chosen, out=out, options=options, command=command(),
            progress=lambda name, done, of: show(done, of), **more, **given,
        )  # fmt: skip
    if place:
        return  # the first process speaks
    if as_json:
        print(json.dumps(made.run))
        return
    print(made)
    for note in made.run["notes"]:
        out_console.print(f"note: {escape(note)}")
    out_console.print(f"model   {escape(str(out))}", soft_wrap=True)
    if (out / "report.html").is_file():
        out_console.print(f"report  {escape(str(out / 'report.html'))}", soft_wrap=True)


def _knobs(method: str | None, own: list[str]) -> Mapping[str, Any]:
    """Knobs by part; of a method that trains by itself they are its own."""
    if method is None:
        raise RecipeError(f"--set {own[0]} belongs to a method, and none is named: say which with --method")
    return part_knobs(own) if runner_of(method) is not None else read_recipe(method, None, {}, own).knobs


def _remove(out: Path) -> None:
    """Make room for a run, where an earlier one lies."""
    import shutil

    if not (out / "run.json").is_file():
        raise OutputError(f"{out} was not written by secateur: delete it yourself, or choose another --out")
    shutil.rmtree(out)


def tasks(as_json: Json = False) -> None:
    """List the ready tasks, with their sizes as --set task.NAME=VALUE takes them."""
    shelf = registry.parts("task").values()
    if as_json:
        print(json.dumps([{"name": p.name, "summary": p.card.summary, "options": dict(p.knobs)} for p in shelf]))
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("task", "what it is", "options"):
        table.add_column(column)
    for part in shelf:
        options = ", ".join(f"{k}={v}" for k, v in part.knobs.items())
        table.add_row(part.name, escape(part.card.summary), options)
    out_console.print(table)
    out_console.print(
        "\nA task of your own is an object or a class in FILE.py with model(seed) and batches(split, seed, epoch);\n"
        "secateur explain NAME tells more of any of these",
        style="dim",
    )
    err_console.file.flush()


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(train)
    app.command()(tasks)
