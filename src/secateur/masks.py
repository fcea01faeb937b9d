"""Masks: which weights stay, by layer name."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .errors import ModelError
from .layers import Layer, find_layers

_SHAPE = re.compile(r"^(\d+),(\d+)$")  # "o,i" in the metadata


class Masks(Mapping[str, Tensor]):
    """Boolean masks ``(o, i)`` by layer name; True keeps. Stored as bits, an eighth of a byte a weight."""

    def __init__(self, masks: Mapping[str, Tensor] | None = None) -> None:
        self._bits: dict[str, tuple[np.ndarray, tuple[int, int]]] = {}
        for name, mask in (masks or {}).items():
            self.put(name, mask)

    def put(self, name: str, mask: Tensor) -> None:
        self._bits[name] = (np.packbits(mask.cpu().numpy().reshape(-1)), (mask.shape[0], mask.shape[1]))

    def __getitem__(self, name: str) -> Tensor:
        bits, (o, i) = self._bits[name]
        return torch.from_numpy(np.unpackbits(bits, count=o * i).astype(bool)).reshape(o, i)

    def __iter__(self) -> Iterator[str]:
        return iter(self._bits)

    def __len__(self) -> int:
        return len(self._bits)

    @property
    def sparsity(self) -> float:
        """Fraction of the weights under a mask that is gone."""
        total = sum(o * i for _, (o, i) in self._bits.values())
        kept = sum(int(np.unpackbits(b, count=o * i).sum()) for b, (o, i) in self._bits.values())
        return 1.0 - kept / total if total else 0.0

    def apply(self, model: nn.Module) -> None:
        """Zero what the masks remove, in place; the names of the model's parameters stay as they are."""
        layers = {layer.name: layer for layer in _all_layers(model)}
        for name in self:  # all are looked at before the first is changed
            if name not in layers:
                raise ModelError(f"the masks name {name}, which the model does not have")
            if layers[name].shape != self._bits[name][1]:
                raise ModelError(f"the mask of {name} is {self._bits[name][1]}, the weight {layers[name].shape}")
        with torch.no_grad():
            for name in self:
                layer = layers[name]
                layer.stored.masked_fill_(layer.from_oi(~self[name].to(layer.stored.device)), 0.0)

    def save(self, path: Path) -> None:
        """Write a safetensors file: the bits, and the shapes in its metadata."""
        temporary = path.with_name(f".{path.name}.tmp")
        shapes = {name: f"{o},{i}" for name, (_, (o, i)) in self._bits.items()}
        save_file({n: torch.from_numpy(b) for n, (b, _) in self._bits.items()}, temporary, metadata=shapes)
        os.replace(temporary, path)

    @staticmethod
    def load(path: Path) -> Masks:
        """The inverse of `save`."""
        masks = Masks()
        try:
            with safe_open(path, framework="pt") as f:
                shapes = f.metadata() or {}
                for name in f.keys():  # noqa: SIM118
                    shape = _SHAPE.match(shapes.get(name, ""))
                    o, i = (int(shape[1]), int(shape[2])) if shape else (0, 0)
                    bits = f.get_tensor(name).numpy()
                    if shape is None or bits.dtype != np.uint8 or bits.shape != (-(-o * i // 8),):
                        raise ModelError(f"{path} does not hold the mask of {name} that it announces")
                    masks._bits[name] = (bits, (o, i))
        except FileNotFoundError:
            raise ModelError(f"there is no file {path}") from None
        except SafetensorError as error:
            raise ModelError(f"{path} is not a file of masks: {error}") from None
        if shapes.keys() - masks._bits.keys() - {"format"}:
            raise ModelError(f"{path} lacks masks that it announces: {sorted(shapes.keys() - masks._bits.keys())}")
        return masks

    @staticmethod
    def of_zeros(model: nn.Module, names: Mapping[str, object] | list[str]) -> Masks:
        """The masks that the exact zeros of a model imply."""
        layers = {layer.name: layer for layer in _all_layers(model)}
        return Masks({n: layers[n].weight() != 0 for n in names})


def _all_layers(model: nn.Module) -> list[Layer]:
    return find_layers(model, only=("*",))[0]
