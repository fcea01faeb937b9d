"""The options that commands share, and how they become a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import RecipeError
from .recipe import Recipe

Model = Annotated[
    str, typer.Argument(help="A model directory, a hub id, 'demo', hf-config:FILE, timm:NAME or FILE.py:callable.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output, nothing else.")]
Method = Annotated[str | None, typer.Option("--method", "-m", help="A named method (secateur methods).")]
RecipeFile = Annotated[Path | None, typer.Option("--recipe", help="A recipe file (YAML).")]
Sparsity = Annotated[float | None, typer.Option(help="Fraction of the weights that goes, in [0, 1).")]
Gran = Annotated[
    str | None,
    typer.Option("--granularity", help="element, row, 2:4, any N:M, block(r,c), coupled, filter, channel, depth."),
]
Alloc = Annotated[str | None, typer.Option("--allocation", help="How the sparsity is spread over layers.")]
Crit = Annotated[str | None, typer.Option("--criterion", help="What a weight is worth.")]
Solver = Annotated[str | None, typer.Option("--solver", help="Whether and how the survivors move.")]
Recovery = Annotated[str | None, typer.Option("--recovery", help="What heals the model.")]
Schedule = Annotated[str | None, typer.Option("--schedule", help="Share of the target after each step.")]
Steps = Annotated[int | None, typer.Option("--steps", "--rounds", min=1, help="Rounds of score and cut.")]
Propagate = Annotated[str | None, typer.Option("--propagate", help="Calibrate on: layer, block or off.")]
Quantize = Annotated[
    str | None,
    typer.Option("--quantize", help="Survivors become integers (int4, int8, int4:128) or share values (shared:5)."),
]
Embeddings = Annotated[
    str | None, typer.Option("--embeddings", help="Embedding tables and output head become integers: int8, int4:64.")
]
Storage = Annotated[
    str | None, typer.Option("--storage", help="Write for stock tools (stock), or the fewest bytes (smallest).")
]
Only = Annotated[list[str] | None, typer.Option("--only", help="Glob of layers to prune; may be repeated.")]
Skip = Annotated[list[str] | None, typer.Option("--skip", help="Glob of layers to leave; may be repeated.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Of every random draw.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="A knob, e.g. --set solver.damp=0.02; may be repeated.")]
Goal = Annotated[str | None, typer.Option("--target", help="For coupled units: 'flops 50%' or 'params to 2M'.")]
Example = Annotated[str | None, typer.Option("--example", help="Shape of an input, e.g. 1x3x224x224.")]
Exported = Annotated[bool, typer.Option("--exported", help="For coupled units: cut the program torch.export makes.")]
Multiple = Annotated[int, typer.Option("--multiple", min=1, help="For coupled units: sizes are multiples of it.")]
Windows = Annotated[int, typer.Option("--windows", min=1, help="Calibration windows.")]
Length = Annotated[int, typer.Option("--length", min=2, help="Tokens in a window.")]
Tokens = Annotated[str, typer.Option("--tokens", help="Tokens of each pass that a language model is timed on.")]
EvalWindows = Annotated[int | None, typer.Option("--eval-windows", min=1, help="Held-out windows (default: all).")]

Force = Annotated[bool, typer.Option("--force", help="Overwrite --out.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Directory to write; must not exist.")]
Epochs = Annotated[float | None, typer.Option("--epochs", help="Of a whole training run (default: the task's own).")]
Device = Annotated[str, typer.Option("--device", help="Where it trains: cpu or cuda.")]

#: Fields of a recipe that have an option.
_AXES = (
    "sparsity", "granularity", "allocation", "criterion", "solver", "recovery", "schedule", "steps", "propagate",
    "embeddings", "only", "skip", "seed",
)  # fmt: skip


def axes_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a recipe among the options of a command, as it has them by name; None where one was not given.

    >>> axes_of({"model": "demo", "sparsity": 0.5, "only": [], "seed": None})
    {'sparsity': 0.5}
    """
    found = {name: options.get(name) for name in _AXES}
    return {k: v for k, v in found.items() if v is not None and v != []}


def numbers(text: str) -> list[int]:
    """Positive numbers separated by commas.

    >>> numbers("128,1")
    [128, 1]
    """
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise RecipeError(f"'{text}' is not understood: write positive numbers separated by commas, e.g. 128,1")
    return found


def _number(value: str) -> Any:
    """A knob's value as YAML would read it."""
    from ruamel.yaml import YAML

    return YAML(typ="safe").load(value)


def part_knobs(items: list[str]) -> dict[str, dict[str, Any]]:
    """Knobs by part.

    >>> part_knobs(["solver.damp=0.02"])
    {'solver': {'damp': 0.02}}
    """
    knobs: dict[str, dict[str, Any]] = {}
    for item in items:
        name, equals, value = item.partition("=")
        axis, dot, knob = name.partition(".")
        if not (equals and dot and knob):
            raise RecipeError(f"--set '{item}' is not understood: write --set solver.damp=0.02")
        knobs.setdefault(axis, {})[knob] = _number(value)
    return knobs


def split_knobs(items: list[str]) -> tuple[dict[str, Any], list[str]]:
    """The sizes of a task among knobs, and the others.

    >>> split_knobs(["task.width=8", "solver.damp=0.02"])
    ({'width': 8}, ['solver.damp=0.02'])
    """
    own = [x for x in items if x.startswith("task.")]
    return part_knobs(own).get("task", {}), [x for x in items if not x.startswith("task.")]


def pairs(items: list[str]) -> dict[str, Any]:
    """Knobs of one part.

    >>> pairs(["sigma=0.3", "sampler=gp"])
    {'sigma': 0.3, 'sampler': 'gp'}
    """
    found = {}
    for item in items:
        knob, equals, value = item.partition("=")
        if not (equals and knob):
            raise RecipeError(f"--option '{item}' is not understood: write --option sigma=0.3")
        found[knob] = _number(value)
    return found


def read_recipe(
    method: str | None, file: Path | None, axes: dict[str, Any], knobs: list[str], quantize: str | None = None
) -> Recipe:
    """The recipe of a method or a file, with what the options override."""
    if quantize is None:
        return _read_recipe(method, file, axes, knobs)
    own = [x for x in knobs if x.startswith("solver.")]  # of the form of the solver that rounds
    recipe = _read_recipe(method, file, axes, [x for x in knobs if x not in own])
    return recipe.quantized(quantize, part_knobs(own).get("solver"))


def _read_recipe(method: str | None, file: Path | None, axes: dict[str, Any], knobs: list[str]) -> Recipe:
    given = axes_of(axes)
    if knobs:
        given["knobs"] = part_knobs(knobs)
    if file is not None:
        if not file.exists():
            raise RecipeError(f"there is no recipe file {file}")
        recipe = Recipe.load(file)
        if not given and method is None:
            return recipe
        merged = {**recipe.to_dict(), **given}
        merged.pop("method")
        return Recipe.from_dict({"method": method or recipe.method, **merged})
    return Recipe.of(method or "wanda", **given)
