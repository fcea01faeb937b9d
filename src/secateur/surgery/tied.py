"""Give an output layer that shares its matrix with an embedding a matrix of its own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from ..graph.trace import stored_tensors


def shared_heads(model: nn.Module) -> tuple[str, ...]:
    """Names of parameters that are an embedding's too, in modules that are none: a tied output layer.

    >>> net = nn.ModuleDict({"embed": nn.Embedding(4, 2), "head": nn.Linear(2, 4, bias=False)})
    >>> shared_heads(net)
    ()
    >>> net["head"].weight = net["embed"].weight
    >>> shared_heads(net)
    ('head.weight',)
    """
    names: dict[int, list[str]] = {}
    for name, tensor in stored_tensors(model).items():
        names.setdefault(id(tensor), []).append(name)
    found: list[str] = []
    for group in names.values():
        of_table = [isinstance(model.get_submodule(n.rpartition(".")[0]), nn.Embedding) for n in group]
        if any(of_table):
            found += [n for n, table in zip(group, of_table, strict=True) if not table]
    return tuple(found)


def untie(model: nn.Module, names: Iterable[str]) -> None:
    """Give each of these parameters its own values, in place, and let a transformers config say so."""
    changed = False
    for name in names:
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        old: Any = getattr(module, leaf)
        module._parameters[leaf] = nn.Parameter(old.detach().clone(), old.requires_grad)
        changed = True
    if changed:
        for module in model.modules():
            config: Any = getattr(module, "config", None)
            for one in (config, getattr(config, "text_config", None)):
                if getattr(one, "tie_word_embeddings", False):
                    one.tie_word_embeddings = False  # type: ignore[union-attr]
