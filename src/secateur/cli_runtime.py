"""What the command line does with methods of run time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .coupled import batches_of, example_inputs, load_module
from .data import CALIBRATION
from .disk import refuse
from .errors import ModelError, RecipeError
from .layers import evaluating
from .measure import machine, versions
from .prune import prune
from .record import dumps
from .registry import get
from .runtime import Dynamic, save
from .runtime.knobs import check
from .runtime.measured import call_of_batch, measured, table
from .runtime.store import stock
from .tasks import names_a_task
from .terminal import command, interruptible, out_console

#: Tokens in a window, where no length is asked for; the latter where a text goes through the model many times.
WINDOW, SHORT = 512, 128


def prune_runtime(
    source: str,
    method: str,
    out: Path,
    axes: Mapping[str, Any],
    knobs: Mapping[str, Mapping[str, Any]],
    *,
    target: str | None,
    example: str | None,
    data: str | None,
    count: int,
    length: int | None,
    force: bool,
    as_json: bool,
) -> None:
    """Put a method of run time that needs no training into a model, write it, and print what it brings.

    It is measured on the batches of the data, or on the example.

    Args:
        length: tokens in a window; None for what is usual for the method.

    Raises:
        RecipeError: options that such a method does not have.
    """
    if unused := [name for name, value in axes.items() if value not in (None, [])]:
        raise RecipeError(
            f"'{method}' works at run time and has no {unused[0]}: give --target, or --set {method}.KNOB=VALUE"
        )
    if others := sorted(set(knobs) - {method}):
        raise RecipeError(f"'{method}' has no part '{others[0]}': write --set {method}.KNOB=VALUE")
    part, own = get("transform", method), dict(knobs.get(method, {}))
    check(part, own)
    if target is not None and own.get("target") is not None:
        raise RecipeError(f"'{method}' has one target: give --target, or --set {method}.target")
    own |= {} if target is None else {"target": target}
    if names_a_task(source):
        raise RecipeError(f"'{method}' needs a model that is trained already: {source} is a task")
    refuse(out, force, way="choose another directory or --force")
    with interruptible(f"stopped: {out} was not written"):
        net = _model(source)
        decodes = bool(part.facts.get("decodes"))
        if length is None:
            length = WINDOW if decodes else SHORT
        given = data if "data" in part.needs or data != CALIBRATION or (decodes and example is None) else None
        batches = batches_of(source, given, net, count, length)[0] if given else []
        inputs = batches[0] if batches and example is None else example_inputs(example, net)
        args, kwargs = call_of_batch(inputs)[0]
        inputs = kwargs or args[0]
        _check(net, args, kwargs)
        gates: Dynamic = prune(net, method, example=inputs, data=batches or None, **own)
        found = part.facts.get("measured", measured)(gates, batches or [inputs])
        gates.record |= {"source": source, "command": command()}
        save(gates, out, force)
        run = {**gates.record, "measured": found, "versions": versions(), "machine": machine()}
        (out / "run.json").write_text(dumps(run), encoding="utf-8")
    if as_json:
        print(json.dumps(run))
        return
    print(table(gates, found))
    out_console.print(f"model   {out}", soft_wrap=True, markup=False)


def _model(source: str) -> nn.Module:
    """A model by name; a transformers directory as the class that its config names."""
    folder = Path(source)
    return stock(folder).eval() if (folder / "config.json").is_file() else load_module(source)


def _check(net: nn.Module, args: Any, kwargs: Any) -> None:
    """Refuse an example that the model cannot be called with."""
    try:
        with evaluating(net), torch.no_grad():
            net(*args, **kwargs)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{type(net).__name__} does not run on the example or the data: {reason}") from None
