"""The command line."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from . import cli_compare, cli_compound, cli_measure, cli_methods, cli_recommend, cli_runtime, cli_search, cli_train
from .data import CALIBRATION
from .errors import RecipeError, SecateurError
from .fuse import methods as decompositions
from .granularity import parse
from .methods import load
from .options import (
    Alloc,
    Crit,
    Device,
    Embeddings,
    Epochs,
    EvalWindows,
    Example,
    Exported,
    Force,
    Goal,
    Gran,
    Json,
    Length,
    Method,
    Model,
    Multiple,
    Only,
    Out,
    Propagate,
    Quantize,
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
    Windows,
    axes_of,
    pairs,
    part_knobs,
    read_recipe,
)
from .printing import compared, summary
from .processes import alone
from .prune import recipe_of
from .recipe import Recipe
from .runtime import is_runtime
from .tasks import names_a_task
from .terminal import app, bar, command, err_console, fail, interruptible, out_console

# -- commands --------------------------------------------------------------------------------------


@app.command()
def prune(
    model: Model,
    out: Out,
    method: Method = None,
    recipe_file: RecipeFile = None,
    sparsity: Sparsity = None,
    granularity: Gran = None,
    allocation: Alloc = None,
    criterion: Crit = None,
    solver: Solver = None,
    quantize: Quantize = None,
    embeddings: Embeddings = None,
    storage: Storage = None,
    recovery: Recovery = None,
    schedule: Schedule = None,
    steps: Steps = None,
    propagate: Propagate = None,
    only: Only = None,
    skip: Skip = None,
    seed: Seed = None,
    knobs: Set = None,
    data: Annotated[
        str, typer.Option("--data", help="Calibration: text:FILE, jsonl:FILE#field, hf:DATASET.")
    ] = CALIBRATION,
    windows: Windows = 64,
    length: Annotated[
        int | None, typer.Option("--length", min=2, help="Tokens in a window.", show_default="512")
    ] = None,
    evaluate: Annotated[
        str | None, typer.Option("--eval", help="Held-out text: also measure dense and pruned.")
    ] = None,
    eval_windows: EvalWindows = None,
    memory: Annotated[float, typer.Option("--memory", help="GiB of activations in one pass.")] = 2.0,
    target: Goal = None,
    example: Example = None,
    exported: Exported = False,
    multiple: Multiple = 8,
    blocks: Annotated[int | None, typer.Option("--blocks", min=1, help="Prune only the first so many blocks.")] = None,
    resident: Annotated[bool, typer.Option("--resident", help="Load the whole model at once.")] = False,
    force: Force = False,
    epochs: Epochs = None,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Prune a model directory into another that stock tools load; a task (secateur tasks) is trained first.

    Interrupted at any moment, the same command goes on at the block it was in.
    """
    from .directory import prune_directory, works_on_the_whole
    from .modules import is_module, prune_module

    axes = axes_of(locals())
    if not names_a_task(model):
        alone(f"secateur prune {model}")
    if quantize is not None and method is not None and (is_runtime(method) or method in decompositions()):
        raise RecipeError(f"--quantize goes with single weights; method '{method}' takes something else away")
    if method is not None and is_runtime(method):
        return cli_runtime.prune_runtime(
            model, method, out, axes, part_knobs(knobs or []), target=target, example=example, data=data, count=windows,
            length=length, force=force, as_json=as_json,
        )  # fmt: skip
    length = cli_runtime.WINDOW if length is None else length
    if (compound := cli_compound.asked(method, recipe_file, axes, quantize=quantize, target=target, set=knobs)) and (
        not names_a_task(model)
    ):
        return cli_compound.prune(
            model, compound, out, example=example, data=data, count=windows, length=length, force=force,
            as_json=as_json, storage=storage,
        )  # fmt: skip
    if names_a_task(model):
        if quantize is not None:
            raise RecipeError("--quantize takes a model directory: write the trained model first, and quantize that")
        return cli_train.train_source(
            model, method or "magnitude", recipe_file, axes, knobs or [], out, force=force, as_json=as_json,
            epochs=epochs, when="after", device=device, target=target, multiple=multiple, storage=storage,
        )  # fmt: skip
    if method in decompositions():
        _refuse_storage(storage)
        with interruptible(f"stopped: {out} was not written"):
            return _decompose(model, method, out, axes, knobs, target, data, windows, length, force, as_json)
    free = {} if recipe_file else {"recovery": recovery}
    recipe = recipe_of(read_recipe(method, recipe_file, axes, knobs or [], quantize), free, target, example, exported)
    if parse(recipe.granularity).coupled:
        _refuse_storage(storage)
        with interruptible(f"stopped: {out} was not written"):
            return _prune_coupled(
                model, recipe, out, target, example, exported, multiple, data, windows, length, force, as_json
            )
    if is_module(model):
        with interruptible(f"stopped: {out} was not written"):
            made = prune_module(
                model, recipe, out, example=example, data=data, count=windows, length=length, force=force,
                storage=storage, command=command(),
            )  # fmt: skip
        return print(json.dumps(made.run) if as_json else f"{made}\nmodel  {out}")
    if not as_json:
        err_console.print(f"[bold]{recipe.method}[/] {recipe.granularity} on {escape(model)}, recipe {recipe.digest}")
    again = (
        "its state is dropped"
        if resident or works_on_the_whole(recipe)
        else "the same command goes on at the block it was in"
    )
    with interruptible(f"stopped: {out} was not written, and {again}"), bar(recipe.method, None, not as_json) as show:
        run = prune_directory(
            model,
            recipe,
            out,
            data=data,
            windows_count=windows,
            length=length,
            memory=int(memory * 2**30),
            force=force,
            resident=resident,
            storage=storage,
            stop=blocks,
            command=command(),
            progress=lambda tick: show(tick.index, tick.count),
            evaluate=_evaluator(evaluate, eval_windows, length),
        )
    if as_json:
        print(json.dumps(run))
        return
    out_console.print(summary(run))
    for note in run["notes"]:
        out_console.print(f"note: {escape(note)}")
    out_console.print(f"model   {escape(str(out))}\nreport  {escape(str(out / 'report.html'))}", soft_wrap=True)


