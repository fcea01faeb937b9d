"""Save a model that decides while it runs: the dense weights as they are, and what gates are made of beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_file
from torch import Tensor, nn

from ..disk import beside, digest
from ..errors import ModelError, RecipeError
from ..store import save_module
from ..structured import is_smaller
from ..structured import load as load_smaller
from ..structured import save as save_smaller
from .base import Dynamic, part_of

_FILE, _WEIGHTS, _GATES = "runtime.json", "model.safetensors", "gates.safetensors"


def is_gated(path: str | Path) -> bool:
    """Whether a directory holds what `save` wrote."""
    return (Path(path) / _FILE).is_file()


def save(made: Dynamic, out: str | Path, force: bool = False) -> Path:
    """Write the dense weights (by ``save_pretrained`` where the model has it), ``runtime.json`` and learned gates.

    Stock tools load the dense model from the same directory.

    Raises:
        OutputError: ``out`` exists and is not empty.
    """
    with beside(out, force) as part:
        write(made, part)
    return Path(out)


def write(made: Dynamic, folder: Path) -> None:
    """`save`, into a directory that is being made."""
    if hasattr(made.model, "secateur_surgery"):
        save_smaller(made.model, folder)
    else:
        save_module(made.model, folder)
    record: dict[str, Any] = {"version": 1, "record": made.record, "saved": made.saved(), "sha256": {}}
    if tensors := made.tensors():
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, folder / _GATES)
    for name in (_WEIGHTS, _GATES):
        if (folder / name).is_file():
            record["sha256"][name] = digest(folder / name)
    (folder / _FILE).write_text(json.dumps(record, indent=1), encoding="utf-8")


def load(path: str | Path, model: nn.Module | None = None) -> Any:
    """Load what `save` wrote.

    Args:
        model: a fresh model from the factory of the original, which gets the weights; not needed for directories with
            a transformers config.

    Raises:
        ModelError: a file is missing, was changed, or does not fit the model.
    """
    folder = Path(path)
    try:
        record = json.loads((folder / _FILE).read_text(encoding="utf-8"))
        if not isinstance(record, dict) or record.get("version") != 1:
            raise ModelError(f"{folder / _FILE} has another version than this secateur reads")
        for name, known in record["sha256"].items():
            if digest(folder / name) != known:
                raise ModelError(f"{folder / name} is not the file that {_FILE} describes: it was changed or cut off")
        tensors: dict[str, Tensor] = load_file(folder / _GATES) if _GATES in record["sha256"] else {}
        restore = part_of(record["record"]).facts["restore"]
        made: Dynamic = restore(_dense(folder, model), record, tensors)
    except ModelError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, RecipeError, SafetensorError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{folder} is not a model with gates that secateur saved: {reason}") from None
    return made.eval()


def _dense(folder: Path, model: nn.Module | None) -> nn.Module:
    if is_smaller(folder):
        return load_smaller(folder, model)
    if model is not None:
        load_model(model, str(folder / _WEIGHTS))
        return model
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} needs a fresh model from the factory of the original: load(path, model)")
    return stock(folder)


def stock(folder: Path) -> nn.Module:
    """A transformers model of the class that its config names.

    Raises:
        ModelError: it cannot be loaded.
    """
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    name = (getattr(config, "architectures", None) or [""])[0]
    kind: Any = getattr(transformers, name, None)
    if kind is None:
        raise ModelError(f"transformers has no {name or 'class that config.json names'}")
    net: nn.Module = kind.from_pretrained(folder)
    return net
