"""The command that searches for what each layer keeps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from .errors import OutputError, RecipeError
from .options import (
    Crit,
    Example,
    Goal,
    Gran,
    Json,
    Length,
    Method,
    Model,
    Multiple,
    Only,
    RecipeFile,
    Seed,
    Set,
    Skip,
    Sparsity,
    Windows,
    axes_of,
    pairs,
    read_recipe,
)
from .terminal import bar, err_console, interruptible, out_console


def search(
    model: Model,
    evaluate: Annotated[
        str, typer.Option("--evaluate", help="FILE.py:callable that takes the model; higher is better.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Recipe to write; its history lies beside it.")],
    strategy: Annotated[str, typer.Option("--strategy", help="Who proposes (secateur methods).")] = "evolution",
    budget: Annotated[int, typer.Option("--budget", min=1, help="How many evaluations there may be.")] = 60,
    method: Method = None,
    recipe_file: RecipeFile = None,
    sparsity: Sparsity = None,
    granularity: Gran = None,
    criterion: Crit = None,
    only: Only = None,
    skip: Skip = None,
    seed: Seed = None,
    knobs: Set = None,
    options: Annotated[
        list[str] | None, typer.Option("--option", help="A knob of the strategy, e.g. --option sigma=0.3.")
    ] = None,
    target: Goal = None,
    example: Example = None,
    multiple: Multiple = 8,
    low: Annotated[float, typer.Option("--low", help="Least keep of a layer, as a share of a uniform one.")] = 0.2,
    data: Annotated[str | None, typer.Option("--data", help="Calibration data, as for prune.")] = None,
    recalibrate: Annotated[
        bool, typer.Option("--recalibrate", help="Measure batch norms anew on --data before each evaluation.")
    ] = False,
    windows: Windows = 64,
    length: Length = 512,
    force: Annotated[bool, typer.Option("--force", help="Overwrite --out and start anew.")] = False,
    as_json: Json = False,
) -> None:
    """Find what each layer keeps, by an evaluation of your own at a target that every try meets.

    Writes a recipe, which `secateur prune MODEL --recipe` takes. Interrupted at any moment, the same command goes on
    at the next evaluation.
    """
    axes = axes_of(locals())
    from .coupled import batches_of, example_inputs, load_module
    from .models import named
    from .search import search as run

    history = out.with_name(out.name + ".trials.jsonl")
    if out.exists() and not force:
        raise OutputError(f"{out} exists: choose another file or --force")
    if force:
        history.unlink(missing_ok=True)
    path, colon, name = evaluate.rpartition(":")
    judge = named(Path(path), name) if colon and path.endswith(".py") else None
    if not callable(judge):
        raise RecipeError(f"--evaluate '{evaluate}' is not there: write FILE.py:NAME of a function of the model")
    recipe = read_recipe(method or (None if recipe_file else "magnitude"), recipe_file, axes, knobs or [])
    if recipe_file is None:  # a method's own recovery would heal each try
        recipe = recipe.override(recovery="none")
    net = load_module(model)
    batches, loss = batches_of(model, data, net, windows, length)
    given: dict[str, Any] = {} if granularity is None else {"granularity": granularity}
    with (
        interruptible(f"stopped: the same command goes on from {history}"),
        bar(strategy, budget, not as_json) as show,
    ):
        found = run(
            net, recipe, evaluate=judge, strategy=strategy, budget=budget, target=target,
            example=None if example is None else example_inputs(example, net), data=batches or None, loss=loss,
            recalibrated=recalibrate, low=low, multiple=multiple, options=pairs(options or []), history=history,
            progress=lambda trial: show(trial.number + 1, budget), **given,
        )  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(found.recipe.dump(), encoding="utf-8")
    if as_json:
        print(json.dumps(found.to_dict()))
        return
    out_console.print(escape(str(found)), soft_wrap=True, highlight=False)
    out_console.print(f"recipe  {escape(str(out))}", soft_wrap=True)
    if not found.best.value > found.uniform.value:
        err_console.print("note: nothing better than the uniform allocation was found")


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command()(search)
