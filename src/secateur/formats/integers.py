"""Quantized weights in the files of stock tools: the ``pack-quantized`` layout of compressed-tensors.

A weight ``(o, i)`` becomes ``weight_packed`` (the codes of a row one after the other, ``bits`` bits each, the lowest
first, raised by ``2^(bits-1)``, in int32 words), ``weight_scale`` ``(o, groups)``, ``weight_shape`` and, where the grid
is not symmetric, ``weight_zero_point`` (packed in the same way, down its columns).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ModelError
from .grid import Grid

METHOD, LAYOUT = "compressed-tensors", "pack-quantized"
_PARTS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
_AT_ONCE = 1 << 20  # codes that are taken apart into bits


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Codes ``(rows, n)`` as int32 words ``(rows, ceil(n bits / 32))``.

    >>> pack_words(torch.tensor([[-8, -7, 7]], dtype=torch.int8), 4).tolist()
    [[3856]]
    """
    rows, n = codes.shape
    if codes.numel() > _AT_ONCE and rows > 1:
        return torch.cat([pack_words(part, bits) for part in codes.split(max(1, _AT_ONCE // n))])
    of_word = torch.arange(bits, device=codes.device)
    # Bit by bit into whole words of 32 bits, which hold 32 codes in ``bits`` words whatever ``bits`` is.
    raised = torch.nn.functional.pad(codes.long() + (1 << (bits - 1)), (0, -n % 32))
    ones = (raised[..., None] >> of_word) & 1
    words = ones.reshape(rows, -1, 32) << torch.arange(32, device=codes.device)
    found = words.sum(-1)[:, : -(-n * bits // 32)]
    signed: Tensor = torch.where(found >= 2**31, found - 2**32, found)
    return signed.to(torch.int32).contiguous()


def unpack_words(words: Tensor, bits: int, n: int) -> Tensor:
    """The inverse of `pack_words`: ``(rows, n)`` int8."""
    rows = words.shape[0]
    if rows * n > _AT_ONCE and rows > 1:
        return torch.cat([unpack_words(part, bits, n) for part in words.split(max(1, _AT_ONCE // n))])
    ones = (words.long()[..., None] >> torch.arange(32, device=words.device)) & 1
    ones = ones.reshape(rows, -1)[:, : n * bits].reshape(rows, n, bits)
    raised = (ones << torch.arange(bits, device=words.device)).sum(-1)
    return (raised - (1 << (bits - 1))).to(torch.int8)


def packed(name: str, weight: Tensor, grid: Grid) -> dict[str, Tensor]:
    """The tensors of a weight on a grid, by their names in a file; scales take bfloat16, which holds them exactly.

    Args:
        name: of the layer.
    """
    parts = {
        "weight_packed": pack_words(grid.codes(weight.float()), grid.bits),
        "weight_scale": grid.scale.to(torch.bfloat16),
        "weight_shape": torch.tensor(weight.shape),
    }
    if grid.zero is not None:
        parts["weight_zero_point"] = pack_words(grid.zero.t(), grid.bits).t().contiguous()
    return {f"{name}.{part}": tensor for part, tensor in parts.items()}


def described(bits: int, group: int, symmetric: bool, ignore: Iterable[str]) -> dict[str, Any]:
    """The entry ``quantization_config`` of a model's config.

    Args:
        bits, group, symmetric: of every layer's grid; a group of 0 is a whole row.
        ignore: linear layers that are not quantized.
    """
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "group" if group else "channel",
        "group_size": group or None,
        "dynamic": False,
    }
    scheme = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": METHOD,
        "format": LAYOUT,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {**scheme, "format": LAYOUT}},
        "ignore": sorted(ignore),
    }


def is_packed(path: str | Path) -> bool:
    """Whether a model directory holds weights in this layout."""
    try:
        config = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    found = config.get("quantization_config") if isinstance(config, dict) else None
    return isinstance(found, dict) and found.get("quant_method") == METHOD and found.get("format") == LAYOUT


def unpacked(tensors: Mapping[str, Tensor], config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    """All tensors of a file, with weights in place of what stands for them.

    Args:
        config: ``quantization_config``, as `described` makes it.
        dtype: of the weights.

    Raises:
        ModelError: the layout is another, or parts are missing or do not fit.
    """
    try:
        (group,) = config["config_groups"].values()
        bits = int(group["weights"]["num_bits"])
        symmetric = bool(group["weights"]["symmetric"])
        if config["format"] != LAYOUT or group["weights"]["type"] != "int" or not 2 <= bits <= 8:
            raise ValueError("another layout")
        plain = {n: t for n, t in tensors.items() if n.rpartition(".")[2] not in _PARTS}
        for name in [n for n in tensors if n.endswith(".weight_packed")]:
            layer = name.removesuffix(".weight_packed")
            parts = {part: tensors[f"{layer}.{part}"] for part in _PARTS[: 3 if symmetric else 4]}
            plain[f"{layer}.weight"] = _weight(parts, bits).to(dtype)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ModelError(f"the quantized weights are not {LAYOUT} as secateur reads it: {error}") from None
    return plain


def grids_in(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Grid]:
    """The grids of the layers that a file holds as codes, by layer.

    Args:
        config: ``quantization_config``, of a layout that `unpacked` reads.
    """
    (group,) = config["config_groups"].values()
    bits, found = int(group["weights"]["num_bits"]), {}
    for name in [n for n in tensors if n.endswith(".weight_packed")]:
        layer = name.removesuffix(".weight_packed")
        parts = {part: tensors[f"{layer}.{part}"] for part in _PARTS if f"{layer}.{part}" in tensors}
        found[layer] = _grid(parts, bits)
    return found


def _grid(parts: Mapping[str, Tensor], bits: int) -> Grid:
    rows, columns = (int(n) for n in parts["weight_shape"])
    scale = parts["weight_scale"].float()
    zero = None
    if "weight_zero_point" in parts:
        zero = unpack_words(parts["weight_zero_point"].t(), bits, rows).t().float()
    return Grid(bits, columns // scale.shape[-1], scale, zero)


def _weight(parts: Mapping[str, Tensor], bits: int) -> Tensor:
    rows, columns = (int(n) for n in parts["weight_shape"])
    words, scale = parts["weight_packed"], parts["weight_scale"].float()
    groups = scale.shape[-1]
    if rows < 1 or columns < 1 or words.shape != (rows, -(-columns * bits // 32)) or scale.shape != (rows, groups):
        raise ValueError(f"parts of {rows} x {columns} do not fit each other")
    if groups < 1 or columns % groups or not bool(scale.isfinite().all()):
        raise ValueError(f"{groups} groups of {columns} columns, or a scale that is not finite")
    return _grid(parts, bits).values(unpack_words(words, bits, columns))
