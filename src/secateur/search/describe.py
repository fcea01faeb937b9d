"""What a strategy may know of a layer, as numbers, and between which layers data flows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RecipeError
from ..graph import Dependencies, Family
from ..layers import Layer, evaluating, located
from ..measure.flops import flops

#: What `facts_of` says of each layer: the static part of the state of AMC (arXiv 1802.03494, equation 3).
FACTS = ("linear", "outputs", "inputs", "height", "width", "stride", "kernel", "flops")

Example = tuple[tuple[Any, ...], dict[str, Any]]


def facts_of(model: nn.Module, layers: Sequence[Layer], example: Example | None) -> dict[str, dict[str, float]]:
    """Layer name -> what `FACTS` names.

    Sizes of inputs and operations are those of one pass of the example; without one the sizes are 0, and a layer's
    operations are taken for its weights.
    """
    seen: dict[int, tuple[int, ...]] = {}
    operations: Mapping[str, int] = {}
    if example is not None:
        args, kwargs = example
        operations = operations_of(model, example)

        def look(module: nn.Module, given: tuple[Any, ...]) -> None:
            if given and isinstance(given[0], Tensor):
                seen.setdefault(id(module), tuple(given[0].shape))

        hooks = [m.register_forward_pre_hook(look) for m in {id(x.module): x.module for x in layers}.values()]
        try:
            with evaluating(model), torch.no_grad():
                model(*args, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()
    found = {}
    for layer in layers:
        spatial = layer.stored.dim() - 2 if "conv" in layer.kind and layer.kind != "conv1d-hf" else 0
        sides = seen.get(id(layer.module), ())[-spatial:] if spatial > 0 else ()
        kernel = tuple(layer.stored.shape[2:]) if spatial > 0 else ()
        found[layer.name] = {
            "linear": float(spatial <= 0),
            "outputs": float(layer.shape[0]),
            "inputs": layer.shape[1] / float(torch.Size(kernel).numel() if kernel else 1),
            "height": float(sides[0]) if len(sides) > 1 else 1.0 if spatial <= 0 and seen else 0.0,
            "width": float(sides[-1]) if sides else 1.0 if spatial <= 0 and seen else 0.0,
            "stride": float(max(getattr(layer.module, "stride", (0,)), default=0)) if spatial > 0 else 0.0,
            "kernel": float(max(kernel, default=1)),
            "flops": float(operations.get(layer.name, 0) or layer.numel),
        }
    return found


def operations_of(model: nn.Module, example: Example) -> Mapping[str, int]:
    """Module name -> operations of one pass of the example, and of the whole model under the empty name."""
    with evaluating(model), torch.no_grad():
        found = flops(model, *example[0], **example[1])
    return {**found.by_module, "": found.total}


def _sides(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Parameter name -> the place of its layer in the model, and the axis of its outputs."""
    return {name: (place, output) for place, (_, name, output) in enumerate(located(model))}


def _ends(found: Dependencies, family: Family, sides: Mapping[str, tuple[int, int]]) -> tuple[list[str], list[str]]:
    """The weights that compute what a family's units are, and those that read it, in the model's order.

    A depthwise convolution does both: of its inputs each output reads one.
    """
    made, read = [], []
    slotted = {n for s in found.slots for n in s.names if n in sides and s.axis == 1 - sides[n][1]}
    for slot in (found.slots[i] for i in family.slots):
        name = next((n for n in slot.names if n in sides), None)
        if name is None:
            continue
        if slot.axis == sides[name][1]:
            made.append(name)
            if name not in slotted and slot.tensor.dim() > 2:
                read.append(name)
        elif slot.axis == 1 - sides[name][1]:
            read.append(name)
    order = {name: place for name, (place, _) in sides.items()}
    return sorted(set(made), key=order.__getitem__), sorted(set(read), key=order.__getitem__)


def edges_of_layers(model: nn.Module, found: Dependencies, parameters: Sequence[str]) -> list[tuple[int, int]]:
    """Pairs of layers (by their place in ``parameters``) of which the second reads what the first computes.

    Read off the dependency analysis: the outputs of the first and the inputs of the second lie in one family. Of
    layers that share a family, as around a skip connection, only later ones read earlier ones.
    """
    sides = _sides(model)
    place = {name: i for i, name in enumerate(parameters)}
    edges: dict[tuple[int, int], None] = {}
    for family in found.families:
        made, read = _ends(found, family, sides)
        for a in made:
            for b in read:
                if a in place and b in place and sides[a][0] < sides[b][0]:
                    edges.setdefault((place[a], place[b]))
    return list(edges)


def edges_of_families(
    model: nn.Module, found: Dependencies, families: Sequence[Family]
) -> tuple[list[tuple[int, int]], list[str]]:
    """Pairs of families with a layer that reads units of the first to compute units of the second; and for each
    family the weight that computes it first, or reads it first where nothing does.
    """
    sides = _sides(model)
    ends = [_ends(found, family, sides) for family in families]
    edges = [
        (f, g)
        for f, (_, read) in enumerate(ends)
        for g, (made, _) in enumerate(ends)
        if f != g and set(read) & set(made)
    ]
    return edges, [next(iter([*made, *read]), "") for made, read in ends]


def scaled_facts(rows: Sequence[Mapping[str, float]], names: Sequence[str] = FACTS) -> Tensor:
    """``(nodes, facts)``, each fact brought to [0, 1] over the nodes; one that is the same everywhere becomes 0.

    >>> scaled_facts([{"flops": 2.0}, {"flops": 6.0}, {"flops": 4.0}], ["flops"]).flatten().tolist()
    [0.0, 1.0, 0.5]
    """
    if not rows:
        raise RecipeError("there is nothing to search: no layer or family may be cut")
    table = torch.tensor([[row.get(name, 0.0) for name in names] for row in rows], dtype=torch.float64)
    low, high = table.amin(0), table.amax(0)
    return ((table - low) / (high - low).clamp_min(1e-12) * (high > low)).float()
