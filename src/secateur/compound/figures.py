"""What a model counts between two steps: parameters, those that are not zero, bytes as they are stored, operations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..formats import Grid, OnGrid
from ..layers import find_layers
from ..measure import count_parameters
from ..measure.flops import flops
from ..stream.storage import encoded
from ..structured.plan import inputs
from ..surgery.factors import AFTER, BEFORE


def figures(
    model: nn.Module, grids: Mapping[str, OnGrid], example: Any, element: int | None = None, smallest: bool = False
) -> dict[str, Any]:  # fmt: skip
    """Counts of a model as it is.

    Args:
        grids: of the layers that are stored as integers.
        example: inputs of one forward pass; None where operations are not counted.
        element: bytes that a float takes on disk, where that is not what it takes now.
        smallest: whether each matrix is stored in the fewest bytes.
    """
    parameters, nonzero = count_parameters(model)
    args, kwargs = ((), {}) if example is None else inputs(example)
    return {
        "params": parameters,
        "nonzero": nonzero,
        "bytes": smallest_bytes(model, grids, element) if smallest else stored_bytes(model, grids, element),
        "flops": None if example is None else int(flops(model, *args, **kwargs).total),
    }


def smallest_bytes(model: nn.Module, grids: Mapping[str, OnGrid], element: int | None = None) -> int:
    """Bytes of the tensors of a model with each matrix in the form that takes the fewest."""
    kind = {2: torch.bfloat16, 4: torch.float32}.get(element or 0)
    tensors = {n: t.detach() for n, t in _kept(model)}
    stored = {n: t.to(kind) if kind is not None and t.is_floating_point() else t for n, t in tensors.items()}
    return sum(t.nbytes for t in encoded(stored, grids, model)[0].values())


def stored_bytes(model: nn.Module, grids: Mapping[str, OnGrid], element: int | None = None) -> int:
    """Bytes of the tensors of a model on disk: integers packed, sparse terms as a bit for each and their values."""
    surgery = getattr(model, "secateur_surgery", {"format": "transformers"})
    stock = hasattr(model, "save_pretrained") and surgery.get("format") == "transformers"
    whole = (*model.parameters(), *model.buffers())  # our own format keeps every buffer
    tensors = {id(t): t for t in ([t for _, t in _kept(model)] if stock else whole)}
    width = {i: element if element and t.is_floating_point() else t.element_size() for i, t in tensors.items()}
    total = sum(t.numel() * width[i] for i, t in tensors.items())
    model = whole_model(model)
    layers = {x.name: x for x in find_layers(model, only=("*",))[0]}
    for name, grid in grids.items():
        layer = layers[name]
        if isinstance(grid, Grid) and isinstance(layer.module, nn.Linear):
            (o, i), zeros = layer.shape, 0 if grid.zero is None else 1
            words = 4 * o * -(-i * grid.bits // 32)
            groups = grid.scale.shape[1]
            packed = words + 2 * o * groups + zeros * 4 * groups * -(-o * grid.bits // 32)
            total += packed + 16 - layer.numel * width[id(layer.module.weight)]
    for name in sparse_terms(model):
        weight = layers[name].stored
        kept = int(weight.count_nonzero()) * width[id(getattr(layers[name].module, layers[name].parameter))]
        full = weight.numel() * width[id(getattr(layers[name].module, layers[name].parameter))]
        if name not in grids:
            total += min(0, kept + -(-weight.numel() // 8) - full)
    return total


def _kept(model: nn.Module) -> list[tuple[str, Tensor]]:
    """The tensors of a state dict, each once."""
    names = set(model.state_dict())
    return [*model.named_parameters(), *((n, b) for n, b in model.named_buffers() if n in names)]


def sparse_terms(model: nn.Module) -> list[str]:
    """Layers that a decomposition left with most of their weights zero."""
    surgery = getattr(model, "secateur_surgery", None)
    found = []
    for key in (BEFORE, AFTER):
        for path, facts in (surgery.get(key, {}) if isinstance(surgery, dict) else {}).items():
            if facts["kind"] in ("low-rank+sparse", "sparse"):
                found.append(f"{path}.sparse" if facts["kind"] == "low-rank+sparse" else path)
    return found


def whole_model(model: nn.Module) -> nn.Module:
    """The model that gates of run time are around; or itself."""
    inner = getattr(model, "model", None)
    return inner if hasattr(model, "structure") and isinstance(inner, nn.Module) else model
