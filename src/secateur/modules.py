"""Prune single weights of a module named on the command line: ``FILE.py:callable`` or a timm model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from .coupled import batches_of, example_inputs, load_module
from .disk import refuse
from .prune import prune
from .pruned import Pruned
from .recipe import Recipe


def is_module(source: str) -> bool:
    """Whether a source names a module, not a directory of a language model.

    >>> is_module("nets.py:small"), is_module("timm:resnet18"), is_module("demo")
    (True, True, False)
    """
    return source.startswith(("timm:", "timm-config:")) or source.rpartition(":")[0].endswith(".py")


def prune_module(
    source: str,
    recipe: Recipe,
    out: Path,
    *,
    example: str | None = None,
    data: str | None = None,
    count: int = 64,
    length: int = 512,
    force: bool = False,
    storage: str | None = None,
    command: str = "",
) -> Pruned:
    """Prune a module and write it, as `Pruned.save` does.

    Args:
        example: the shape of an input, for methods that need no more.
        storage: ``stock`` or ``smallest``, see `Pruned.save`.
        data: ``FILE.py:callable`` that gives batches; see `coupled.batches_of` for the loss.

    Raises:
        OutputError: ``out`` exists.
    """
    refuse(out, force, way="choose another directory or --force")
    net = load_module(source)
    batches: list[Any] = []
    loss = None
    if recipe.needs_data:
        batches, loss = batches_of(source, data, net, count, length)
    given = example_inputs(example, net) if recipe.needs_shape and not batches else None
    made: Pruned = prune(net, recipe, data=batches or None, loss=loss, example=given)
    made.run["command"], made.run["model"]["source"] = command, source
    if out.exists():
        shutil.rmtree(out) if out.is_dir() else out.unlink()
    made.save(out, storage=storage)
    return made
