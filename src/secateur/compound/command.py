"""Compounds from the command line: a model by name, another on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..coupled import batches_of, example_inputs, load_module, vocabulary
from ..data import CALIBRATION, windows
from ..disk import refuse
from ..errors import OutputError
from ..models import load_tokenizer, resolve
from ..runtime import TokenGates
from .plan import CompoundPlan, preview
from .recipe import Compound
from .run import Compounded, carry_out, is_smallest


def prune_source(
    source: str,
    compound: Compound,
    out: Path,
    *,
    example: str | None = None,
    data: str | None = None,
    count: int = 64,
    length: int = 512,
    force: bool = False,
    storage: str | None = None,
    command: str = "",
) -> Compounded:
    """Do all steps on a model, and write it in the type of the floats in which it is stored.

    Between steps the weights are float32, whatever they are stored in: commands one after the other, which store them
    in between, round them each time.

    Args:
        source: what `coupled.load_module` takes.
        data: text for a language model, or ``FILE.py:callable`` that gives batches.
        storage: see `Compounded.save`.

    Raises:
        OutputError: ``out`` exists.
    """
    refuse(out, force, way="choose another directory or --force")
    if Path(source).is_dir() and Path(source).resolve() == out.resolve():
        raise OutputError(f"--out {out} is the model itself: choose another directory")
    is_smallest(compound, storage)  # what cannot be is said before a model is read
    net, stored, given = _loaded(source, example, data, count, length, compound.needs())
    made = carry_out(net, compound, storage=storage, **given)
    made.run["command"], made.run["model"]["source"] = command, source
    own: Any = made.model.model if isinstance(made.model, TokenGates) else made.model
    for p in own.parameters():
        p.data = p.data.to(stored)
    if isinstance(getattr(own, "secateur_surgery", None), dict):
        own.secateur_surgery["source"] = source
    tokenizer = load_tokenizer(resolve(source)) if vocabulary(own) and hasattr(own, "save_pretrained") else None
    made.save(out, tokenizer, force)
    return made


def plan_source(
    source: str, compound: Compound, *, example: str | None = None, data: str | None = None, count: int = 16,
    length: int = 512,
) -> CompoundPlan:  # fmt: skip
    """What the steps should bring; nothing is written."""
    needs = compound.needs() if data is not None else compound.needs() - {"data", "loss"}
    net, _, given = _loaded(source, example, data, count, length, needs)
    return preview(net, compound, source=source, **given)


def _loaded(
    source: str, example: str | None, data: str | None, count: int, length: int, needs: set[str]
) -> tuple[nn.Module, torch.dtype, dict[str, Any]]:
    """The model in float32, the type it is stored in, and what the steps are given."""
    net = load_module(source, dtype=None)
    stored = next((p.dtype for p in net.parameters() if p.is_floating_point()), torch.float32)
    element = torch.finfo(stored).bits // 8
    for p in net.parameters():
        p.data = p.data.float()
    given: dict[str, Any] = {"element": element}
    path, colon, _ = (data or "").rpartition(":")
    if "data" in needs or "loss" in needs:
        if vocabulary(net) and not (colon and path.endswith(".py")):
            tokenizer = load_tokenizer(resolve(source))
            given["data"] = windows(data or CALIBRATION, tokenizer, count=count, length=length)
        else:
            given["data"], given["loss"] = batches_of(source, data, net, count, length)
            given["data"] = given["data"] or None
    if "example" in needs or example is not None or vocabulary(net):
        given["example"] = example_inputs(example, net)
    return net, stored, given
