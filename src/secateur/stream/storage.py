"""How a pruned model is written: as stock tools read it, or in the fewest bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..errors import RecipeError
from ..formats import Codebook, OnGrid
from ..formats.stored import RECORD, describe, encode_all
from ..layers import find_layers
from ..recipe import Recipe
from ..registry import get
from . import integers
from .shards import Output

#: ``stock``: safetensors that stock tools load; ``smallest``: each matrix in the fewest bytes (`formats.stored`).
STORAGES = ("stock", "smallest")


class Layout(Protocol):
    """Where tensors go in the files of a directory that is being written."""

    def shard(self, index: int, count: int) -> str:
        """The name of a file."""

    def encoded(
        self, output: Output, tensors: Mapping[str, Tensor], grids: Mapping[str, OnGrid], model: nn.Module
    ) -> dict[str, Tensor]:
        """What a file holds in place of these tensors."""

    def rewrite(self, output: Output, grids: Mapping[str, OnGrid], model: nn.Module) -> None:
        """The same for all files that ``save_pretrained`` wrote."""

    def lasting(self, grids: Mapping[str, OnGrid], model: nn.Module) -> dict[str, OnGrid]:
        """Of the grids that a directory had, those that weights are written on again, if they still lie on them."""

    def close(self, output: Output, recipe: Recipe, model: nn.Module) -> None:
        """Write what lets the directory be loaded."""

    def coded(self, output: Output) -> set[str]:
        """The layers that are codes now."""


def layout(recipe: Recipe, storage: str | None) -> Layout:
    """The layout that was asked for, or the one that holds what the recipe makes.

    Raises:
        RecipeError: the storage is not known, or cannot hold it.
    """
    if storage is not None and storage not in STORAGES:
        raise RecipeError(f"storage is {' or '.join(STORAGES)}, not '{storage}'")
    if storage == "stock" and shares(recipe):
        raise RecipeError("no stock tool reads shared values: leave --storage out, or choose --quantize int4")
    tables = recipe.embeddings != "none"
    if storage == "stock" and tables:
        raise RecipeError("the stock layout keeps embeddings as floats: leave --storage or --embeddings out")
    return Smallest() if storage == "smallest" or shares(recipe) or tables else Stock()


def shares(recipe: Recipe) -> bool:
    """Whether survivors share values that no stock layout holds."""
    return bool(get("solver", recipe.solver).facts.get("shares") == recipe.solver)


class Stock:
    """As ``save_pretrained`` writes; integers of linear layers as compressed-tensors does."""

    def shard(self, index: int, count: int) -> str:
        return f"model-{index + 1:05d}-of-{count:05d}.safetensors"

    def encoded(
        self, output: Output, tensors: Mapping[str, Tensor], grids: Mapping[str, OnGrid], model: nn.Module
    ) -> dict[str, Tensor]:
        return integers.with_codes(tensors, grids, model)

    def rewrite(self, output: Output, grids: Mapping[str, OnGrid], model: nn.Module) -> None:
        for file in sorted(output.part.glob("*.safetensors")):
            tensors = integers.with_codes(load_file(file), grids, model)
            output.write(file.name, tensors)

    def lasting(self, grids: Mapping[str, OnGrid], model: nn.Module) -> dict[str, OnGrid]:
        return {}

    def close(self, output: Output, recipe: Recipe, model: nn.Module) -> None:
        knobs = recipe.knobs_of("solver")
        told = (knobs.get("bits", 8), knobs.get("group", 0), knobs.get("symmetric", True))
        integers.enter_config(output.part / "config.json", *told, output.state["weight_map"], model)
        output.index(output.state["weight_map"])

    def coded(self, output: Output) -> set[str]:
        return integers.packed_layers(output.state["weight_map"])


class Smallest:
    """Each matrix in the form that takes the fewest bytes; what stands for it is kept in the output's state."""

    def shard(self, index: int, count: int) -> str:
        return f"stored-{index + 1:05d}-of-{count:05d}.safetensors"

    def encoded(
        self, output: Output, tensors: Mapping[str, Tensor], grids: Mapping[str, OnGrid], model: nn.Module
    ) -> dict[str, Tensor]:
        found, facts = encoded(tensors, grids, model)
        output.state["stored"] = {**output.state.get("stored", {}), **facts}
        return found

    def rewrite(self, output: Output, grids: Mapping[str, OnGrid], model: nn.Module) -> None:
        output.state["stored"] = rewrite(output.part, grids, model)

    def lasting(self, grids: Mapping[str, OnGrid], model: nn.Module) -> dict[str, OnGrid]:
        stored = {x.name: (x.weight(), x.stored.dtype) for x in find_layers(model, ("*",))[0]}
        stored |= {f"{name}.weight": told for name, told in stored.items()}
        stored |= {n: (p.detach(), p.dtype) for n, p in model.named_parameters() if n not in stored}
        found = {}
        for name, grid in grids.items():
            weight, dtype = stored.get(name, (None, None))
            if weight is not None and torch.equal(grid.round(weight.float()).to(dtype), weight.to(dtype)):
                found[name] = grid
        return found

    def close(self, output: Output, recipe: Recipe, model: nn.Module) -> None:
        seal(output.part, output.state.get("stored", {}), format="transformers", **{"class": type(model).__name__})

    def coded(self, output: Output) -> set[str]:
        told = output.state["stored"].items()
        return {name.removesuffix(".weight") for name, facts in told if "bits" in facts or facts["form"] == "shared"}


