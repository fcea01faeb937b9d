"""Bytes that are alive at once during a forward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from ..layers import evaluating


class _Live(TorchDispatchMode):
    """Counts the storages that operations make, as long as anything refers to them."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known = known
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_iter(out):
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                key = storage._cdata
                if key not in self._known and key not in self._live:
                    self._live[key] = (StorageWeakRef(storage), storage.nbytes())
        self._live = {k: v for k, v in self._live.items() if not v[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        return out


def peak_bytes(model: nn.Module, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> int:
    """Bytes of parameters, buffers, inputs and of the activations that are alive at once, at their most.

    Of one forward pass in evaluation mode, without gradients, counted operation by operation: the same on every
    machine. What a kernel takes inside one operation is not in it.
    """
    given = dict(kwargs or {})
    held = [*model.parameters(), *model.buffers(), *(x for x in tree_iter((args, given)) if isinstance(x, Tensor))]
    stored = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in held}
    with evaluating(model), torch.no_grad(), _Live(set(stored)) as live:
        model(*args, **given)
    return int(sum(stored.values()) + live.peak)
