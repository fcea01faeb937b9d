"""Write the weights that a solver quantized as codes, where stock tools have a layout for them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..formats import Grid, OnGrid
from ..formats.integers import described, packed

_END = ".weight_packed"


def with_codes(tensors: Mapping[str, Tensor], grids: Mapping[str, OnGrid], model: nn.Module) -> dict[str, Tensor]:
    """A file's tensors, with codes in place of the weights of linear layers that lie on a grid."""
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        layer = name.removesuffix(".weight")
        grid = grids.get(layer) if name.endswith(".weight") and tensor.dim() == 2 else None
        if not isinstance(grid, Grid) or not isinstance(model.get_submodule(layer), nn.Linear):
            out[name] = tensor
        else:
            out |= packed(layer, tensor, grid)
    return out


def rewrite(folder: Path, grids: Mapping[str, OnGrid], model: nn.Module) -> None:
    """The same for all weight files of a model directory."""
    for file in sorted(set(folder.glob("*.safetensors")) - {folder / "masks.safetensors"}):
        tensors = with_codes(load_file(file), grids, model)
        part = file.with_suffix(".part")
        save_file(tensors, part, metadata={"format": "pt"})
        part.replace(file)


def enter_config(
    file: Path, bits: int, group: int, symmetric: bool, names: Mapping[str, Any], model: nn.Module
) -> None:  # fmt: skip
    """Say in ``config.json`` what is packed, so that stock loaders read it.

    Args:
        bits, group, symmetric: of every layer's grid; a group of 0 is a whole row.
        names: of all tensors in the files.
    """
    layers = packed_layers(names)
    forget(file)
    if not layers:
        return
    others = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)} - layers
    config = json.loads(file.read_text(encoding="utf-8"))
    config["quantization_config"] = described(bits, group, symmetric, others)
    file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def packed_layers(names: Iterable[str]) -> set[str]:
    """The layers that are packed, by the names of all tensors."""
    return {name.removesuffix(_END) for name in names if name.endswith(_END)}


def forget(file: Path) -> None:
    """Let ``config.json`` describe floats again, where it described what the model was read from."""
    config = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if config.pop("quantization_config", None) is not None:
        file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