def _refuse_storage(storage: str | None) -> None:
    if storage is not None:
        raise RecipeError("--storage is for single weights that become zero or integers: leave it out here")


def _prune_coupled(
    model: str,
    recipe: Recipe,
    out: Path,
    target: str | None,
    example: str | None,
    exported: bool,
    multiple: int,
    data: str,
    windows: int,
    length: int,
    force: bool,
    as_json: bool,
) -> None:
    from .coupled import prune_source

    made, run = prune_source(
        model, recipe, out, target=target, example=example, exported=exported, multiple=multiple, data=data,
        count=windows, length=length, force=force, command=command(),
    )  # fmt: skip
    if as_json:
        print(json.dumps(run))
        return
    print(made)
    times = [run[k]["seconds"] for k in ("before", "after")]
    print(
        f"latency     {times[0] * 1e3:.1f} ms to {times[1] * 1e3:.1f} ms: {times[0] / times[1]:.2f} times as fast here"
    )
    out_console.print(f"model   {escape(str(out))}", soft_wrap=True)


def _decompose(
    model: str,
    method: str,
    out: Path,
    axes: Mapping[str, Any],
    knobs: list[str] | None,
    target: str | None,
    data: str,
    windows: int,
    length: int,
    force: bool,
    as_json: bool,
) -> None:
    from .decomposed import decompose_source

    taken = ("sparsity", "allocation", "only", "skip")
    if others := sorted(k for k, v in axes.items() if v and k not in taken):
        raise RecipeError(f"'{method}' replaces layers by smaller ones: it has no --{others[0]}")
    made = decompose_source(
        model, method, out, {k: v for k, v in axes.items() if k in taken and v}, dict(pairs(knobs or [])),
        target=target, data=data, count=windows, length=length, force=force, command=command(),
    )  # fmt: skip
    print(json.dumps(made.run) if as_json else f"{made}\nmodel  {out}")


def _evaluator(text: str | None, count: int | None, length: int) -> Callable[[Path], dict[str, Any]] | None:
    if text is None:
        return None
    from .quality import measure as run

    return lambda path: run(path, text, windows_count=count, length=length)


@app.command()
def plan(
    model: Model,
    method: Method = None,
    recipe_file: RecipeFile = None,
    sparsity: Sparsity = None,
    granularity: Gran = None,
    allocation: Alloc = None,
    criterion: Crit = None,
    solver: Solver = None,
    quantize: Quantize = None,
    embeddings: Embeddings = None,
    recovery: Recovery = None,
    schedule: Schedule = None,
    steps: Steps = None,
    only: Only = None,
    skip: Skip = None,
    knobs: Set = None,
    target: Goal = None,
    example: Example = None,
    exported: Exported = False,
    multiple: Multiple = 8,
    data: Annotated[str | None, typer.Option("--data", help="For coupled units ranked by data.")] = None,
    as_json: Json = False,
) -> None:
    """Say what a recipe would do to a model; writes nothing, and reads only headers but for coupled units."""
    from .directory import plan as make

    axes = axes_of(locals())
    compound = cli_compound.asked(method, recipe_file, axes, quantize=quantize, target=target, set=knobs)
    compound = compound or cli_compound.of_decomposition(method, axes, knobs or [], target)
    if compound is not None:
        return cli_compound.plan(model, compound, example=example, data=data, as_json=as_json)
    free = {} if recipe_file else {"recovery": recovery}
    recipe = recipe_of(read_recipe(method, recipe_file, axes, knobs or [], quantize), free, target, example, exported)
    made: Any
    if parse(recipe.granularity).coupled:
        from .coupled import plan_source

        made = plan_source(
            model,
            recipe,
            target=target,
            example=example,
            exported=exported,
            multiple=multiple,
            data=data,
            weights=False,
        )
    else:
        made = make(model, recipe)
    print(json.dumps(made.to_dict()) if as_json else made)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o")] = Path("demo-out"),
    sparsity: Annotated[float, typer.Option(min=0.0, max=0.99)] = 0.5,
    windows: Windows = 16,
    eval_windows: Annotated[int, typer.Option("--eval-windows", min=1)] = 12,
    length: Length = 512,
    force: Force = False,
) -> None:
    """Prune the real SmolLM2-135M with magnitude, wanda and sparsegpt, and print one table."""
    from .demo import run_demo

    with interruptible("stopped: the same command with --force starts again"), bar("demo", 7, True) as show:
        result = run_demo(out, sparsity, windows, eval_windows, length, force, lambda k, n, _: show(k, n), command())
    out_console.print(compared(result, sparsity))
    out_console.print(
        f"model   {escape(str(result['model']))}\nreport  {escape(str(result['report']))}", soft_wrap=True
    )


cli_methods.register(app)
cli_measure.register(app)
cli_train.register(app)
cli_search.register(app)
cli_compare.register(app)
cli_recommend.register(app)


def main() -> None:
    """Run the command line; a mistake is one sentence on standard error and a non-zero exit."""
    load()
    try:
        app(standalone_mode=True)
    except SecateurError as error:
        fail(str(error), 2)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            fail("the disk is full: free some space and run the same command again", 2)
        raise
