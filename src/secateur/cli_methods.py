"""Commands that tell what there is: ``methods``, ``explain``, ``cite``, ``info``."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from . import registry
from .methods import all_methods, explain
from .options import Json
from .recipe import Recipe
from .terminal import out_console


def methods(
    needs: Annotated[str | None, typer.Option(help="nothing, inputs, gradients, or a fact such as gram.")] = None,
    granularity: Annotated[str | None, typer.Option(help="element, row, N:M or block.")] = None,
    family: Annotated[str | None, typer.Option(help="magnitude, llm, saliency, ...")] = None,
    when: Annotated[str | None, typer.Option(help="before, during, after or runtime.")] = None,
    as_json: Json = False,
) -> None:
    """List the named methods, and the parts on every axis."""
    if granularity is not None and ":" in granularity:
        granularity = "N:M"
    chosen = all_methods(needs=needs, granularity=granularity, family=family, when=when)
    others = [p for p in registry.parts("transform").values() if when is not None and p.facts.get("when") == when]
    if needs is not None or granularity is not None or family is not None:
        others = []
    if as_json:
        rows = [{"name": p.name, "summary": p.card.summary, "recipe": p.facts["recipe"].to_dict()} for p in chosen]
        print(json.dumps([*rows, *({"name": p.name, "summary": p.card.summary, "recipe": None} for p in others)]))
        return
    if not chosen and not others:
        out_console.print("no method fits; drop a filter")
        raise typer.Exit(1)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("method", "needs", "granularity", "solver", "what it does"):
        table.add_column(column)
    for part in chosen:
        recipe = part.facts["recipe"]
        facts = ", ".join(sorted(recipe.needs())) or "nothing"
        table.add_row(part.name, facts, recipe.granularity, recipe.solver, part.card.summary)
    for part in others:
        table.add_row(part.name, ", ".join(part.needs), "", "", part.card.summary)
    out_console.print(table)
    if needs is granularity is family is when is None:
        out_console.print()
        for kind in ("criterion", "granularity", "allocation", "schedule", "solver", "recovery", "search", "transform"):
            out_console.print(f"[bold]{kind:12}[/] {', '.join(registry.parts(kind))}")
        out_console.print("\nsecateur explain NAME tells more of any of them", style="dim")


def explain_command(name: Annotated[str, typer.Argument(help="A method, criterion, solver, ...")]) -> None:
    """Explain a method or a part: formula, when to choose it, what to beware of, source."""
    for part in explain(name):
        card = part.card
        out_console.print(f"[bold]{part.name}[/]  [dim]{part.kind}[/]\n{escape(card.summary)}")
        if card.formula:
            out_console.print(f"  [cyan]{escape(card.formula)}[/]")
        if card.choose:
            out_console.print(escape(card.choose))
        if card.beware:
            out_console.print(f"Beware: {escape(card.beware)}")
        recipe = part.facts.get("recipe")
        if recipe is not None:
            axes = ("criterion", "granularity", "allocation", "solver", "recovery", "propagate")
            out_console.print("Recipe: " + ", ".join(f"{a} {getattr(recipe, a)}" for a in axes), style="dim")
            out_console.print("Needs: " + (", ".join(sorted(recipe.needs())) or "nothing"), style="dim")
        else:
            out_console.print("Needs: " + (", ".join(part.needs) or "nothing"), style="dim")
        if part.knobs:
            out_console.print("Knobs: " + ", ".join(f"{k} = {v}" for k, v in part.knobs.items()), style="dim")
        out_console.print(f"Source: {escape(card.source)}\n", style="dim")


def cite(name: Annotated[str, typer.Argument(help="A named method.")]) -> None:
    """Print what to cite for a method."""
    for line in Recipe.of(name).cite():
        print(line)


def info() -> None:
    """Versions and machine, for a bug report."""
    from .kernels import described
    from .measure import machine, versions

    print(json.dumps({"versions": versions(), "machine": machine(), "sparse kernels": described()}, indent=1))


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(methods)
    app.command(name="explain")(explain_command)
    app.command()(cite)
    app.command()(info)
