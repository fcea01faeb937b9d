"""Decompose a model named on the command line, and write it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .coupled import batches_of, load_module, vocabulary
from .disk import refuse
from .fuse.decompose import Decomposed, decompose
from .models import load_tokenizer, resolve
from .registry import get


def decompose_source(
    source: str,
    method: str,
    out: Path,
    axes: Mapping[str, Any],
    knobs: Mapping[str, Any],
    *,
    target: str | None,
    data: str | None,
    count: int = 64,
    length: int = 512,
    force: bool = False,
    command: str = "",
) -> Decomposed:
    """Decompose and write a model, in the type of the floats in which it is stored.

    Args:
        source: what `coupled.load_module` takes.
        axes: sparsity, allocation, only, skip.
        data: text for a language model, or ``FILE.py:callable`` that gives batches.

    Raises:
        OutputError: ``out`` exists.
    """
    refuse(out, force, way="choose another directory or --force")
    net = load_module(source, dtype=None)
    stored = {n: p.dtype for n, p in net.named_parameters()}
    for p in net.parameters():  # products of small floats on a CPU are slow, and coarse
        p.data = p.data.float()
    batches: list[Any] = []
    if get("transform", method).needs != ("weight",):
        batches, _ = batches_of(source, data, net, count, length)
    made = decompose(net, method, target=target, data=batches or None, **axes, **knobs)
    kind = next(iter(stored.values()))
    for name, p in net.named_parameters():
        p.data = p.data.to(stored.get(name, kind))
    surgery: Any = net.secateur_surgery
    surgery["source"], made.run["command"], made.run["model"]["source"] = source, command, source
    tokenizer = load_tokenizer(resolve(source)) if vocabulary(net) and hasattr(net, "save_pretrained") else None
    made.save(out, tokenizer, force)
    return made