def encoded(
    tensors: Mapping[str, Tensor], grids: Mapping[str, OnGrid], model: nn.Module
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A file's tensors in their smallest forms, and the facts of each.

    Args:
        grids: by layer, and by the tensor's name for tables, whose grid is of the table as it is stored.
        model: whose layers they are.
    """
    known = {name: grid for name, grid in grids.items() if name in tensors}
    turned: set[str] = set()
    for layer in find_layers(model, ("*",))[0] if grids else []:
        name = f"{layer.name}.weight"
        grid = grids.get(layer.name)
        if grid is None or name not in tensors or layer.parameter != "weight" or layer.index is not None:
            continue
        if layer.kind == "conv-transpose" and not isinstance(grid, Codebook):
            continue  # its matrix is no plain view of the tensor
        known[name] = grid
        if layer.transposed:
            turned.add(name)
    return encode_all(tensors, known, turned)


def rewrite(folder: Path, grids: Mapping[str, OnGrid], model: nn.Module) -> dict[str, Any]:
    """Write the weight files of a directory anew in the fewest bytes; returns the facts that `seal` writes."""
    files = sorted(f for f in folder.glob("*.safetensors") if not f.name.startswith("masks"))
    facts: dict[str, Any] = {}
    for k, file in enumerate(files):
        tensors, told = encoded(load_file(file), grids, model)
        facts |= told
        save_file(tensors, folder / Smallest().shard(k, len(files)), metadata={"format": "pt"})
        file.unlink()
    for index in folder.glob("*.safetensors.index.json"):
        index.unlink()
    return facts


def seal(folder: Path, facts: Mapping[str, Any], **more: Any) -> None:
    """Write ``stored.json``; ``config.json`` describes floats then, which is what a loader makes of them.

    Args:
        more: what ``stored.json`` says besides.
    """
    integers.forget(folder / "config.json")
    (folder / RECORD).write_text(describe(folder, facts, **more), encoding="utf-8")


def seal_model(folder: Path, grids: Mapping[str, OnGrid], model: nn.Module, source: str) -> None:
    """Write the files of a model that was just saved anew in the fewest bytes.

    Args:
        source: what the model was made of, as a user names it.
    """
    facts = rewrite(folder, grids, model)
    stock = hasattr(model, "save_pretrained") and hasattr(model, "config")
    named = {"class": type(model).__name__, "source": "" if source == "module" else source}
    seal(folder, facts, format="transformers" if stock else "module", **named)


def weight_map(folder: Path) -> dict[str, str]:
    """In which file each tensor of a directory lies."""
    found: dict[str, str] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as f:
            found |= dict.fromkeys(f.keys(), file.name)
    return found


def notes(recipe: Recipe, layers: Iterable[str], coded: set[str]) -> list[str]:
    """What the record should say of weights that take few values, and are stored as floats.

    Args:
        layers: that were solved.
        coded: that are stored as codes.
    """
    names = set(layers)
    if not get("solver", recipe.solver).facts.get("quantizes") or names <= coded:
        return []
    left = len(names - coded)
    return [f"{left} of {len(names)} layers have no layout for codes: their values are stored as floats"]
