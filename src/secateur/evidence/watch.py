"""See the input of every watched weight where it is used, whatever module uses it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..errors import RecipeError
from ..layers import Layer

OnInput = Callable[[Layer, Tensor], None]

_POSITIONS: dict[Any, tuple[int, int]] = {  # function -> positions of (input, weight)
    F.linear: (0, 1),
    F.conv1d: (0, 1),
    F.conv2d: (0, 1),
    F.conv3d: (0, 1),
    torch.conv1d: (0, 1),
    torch.conv2d: (0, 1),
    torch.conv3d: (0, 1),
    F.conv_transpose1d: (0, 1),
    F.conv_transpose2d: (0, 1),
    F.conv_transpose3d: (0, 1),
    F.embedding: (0, 1),
    torch.addmm: (1, 2),
    torch.matmul: (0, 1),
    torch.Tensor.matmul: (0, 1),
    torch.Tensor.__matmul__: (0, 1),
    torch.mm: (0, 1),
}
_PRODUCTS = {torch.matmul, torch.mm, torch.Tensor.matmul, torch.Tensor.__matmul__}

#: Functions that multiply stacked experts by runs of rows: ``(rows, experts, offs=ends of the runs)``.
_GROUPED = {f for f in (getattr(F, "grouped_mm", None), getattr(torch, "_grouped_mm", None)) if f is not None}


class Stop(Exception):
    """Raised by a watcher to leave a forward pass early; `watch` lets it through."""


class _Watcher(TorchFunctionMode):
    """Reports ``(layer, input)`` just before a watched weight is used.

    Matching is by storage, not by module type, so that bare parameters, expert slices and any
    wrapper are seen as a plain layer is.
    """

    def __init__(self, layers: Iterable[Layer], on_input: OnInput) -> None:
        super().__init__()
        self._layers: dict[tuple[int, int, int], Layer] = {}
        self._stacks: dict[tuple[int, int, int], list[Layer]] = {}
        for layer in layers:
            self._layers[_key(layer.stored)] = layer
            if layer.index is not None:
                self._stacks.setdefault(_key(getattr(layer.module, layer.parameter)), []).append(layer)
        self._on_input = on_input

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            with _undispatched(), self:  # a mode is off while it handles a call; look inside this one
                return func(*args, **kwargs)
        if func in _GROUPED:
            self._on_grouped(args[0], args[1], kwargs.get("offs", args[2] if len(args) > 2 else None))
        if func in _PRODUCTS and isinstance(args[0], Tensor) and (left := self._layers.get(_key(args[0]))) is not None:
            self._on_input(left, args[1].mT)  # the weight stands on the left: W x
        places = _POSITIONS.get(func)
        if places is not None:
            x = args[places[0]] if len(args) > places[0] else kwargs.get("input")
            weight = args[places[1]] if len(args) > places[1] else kwargs.get("weight")
            if isinstance(weight, Tensor) and isinstance(x, Tensor):
                layer = self._layers.get(_key(weight))
                if layer is not None:
                    self._on_input(layer, x)
        return func(*args, **kwargs)

    def _on_grouped(self, x: Tensor, weight: Tensor, ends: Tensor | None) -> None:
        stack = self._stacks.get(_key(weight), ())
        if not stack or ends is None or x.dim() != 2:
            return
        edges = [0, *ends.tolist()]
        for layer in stack:
            assert layer.index is not None
            rows = x[edges[layer.index] : edges[layer.index + 1]]
            if rows.shape[0]:
                self._on_input(layer, rows)


@contextmanager
def _undispatched() -> Iterator[None]:
    """Let a composite function of `torch.nn.functional` run its body under a mode, not hand itself to it."""
    functional: Any = F
    original = functional.has_torch_function
    functional.has_torch_function = lambda _: False
    try:
        yield
    finally:
        functional.has_torch_function = original


def _key(weight: Tensor) -> tuple[int, int, int]:
    return (weight.untyped_storage().data_ptr(), int(weight.storage_offset()), weight.numel())


@contextmanager
def watch(layers: Iterable[Layer], on_input: OnInput) -> Iterator[None]:
    """Call ``on_input(layer, x)`` for every use of a watched weight inside the block.

    ``x`` is the tensor handed to the operation; `as_ni` turns it into rows.
    """
    with _Watcher(layers, on_input):
        yield


def as_ni(layer: Layer, x: Tensor) -> Tensor:
    """The input of a layer as ``(n, i)``: one row for each product with the weight matrix.

    Tokens and batch are merged for linear layers; convolutions are unfolded so that ``i`` matches the
    folded kernel positions (grouped ones stack their groups as rows); embeddings give one-hot rows.
    """
    module = layer.module
    if layer.kind == "embedding":
        if x.is_floating_point():
            raise RecipeError(
                f"{layer.name} is an embedding that also serves as an output layer (tied): its inputs are tokens "
                "here and activations there; use a criterion that needs no inputs"
            )
        return F.one_hot(x.reshape(-1), layer.stored.shape[0]).to(layer.stored.dtype)
    if layer.kind == "conv":
        spatial = x.dim() - 2 if x.dim() == layer.stored.dim() else x.dim() - 1
        if x.dim() != layer.stored.dim():
            x = x[None]
        return _unfold(module, x, spatial)
    if layer.kind == "conv-transpose":
        raise RecipeError(
            f"{layer.name}: input statistics of a transposed convolution are not defined per weight; "
            "use a criterion that needs no inputs, or skip it with --skip"
        )
    return x.reshape(-1, x.shape[-1])


def _unfold(module: Any, x: Tensor, spatial: int) -> Tensor:
    """Patches of a convolution's input, any number of spatial dimensions: ``(n, i)``."""
    padding = module._reversed_padding_repeated_twice
    if module.padding_mode == "zeros" and any(padding):  # other modes pad before the convolution sees it
        x = F.pad(x, padding)
    for d in range(spatial):  # dilation by strided views: unfold the span, then take every dilation-th
        span = module.dilation[d] * (module.kernel_size[d] - 1) + 1
        x = x.unfold(2 + d, span, module.stride[d])[..., :: module.dilation[d]]
    n, c = x.shape[:2]
    groups = module.groups
    x = x.reshape(n, groups, c // groups, *x.shape[2:])
    order = [0, 1, *range(3, 3 + spatial), 2, *range(3 + spatial, 3 + 2 * spatial)]
    x = x.permute(order)
    return x.reshape(-1, (c // groups) * int(torch.tensor(module.kernel_size).prod()))
