"""Layers as products and sums of smaller plain layers: how they are built, put in, and replayed from data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import ModelError

#: What one layer became, as JSON data: ``{"kind": ..., "ranks": [...]}``.
Facts = Mapping[str, Any]

#: Where a surgery plan lists what layers became: before anything was cut, and after.
BEFORE, AFTER = "factored", "factored_after"

#: Where it lists what was cut: positions of tensors, blocks, experts; and what goes with that.
CUTS, _WITH = ("kept", "removed", "experts"), ("mends", "untied")

_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class PlusSparse(nn.Module):
    """The sum of a factored layer and of a plain layer most of whose weights are zero."""

    def __init__(self, factored: nn.Module, sparse: nn.Module) -> None:
        super().__init__()
        self.factored, self.sparse = factored, sparse

    def forward(self, x: Tensor) -> Tensor:
        """Both, added."""
        total: Tensor = self.factored(x) + self.sparse(x)
        return total


def why_not(module: nn.Module) -> str | None:
    """Why a module cannot be factored; None where it can be."""
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return None
    if type(module) not in (nn.Linear, *_CONV):
        return f"a {type(module).__name__}, whose weight other code reads"
    if int(getattr(module, "groups", 1)) > 1:
        return "a grouped convolution"
    return None


def factored(module: nn.Module, facts: Facts) -> nn.Module:
    """An empty layer of that structure in place of a plain one: same device, dtype, mode and geometry.

    ``low-rank`` is a narrow layer followed by a pointwise one. ``tucker`` is pointwise, the kernel between few
    channels, and pointwise; ``cp`` has a filter along each axis of the kernel in its place.
    ``low-rank+sparse`` adds a layer of the full shape to the first.

    >>> factored(nn.Linear(8, 6), {"kind": "low-rank", "ranks": [2]})
    Sequential(
      (0): Linear(in_features=8, out_features=2, bias=False)
      (1): Linear(in_features=2, out_features=6, bias=True)
    )

    Raises:
        ModelError: the module is no plain layer, or the ranks are not ranks of it.
    """
    if reason := why_not(module):
        raise ModelError(f"it cannot be factored: {reason}")
    weight: Any = module.weight
    linear = not isinstance(module, _CONV)
    i, o = (int(n) for n in (weight.shape if type(module).__name__ == "Conv1D" else weight.shape[:2][::-1]))
    positions = () if linear else tuple(int(n) for n in weight.shape[2:])
    ranks = _ranks(facts, o, i, positions)
    bias = getattr(module, "bias", None) is not None

    def pointwise(a: int, b: int, bias: bool) -> nn.Module:
        made: nn.Module = nn.Linear(a, b, bias, device="meta") if linear else _like(module, a, b, bias, kernel=False)
        return made

    def full(a: int, b: int) -> nn.Module:
        return nn.Linear(a, b, False, device="meta") if linear else _like(module, a, b, False, kernel=True)

    made: nn.Module
    if facts["kind"] == "cp":
        (rank,) = ranks
        along = [_along(module, rank, a) for a in range(len(positions))]
        made = nn.Sequential(pointwise(i, rank, False), *along, pointwise(rank, o, bias))
    elif facts["kind"] == "tucker":
        made = nn.Sequential(
            pointwise(i, ranks[1], False), full(ranks[1], ranks[0]), pointwise(ranks[0], o, bias)
        )  # fmt: skip
    else:
        made = nn.Sequential(full(i, ranks[0]), pointwise(ranks[0], o, bias))
        if facts["kind"] == "low-rank+sparse":
            made = PlusSparse(made, full(i, o))
    made = made.to_empty(device=weight.device).to(weight.dtype).train(module.training)
    for parameter in made.parameters():
        parameter.requires_grad_(weight.requires_grad)
    return made


def _ranks(facts: Facts, o: int, c: int, positions: Sequence[int]) -> list[int]:
    """The ranks of a layer with ``o`` outputs, ``c`` inputs and a kernel of these sizes, none for a matrix."""
    whole = o * c * int(np.prod(positions))
    limits_of = {
        "low-rank": (min(o, whole // o),), "low-rank+sparse": (min(o, whole // o),), "tucker": (o, c),
        "cp": (whole // max(o, c, *positions),),
    }  # fmt: skip
    try:
        ranks, limits = [int(r) for r in facts["ranks"]], limits_of.get(facts["kind"], ())
    except (KeyError, TypeError, ValueError):
        ranks, limits = [], ()
    if not limits or len(ranks) != len(limits):
        raise ModelError(f"what it became is not understood: {dict(facts)}")
    if facts["kind"] in ("tucker", "cp") and not positions:
        raise ModelError(f"'{facts['kind']}' is for convolutions")
    for rank, limit in zip(ranks, limits, strict=True):
        if not 1 <= rank <= limit:
            raise ModelError(f"a layer of shape {o} x {whole // o} has no rank {rank}: ranks are 1 to {limit}")
    return ranks


def _like(conv: nn.Module, a: int, b: int, bias: bool, kernel: bool) -> nn.Module:
    """A convolution of the same dimensions: with the same kernel and geometry, or pointwise."""
    kind: Any = type(conv)
    if not kernel:
        made: nn.Module = kind(a, b, 1, bias=bias, device="meta")
        return made
    own: Any = conv
    made = kind(
        a, b, own.kernel_size, stride=own.stride, padding=own.padding, dilation=own.dilation,
        padding_mode=own.padding_mode, bias=bias, device="meta",
    )  # fmt: skip
    return made


def _along(conv: nn.Module, channels: int, axis: int) -> nn.Module:
    """A convolution of each channel by itself along one axis of the kernel, with the geometry of that axis."""
    kind: Any = type(conv)
    own: Any = conv

    def only(values: Sequence[int], other: int) -> tuple[int, ...]:
        return tuple(int(n) if a == axis else other for a, n in enumerate(values))

    padding = own.padding if isinstance(own.padding, str) else only(own.padding, 0)
    made: nn.Module = kind(
        channels, channels, only(own.kernel_size, 1), stride=only(own.stride, 1), padding=padding,
        dilation=only(own.dilation, 1), padding_mode=own.padding_mode, groups=channels, bias=False, device="meta",
    )  # fmt: skip
    return made


@torch.no_grad()
def fill(made: nn.Module, tensors: Sequence[Tensor], bias: Tensor | None) -> None:
    """Give a factored layer its matrices, in the order in which they are applied, and the bias."""
    layers = [m for m in made.modules() if not list(m.children())]
    for layer, tensor in zip(layers, tensors, strict=True):
        weight: Any = layer.weight
        weight.copy_(tensor.reshape(weight.shape))
    own = [b for m in layers if (b := getattr(m, "bias", None)) is not None]
    if bias is not None:
        own[0].copy_(bias)


def put(model: nn.Module, name: str, made: nn.Module) -> None:
    """Put a module in the place of another."""
    owner, _, key = name.rpartition(".")
    setattr(model.get_submodule(owner), key, made)


def install(model: nn.Module, layers: Mapping[str, Facts]) -> None:
    """Replay a decomposition: replace plain layers by empty factored ones, in place.

    Raises:
        ModelError: a layer is not there, or has no such ranks; earlier ones are replaced by then.
    """
    for name, facts in layers.items():
        if facts.get("kind") == "sparse":
            continue  # a plain layer with zeros
        try:
            made = factored(model.get_submodule(name), facts)
        except (AttributeError, ModelError) as error:
            raise ModelError(f"{name} is not the layer that was decomposed: {error}") from None
        put(model, name, made)


def carried(model: nn.Module) -> dict[str, Any]:
    """The part of a model's surgery that a plan made on it must repeat first.

    A model that was only decomposed has factors to put in; one that was cut before has all of that to go through
    (``earlier``), or is built from the config that says its sizes (``architecture``).
    """
    surgery = getattr(model, "secateur_surgery", None)
    if not isinstance(surgery, dict):
        return {}
    if not any(surgery.get(key) for key in (*CUTS, AFTER)):
        same = {key: surgery[key] for key in ("earlier", "architecture") if key in surgery}
        return {**same, **({BEFORE: surgery[BEFORE]} if surgery.get(BEFORE) else {})}
    if surgery.get("format") == "transformers":
        return {"architecture": True}
    kept = {"kept": {}, "mends": []} | {key: surgery[key] for key in (*CUTS, *_WITH, BEFORE, AFTER) if key in surgery}
    found = {"earlier": [*surgery.get("earlier", ()), kept]}
    return found | ({"architecture": True} if surgery.get("architecture") else {})


def pack(state: dict[str, Tensor], surgery: Mapping[str, Any]) -> dict[str, list[int]]:
    """Store the sparse terms of a decomposition as their values and a bit for each weight, where that is smaller.

    Args:
        state: tensors by name; changed in place.

    Returns:
        The shapes of those that were packed.
    """
    shapes: dict[str, list[int]] = {}
    for key in (BEFORE, AFTER):
        for path, facts in surgery.get(key, {}).items():
            name = {"low-rank+sparse": f"{path}.sparse.weight", "sparse": f"{path}.weight"}.get(facts["kind"], "")
            dense = state.get(name)
            if dense is None:
                continue
            there = dense != 0
            if int(there.sum()) * dense.element_size() + -(-dense.numel() // 8) < dense.numel() * dense.element_size():
                shapes[name] = list(dense.shape)
                bits = np.packbits(there.flatten().cpu().numpy(), bitorder="little")
                del state[name]
                state[f"{name}.values"], state[f"{name}.bits"] = dense[there], torch.from_numpy(bits)
    return shapes


def unpack(state: dict[str, Tensor], shapes: Mapping[str, Sequence[int]]) -> None:
    """The inverse of `pack`, in place.

    Raises:
        ModelError: the parts of a tensor do not fit each other.
    """
    for name, shape in shapes.items():
        values, bits = state.pop(f"{name}.values", None), state.pop(f"{name}.bits", None)
        size = int(np.prod(shape))
        if values is None or bits is None or bits.dtype != torch.uint8 or bits.numel() != -(-size // 8):
            raise ModelError(f"it holds no mask of {size} bits, and values, for {name}")
        there = torch.from_numpy(np.unpackbits(bits.numpy(), count=size, bitorder="little").astype(bool))
        if int(there.sum()) != values.numel():
            raise ModelError(f"it holds {values.numel()} values for the {int(there.sum())} of the mask of {name}")
        state[name] = torch.zeros(size, dtype=values.dtype).masked_scatter_(there, values).view(*shape)
