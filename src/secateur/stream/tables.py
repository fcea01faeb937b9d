"""Embedding tables and the output head as integers: a row for each word, which no criterion prunes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RecipeError
from ..formats import Grid, grid, parse_integers
from ..formats.grid import check_grid
from ..layers import Layer
from ..recipe import Recipe


def table_names(model: nn.Module) -> list[str]:
    """The parameters that are tables: of embeddings, and of the output head; one that is tied is named once.

    >>> table_names(nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 8)))
    ['0.weight']
    """
    found = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    getter: Any = getattr(model, "get_output_embeddings", None)
    head = None if getter is None else getter()
    if isinstance(head, nn.Linear):
        found.append(head)  # type: ignore[arg-type]
    ids = {id(m.weight) for m in found}
    return [name for name, p in model.named_parameters() if id(p) in ids]


def check_tables(model: nn.Module, recipe: Recipe, layers: Iterable[Layer]) -> None:
    """Refuse tables that the recipe cannot round, before any work.

    Raises:
        RecipeError: there is none, one is pruned as well, or a group does not divide its columns.
    """
    if recipe.embeddings == "none":
        return
    bits, group = parse_integers(recipe.embeddings)
    names = table_names(model)
    if not names:
        raise RecipeError("this model has no embedding tables: leave embeddings at none")
    pruned = {id(getattr(x.module, x.parameter)): x.name for x in layers}
    for name in names:
        table = model.get_parameter(name)
        check_grid((table.shape[0], table.shape[1]), name, bits=bits, group=group)
        if id(table) in pruned:
            raise RecipeError(f"{pruned[id(table)]} would be pruned and rounded as a table: leave it out of --only")


def rounded(table: Tensor, recipe: Recipe) -> tuple[Tensor, Grid]:
    """A table on its grid, in its own type, by the clipping with the least squared error."""
    bits, group = parse_integers(recipe.embeddings)
    found = grid(table.detach().float(), bits, group)
    return found.round(table.detach().float()).to(table.dtype), found


@torch.no_grad()
def round_tables(model: nn.Module, recipe: Recipe) -> dict[str, Grid]:
    """Round the tables of a model in place, those that are in memory; their grids by the parameter's name."""
    grids: dict[str, Grid] = {}
    for name in table_names(model) if recipe.embeddings != "none" else []:
        table = model.get_parameter(name)
        if table.device.type != "meta":
            values, grids[name] = rounded(table, recipe)
            table.copy_(values)
    return grids


def round_stored(
    tensors: Mapping[str, Tensor], of: Mapping[str, str], model: nn.Module, recipe: Recipe
) -> tuple[dict[str, Tensor], dict[str, Grid]]:
    """The same for tensors as files name them, with the grids by those names.

    Args:
        of: the parameter's name, by the name in the files.
    """
    out, grids = dict(tensors), dict[str, Grid]()
    if recipe.embeddings == "none":
        return out, grids
    names = set(table_names(model))
    for stored in tensors:
        if of[stored] in names:
            out[stored], grids[stored] = rounded(tensors[stored], recipe)
    if missing := names - {of[n] for n in grids}:
        raise RecipeError(f"{sorted(missing)[0]} is not stored by itself: quantize the tables with --resident")
    return out, grids
