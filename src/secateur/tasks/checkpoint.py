"""The state of a run in one file: tensors as safetensors, everything else as JSON in its header."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save_file
from torch import Tensor

from ..errors import ModelError, OutputError

_PLAIN = (str, int, float, bool, type(None))


@dataclass(frozen=True)
class Checkpoint:
    """A file that holds nested mappings, sequences, numbers, text and tensors.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = Checkpoint(Path(folder) / "a.safetensors")
    ...     file.write({"step": 3, "of": {0: (torch.ones(2), 0.1)}})
    ...     file.read()
    {'step': 3, 'of': {0: (tensor([1., 1.]), 0.1)}}
    """

    path: Path

    def exists(self) -> bool:
        return self.path.exists()

    def write(self, state: Mapping[str, Any]) -> None:
        """Write it whole or not at all.

        Raises:
            OutputError: something in it is neither a tensor nor plain data.
        """
        tensors: dict[str, Tensor] = {}
        plain = _flat(state, "", tensors)
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")  # two runs may keep one dense model
        self.path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, temporary, metadata={"state": json.dumps(plain)})
        os.replace(temporary, self.path)

    def read(self) -> dict[str, Any]:
        """The inverse of `write`.

        Raises:
            ModelError: the file is damaged, or something else.
        """
        try:
            with safe_open(self.path, framework="pt") as f:
                plain = json.loads((f.metadata() or {})["state"])
                tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
            found: dict[str, Any] = _nested(plain, tensors)
        except (SafetensorError, KeyError, json.JSONDecodeError, OSError) as error:
            raise self._damaged(error) from None
        return found

    def parsed(self, content: bytes) -> dict[str, Any]:
        """The same of the file's content.

        Raises:
            ModelError: it is damaged, or something else.
        """
        try:
            size = int.from_bytes(content[:8], "little")
            plain = json.loads(json.loads(content[8 : 8 + size])["__metadata__"]["state"])
            found: dict[str, Any] = _nested(plain, load(content))
        except (SafetensorError, KeyError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise self._damaged(error) from None
        return found

    def _damaged(self, error: Exception) -> ModelError:
        return ModelError(f"{self.path} is not a checkpoint of a run ({error}): delete it to start anew")


def _flat(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Plain data in which tensors are names; mappings and tuples say what they are."""
    if isinstance(value, Tensor):
        name = path or "tensor"
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, Mapping):
        items = [[k, _flat(v, f"{path}/{k}" if path else str(k), tensors)] for k, v in value.items()]
        if odd := [k for k, _ in items if not isinstance(k, (str, int))]:
            raise OutputError(f"a checkpoint cannot hold {path}, whose keys are like {odd[0]!r}")
        return {"map": items}
    if isinstance(value, (list, tuple)):
        items = [_flat(v, f"{path}/{k}", tensors) for k, v in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    if isinstance(value, np.generic):
        value = value.item()
    if not isinstance(value, _PLAIN):
        raise OutputError(f"a checkpoint cannot hold {path}, a {type(value).__name__}: only tensors and plain data")
    return value


def _nested(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_nested(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "tuple":
        return tuple(_nested(v, tensors) for v in content)
    return {k: _nested(v, tensors) for k, v in content}


def generators() -> dict[str, Any]:
    """The state of every global generator that a model or its data may draw from."""
    name, keys, position, has_gauss, cached = np.random.get_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    return {
        "torch": torch.get_rng_state(), "cuda": cuda, "python": random.getstate(),
        "numpy": (str(name), torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached),
    }  # fmt: skip


def set_generators(state: Mapping[str, Any]) -> None:
    """The inverse of `generators`."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(list(state["cuda"]))
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))


def seed_generators(seed: int) -> None:
    """Seed all of them."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


@contextmanager
def own_generators() -> Iterator[None]:
    """What is drawn inside leaves the generators of the caller as they were."""
    before = generators()
    try:
        yield
    finally:
        set_generators(before)
