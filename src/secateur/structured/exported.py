"""The example of an exported program on disk, and the same program of a fresh model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..surgery.program import Program, as_program

_OVER = 1 << 28


def recorded(program: Program, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """How to make the same program of a fresh model, as JSON data: shapes and dtypes of tensors, and plain values."""
    return {
        "torch": torch.__version__,
        "dynamic": program.dynamic,
        "args": [_entry(x) for x in args],
        "kwargs": {k: _entry(x) for k, x in kwargs.items()},
    }


def _entry(value: Any) -> dict[str, Any]:
    if isinstance(value, Tensor):
        return {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    if value is None or type(value) in (bool, int, float, str):
        return {"value": value}
    if type(value) in (list, tuple):
        return {type(value).__name__: [_entry(x) for x in value]}
    if type(value) is dict and all(type(k) is str for k in value):
        return {"dict": {k: _entry(x) for k, x in value.items()}}
    raise ModelError(
        f"an input of the example is a {type(value).__name__}, which no file can say: give tensors, plain values, or "
        "lists, tuples and dicts of these"
    )


def _value(entry: Mapping[str, Any]) -> Any:
    """What an entry stands for; a tensor is of zeros."""
    ((kind, held),) = entry.items() if "shape" not in entry else (("shape", entry["shape"]),)
    if kind == "value" and (held is None or type(held) in (bool, int, float, str)):
        return held
    if kind in ("list", "tuple"):
        values = [_value(x) for x in held]
        return values if kind == "list" else tuple(values)
    if kind == "dict":
        return {str(k): _value(x) for k, x in held.items()}
    if kind == "shape":
        shape, dtype = [int(n) for n in held], getattr(torch, str(entry["dtype"]))
        small = all(0 <= n < _OVER for n in shape) and math.prod(n or 1 for n in shape) < _OVER
        if isinstance(dtype, torch.dtype) and small:
            return torch.zeros(shape, dtype=dtype)
    raise ValueError(f"an input that cannot be made: {dict(entry)}")


def program_again(record: Mapping[str, Any], model: nn.Module, where: str) -> Program:
    """The program of a fresh model, exported as the one that was saved.

    Args:
        record: what `recorded` gave.
        where: the file that it is from.

    Raises:
        ModelError: the record is damaged, or the model cannot be exported so.
    """
    try:
        args, kwargs = [_value(x) for x in record["args"]], {str(k): _value(x) for k, x in record["kwargs"].items()}
        dynamic = record["dynamic"]
        if type(dynamic) is not bool or type(record["torch"]) is not str:
            raise TypeError("dynamic or torch")
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RuntimeError) as error:
        raise ModelError(f"{where} is damaged: {type(error).__name__} {error}") from None
    device = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    with torch.no_grad():
        args, kwargs = torch.utils._pytree.tree_map(
            lambda x: x.to(device) if isinstance(x, Tensor) else x, (args, kwargs)
        )
    return as_program(model, args, kwargs, dynamic)


def other_torch(record: Mapping[str, Any]) -> str:
    """What may be wrong with the record of a program that was exported by another torch; empty for all others."""
    saved = record["exported"]["torch"] if "exported" in record else torch.__version__
    if saved == torch.__version__:
        return ""
    return f" (or torch {torch.__version__} exports it otherwise than {saved}, under which it was saved)"
