"""Save a model whose tokens leave: the dense weights as they are, and a small JSON file beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_model
from torch import nn

from ..disk import beside, digest
from ..errors import ModelError
from ..store import save_module
from ..structured import is_smaller
from ..structured import load as load_smaller
from ..structured import save as save_smaller
from .act import Act, Fuse, Merge
from .gates import Pace, TokenGates
from .structure import Structure

_FILE, _WEIGHTS = "tokens.json", "model.safetensors"


def is_gated(path: str | Path) -> bool:
    """Whether a directory holds what `save` wrote."""
    return (Path(path) / _FILE).is_file()


def save(gates: TokenGates, out: str | Path, force: bool = False) -> Path:
    """Write the dense weights (by ``save_pretrained`` where the model has it) and ``tokens.json``.

    Stock tools load the dense model from the same directory.

    Raises:
        OutputError: ``out`` exists and is not empty.
    """
    with beside(out, force) as part:
        if hasattr(gates.model, "secateur_surgery"):
            save_smaller(gates.model, part)
        else:
            save_module(gates.model, part)
        record = {"version": 1, "record": gates.record, "structure": asdict(gates.structure)}
        if (part / _WEIGHTS).is_file():
            record["sha256"] = digest(part / _WEIGHTS)
        (part / _FILE).write_text(json.dumps(record, indent=1), encoding="utf-8")
    return Path(out)


def load(path: str | Path, model: nn.Module | None = None) -> TokenGates:
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
        structure, act, pace = _read(record)
        if "sha256" in record and digest(folder / _WEIGHTS) != record["sha256"]:
            raise ModelError(f"{folder / _WEIGHTS} is not the file that {_FILE} describes: it was changed or cut off")
        net = _dense(folder, model)
    except ModelError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{folder} is not a model with gates that secateur saved: {reason}") from None
    paths = dict(net.named_modules())
    if missing := [name for name in structure.sites if name not in paths]:
        raise ModelError(f"{folder / _FILE} does not fit the model: it has no {missing[0]}")
    return TokenGates(net, structure, act, pace, record["record"]).eval()


def _read(record: Mapping[str, Any]) -> tuple[Structure, Act, Pace]:
    made, found = record["record"], record["structure"]
    numbers = {name: int(found[name]) for name in ("tokens", "protected", "width")}
    structure = Structure(tuple(map(str, found["sites"])), **numbers)
    acts: dict[str, Act] = {
        "tome": Merge(bool(made.get("proportional", True))), "evit": Fuse(bool(made.get("fuse", True))),
    }  # fmt: skip
    at = made["at"]
    r, keep = made["r"], made["keep"]
    pace = Pace(
        None if r is None else int(r),
        None if keep is None else float(keep),
        None if at is None else tuple(map(int, at)),
    )
    return structure, acts[made["method"]], pace


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
