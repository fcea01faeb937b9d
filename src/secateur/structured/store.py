"""Save a smaller model as safetensors and a JSON surgery plan; load it onto a fresh model of the same class."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..disk import beside, digest
from ..errors import ModelError
from ..formats import Grid
from ..formats.integers import described, packed, unpacked
from ..graph.trace import stored_tensors
from ..surgery.depth import BLOCKS
from ..surgery.experts import EXPERTS
from ..surgery.factors import AFTER, BEFORE, install, pack, unpack
from ..surgery.pieces import Pieces
from ..surgery.prove import twin
from ..surgery.shrink import Mend, shrink
from ..surgery.tied import shared_heads, untie
from .exported import other_torch, program_again

_PLAN, _WEIGHTS, _CONFIG = "surgery.json", "model.safetensors", "architecture"
_OVER = 1 << 31
#: What a plan says of its file of weights alone.
_OF_THE_FILE = ("tied", "shapes", "sha256", "packed", "integers")


def is_smaller(path: str | Path) -> bool:
    """Whether a directory holds what `save` wrote."""
    return (Path(path) / _PLAN).is_file()


def save(model: nn.Module, out: str | Path) -> Path:
    """Write a model that `StructuredPlan.shrink` made: ``model.safetensors`` and ``surgery.json``.

    A transformers model whose sizes its config can say is written as ``save_pretrained`` does, so that stock
    ``from_pretrained`` loads it; ``surgery.json`` says ``"format": "transformers"`` then.

    Raises:
        ModelError: the model was not made by `StructuredPlan.shrink`, nor by `fuse.decompose`.
        OutputError: ``out`` exists and is not empty.
    """
    surgery = getattr(model, "secateur_surgery", None)
    if not isinstance(surgery, dict):
        raise ModelError("this model carries no surgery: save what shrink() returned")
    with beside(out) as part:
        _write(model, surgery, part)
    return Path(out)


def _write(model: nn.Module, surgery: Mapping[str, Any], part: Path) -> None:
    record = dict(surgery)
    if surgery["format"] == "transformers":
        model.save_pretrained(part)  # type: ignore[operator]
    else:
        state, aliases = _unique(model)
        record["shapes"] = {n: list(t.shape) for n, t in state.items()}
        state = _coded(state, model, record)
        if packed := pack(state, record):
            record["packed"] = packed
        save_file(state, part / _WEIGHTS)
        record["tied"] = aliases
        record["sha256"] = digest(part / _WEIGHTS)
        config: Any = copy.deepcopy(getattr(model, "config", None))
        told = record.get(BEFORE) or record.get(AFTER) or record.get("architecture")
        if told and hasattr(config, "to_dict"):
            record["dtype"] = str(next(model.parameters()).dtype)[6:]
            config.architectures = [type(model).__name__]
            config.save_pretrained(
                part / _CONFIG
            )  # beside it, stock loaders would fill the factors with random numbers
    (part / _PLAN).write_text(json.dumps(record, indent=1), encoding="utf-8")


def _coded(state: dict[str, Tensor], model: nn.Module, record: dict[str, Any]) -> dict[str, Tensor]:
    """Codes in place of the weights of linear layers that lie on a grid; see `formats.integers`."""
    grids: Mapping[str, Grid] = getattr(model, "secateur_grids", None) or {}
    found = dict(state)
    for layer, grid in grids.items():
        if isinstance(model.get_submodule(layer), nn.Linear) and f"{layer}.weight" in found:
            found |= packed(layer, found.pop(f"{layer}.weight"), grid)
            record["integers"] = described(grid.bits, grid.group, grid.zero is None, ())
    return found


def load(path: str | Path, model: nn.Module | None = None) -> nn.Module:
    """Load what `save` wrote: make a fresh model smaller as the surgery plan says, and give it the saved weights.

    Args:
        model: from the same factory as the model that was pruned; its weights do not matter, and it is changed
            in place. Not needed where the directory is in transformers' format.

    Returns:
        The model. Where an exported program was saved, the program of this model, which is used up for it.

    Raises:
        ModelError: a file is missing, was changed, or does not fit the model; nothing is changed then.
    """
    folder = Path(path)
    try:
        record = json.loads((folder / _PLAN).read_text(encoding="utf-8"))
        stock = isinstance(record, dict) and record.get("format") == "transformers"
        found = "" if stock else digest(folder / _WEIGHTS)
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{folder} is not a model that secateur saved: {error}") from None
    if stock:
        return _load_stock(folder)
    if model is None and (folder / _CONFIG / "config.json").is_file():
        model = _fresh(folder / _CONFIG, record)
    if model is None:
        raise ModelError(f"{folder} needs a fresh model from the factory of the original: load(path, model)")
    if not isinstance(record, dict) or record.get("version") != 1:
        raise ModelError(f"{folder / _PLAN} has another version than this secateur reads")
    if found != record.get("sha256"):
        raise ModelError(f"{folder / _WEIGHTS} is not the file that {_PLAN} describes: it was changed or cut off")
    if record.get("earlier"):
        _again(copy.deepcopy(model), record, folder)  # whether it fits, before anything is changed
        _again(model, record, folder)
    if "exported" in record:
        if any(record.get(kind.key) for kind in (EXPERTS, BLOCKS)):
            raise ModelError(f"{folder / _PLAN} is damaged: a program has no experts and no blocks")
        model = program_again(record["exported"], model, str(folder / _PLAN))
    removed = [(kind, _check_removed(record, kind, model, folder)) for kind in (EXPERTS, BLOCKS)]
    shape = _with_factors(model, record, BEFORE, folder)
    try:
        for kind, gone in removed:
            shape = kind.without(shape, gone) if gone else shape
    except Exception as error:  # pieces that do not go together
        raise ModelError(f"{folder / _PLAN} is damaged: {type(error).__name__} {error}") from None
    apart = _check_untied(record, model, folder)
    try:
        kept, mends = _check(record, shape, folder)
    except ModelError as error:
        raise ModelError(f"{error}{other_torch(record)}") from None
    try:
        state = load_file(folder / _WEIGHTS)
        if "integers" in record:
            floats = [p.dtype for p in model.parameters() if p.is_floating_point()]
            state = unpacked(state, record["integers"], floats[0])
        unpack(state, record.get("packed", {}))
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{folder / _WEIGHTS} cannot be read: {error}") from None
    except (ModelError, TypeError, ValueError, AttributeError) as error:
        raise ModelError(f"{folder / _PLAN} does not describe {_WEIGHTS}: {error}") from None
    if record.get(AFTER):
        shape = _smaller(shape, kept, mends)
        _check_shapes(record, state, _with_factors(shape, record, AFTER, folder), {}, folder)
    else:
        _check_shapes(record, state, shape, kept, folder)
    install(model, record.get(BEFORE, {}))
    for kind, gone in removed:
        if gone:
            kind.remove(model, gone)
    untie(model, apart)
    shrink(model, kept, mends)
    install(model, record.get(AFTER, {}))
    for alias, name in record["tied"].items():
        state[alias] = state[name]
    model.load_state_dict(state, strict=False, assign=False)
    for name, buffer in model.named_buffers():
        if name in state and buffer.shape == state[name].shape:
            buffer.copy_(state[name])  # also those that a state dict leaves out
        elif name in state:
            owner, _, key = name.rpartition(".")
            model.get_submodule(owner)._buffers[key] = state[name].to(buffer.device)
    model.secateur_surgery = {k: v for k, v in record.items() if k not in _OF_THE_FILE}  # type: ignore[assignment]
    return model


def _again(model: nn.Module, record: Mapping[str, Any], folder: Path) -> None:
    """Repeat what was done to a model before it was cut for the last time, in place."""
    try:
        for one in record["earlier"]:
            removed = [(kind, _check_removed(one, kind, model, folder)) for kind in (EXPERTS, BLOCKS)]
            install(model, one.get(BEFORE, {}))
            for kind, gone in removed:
                if gone:
                    kind.remove(model, gone)
            untie(model, _check_untied({**one, "tied": record["tied"]}, model, folder))
            shrink(model, *_check({"tied": {}, "shapes": {}, **one}, model, folder))
            install(model, one.get(AFTER, {}))
    except (KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{folder / _PLAN} is damaged: {type(error).__name__} {error}") from None


def _load_stock(folder: Path) -> nn.Module:
    kind, _ = _stock_class(folder)
    loaded: nn.Module = kind.from_pretrained(folder, use_safetensors=True)
    return loaded


def _stock_class(folder: Path) -> tuple[Any, Any]:
    """The class of transformers that a config names, and the config."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder} says it is in transformers' format, but {str(error).splitlines()[0]}") from None
    names = getattr(config, "architectures", None) or []
    kind: Any = getattr(transformers, names[0], None) if names else None
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise ModelError(f"{folder / 'config.json'} names no model of transformers: {names}")
    return kind, config


def _fresh(folder: Path, record: Mapping[str, Any]) -> nn.Module:
    """A model of the config in ``folder``, in the type of the floats that were saved; its weights are random."""
    kind, config = _stock_class(folder)
    dtype = getattr(torch, str(record.get("dtype", "float32")), None)
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ModelError(f"{folder.parent / _PLAN} is damaged: there are no floats of type {record.get('dtype')}")
    with torch.random.fork_rng():
        made: nn.Module = kind._from_config(config, dtype=dtype).eval()
    return made


def _with_factors(model: nn.Module, record: Mapping[str, Any], key: str, folder: Path) -> nn.Module:
    """A copy that shares the tensors of the layers that are not factored; the model itself where all are not."""
    layers = record.get(key)
    if not layers:
        return model
    if not isinstance(layers, dict) or not all(isinstance(f, dict) for f in layers.values()):
        raise ModelError(f"{folder / _PLAN} is damaged: what it says of factored layers is not understood")
    other = twin(model)
    try:
        install(other, layers)
    except ModelError as error:
        raise ModelError(f"{folder / _PLAN} does not fit this model: {error}") from None
    return other


def _smaller(model: nn.Module, kept: dict[str, dict[int, Any]], mends: list[Mend]) -> nn.Module:
    other = twin(model)
    shrink(other, kept, mends)
    return other


def _unique(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every stored tensor once, and further names of tied ones."""
    state: dict[str, Tensor] = {}
    first: dict[int, str] = {}
    aliases: dict[str, str] = {}
    for name, tensor in stored_tensors(model).items():
        if id(tensor) in first:
            aliases[name] = first[id(tensor)]
        else:
            first[id(tensor)] = name
            state[name] = tensor.detach().contiguous()
    return state, aliases


def _check(record: Mapping[str, Any], model: nn.Module, folder: Path) -> tuple[dict[str, dict[int, Any]], list[Mend]]:
    """The plan as positions, refused where it does not fit the model."""
    tensors = stored_tensors(model)
    kept: dict[str, dict[int, Any]] = {}
    mends: list[Mend] = []
    try:
        for name, axes in record["kept"].items():
            for axis, entry in axes.items():
                axis, size = int(axis), int(entry["of"])
                if name not in tensors or not 0 <= axis < tensors[name].dim() or tensors[name].shape[axis] != size:
                    raise ModelError(
                        f"{folder / _PLAN} expects {name} with {size} positions on axis {axis}, which this model has "
                        "not: give the model that was pruned, from the same factory"
                    )
                runs = [(int(a), int(b)) for a, b in entry["keep"]]
                edges = [x for run in runs for x in run]
                if not runs or edges != sorted(edges) or edges[0] < 0 or edges[-1] > size:
                    raise ModelError(f"{folder / _PLAN} keeps positions of {name} that do not exist")
                kept.setdefault(name, {})[axis] = np.concatenate([np.arange(a, b) for a, b in runs])
        modules = dict(model.named_modules())
        for m in record["mends"]:
            mend = Mend(str(m["module"]), str(m["attribute"]), m["item"], int(m["old"]), int(m["new"]))
            value: Any = vars(modules[mend.module]).get(mend.attribute)
            if mend.item is not None:
                several = type(value) in (tuple, list) and type(mend.item) is int and 0 <= mend.item < len(value)
                value = value[mend.item] if several else None
            if type(value) is not int or value != mend.old or mend.attribute.startswith("_"):
                raise ModelError(
                    f"{folder / _PLAN} would change {mend.module}.{mend.attribute}, which is not {mend.old}"
                )
            if not 0 < mend.new < _OVER:
                raise ModelError(f"{folder / _PLAN} sets {mend.module}.{mend.attribute} to {mend.new}")
            mends.append(mend)
        tied = record["tied"]
        if not isinstance(record["shapes"], dict):
            raise ModelError(f"{folder / _PLAN} is damaged: it lists no shapes")
        if not isinstance(tied, dict) or not all(isinstance(v, str) for v in tied.values()):
            raise ModelError(f"{folder / _PLAN} is damaged")
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        raise ModelError(f"{folder / _PLAN} is damaged: {type(error).__name__} {error}") from None
    return kept, mends


def _check_removed(record: Mapping[str, Any], kind: Pieces, model: nn.Module, folder: Path) -> dict[str, list[int]]:
    """Which pieces the plan takes out, refused where the model has not that many."""
    found: dict[str, list[int]] = {}
    places = kind.places(model) if record.get(kind.key) else {}
    try:
        for path, entry in record.get(kind.key, {}).items():
            size, gone = int(entry["of"]), [int(k) for k in entry["gone"]]
            if places.get(path) != size:
                raise ModelError(
                    f"{folder / _PLAN} takes {kind.name}s out of {path}, which has not {size} in this model: give the "
                    "model that was pruned, from the same factory"
                )
            if not gone or gone != sorted(set(gone)) or gone[0] < 0 or gone[-1] >= size or len(gone) == size:
                raise ModelError(f"{folder / _PLAN} takes {kind.name}s out of {path} that do not exist")
            found[path] = gone
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ModelError(f"{folder / _PLAN} is damaged: {type(error).__name__} {error}") from None
    return found


def _check_untied(record: Mapping[str, Any], model: nn.Module, folder: Path) -> tuple[str, ...]:
    """Parameters that share their values with others in a fresh model, and are to have their own."""
    names = record.get("untied", [])
    if not isinstance(names, list) or not all(n in shared_heads(model) for n in names):
        raise ModelError(f"{folder / _PLAN} unties {names}, which are not tied in this model")
    tied, first = record.get("tied"), dict[int, str]()
    for name, tensor in model.named_parameters(remove_duplicate=False):
        if name in names:
            continue
        one = first.setdefault(id(tensor), name)
        if one != name and isinstance(tied, dict) and tied.get(name, name) != tied.get(one, one):
            raise ModelError(f"{folder / _PLAN} has values of their own for {one} and {name}, which this model ties")
    return tuple(names)


def _check_shapes(
    record: Mapping[str, Any], state: Mapping[str, Tensor], model: nn.Module, kept: Mapping[str, Any], folder: Path
) -> None:
    tensors = stored_tensors(model)
    made = {
        f"{path}.{key}" if path else key for path, m in model.named_modules() for key in m._non_persistent_buffers_set
    }
    given = {**{n: t.shape for n, t in state.items()}}
    for alias, name in record["tied"].items():
        if name not in given:
            raise ModelError(f"{folder / _PLAN} ties {alias} to {name}, which is not saved")
        given[alias] = given[name]
    if more := sorted(set(given) - set(tensors)):
        raise ModelError(f"{folder / _WEIGHTS} holds {more[0]}, which this model has not")
    for name, tensor in tensors.items():
        if name in state and state[name].dtype != tensor.dtype:
            raise ModelError(
                f"{folder / _WEIGHTS} holds {name} in {state[name].dtype}, and the model has it in {tensor.dtype}: "
                "convert the fresh model first"
            )
        shape = [len(kept[name][a]) if a in kept.get(name, {}) else n for a, n in enumerate(tensor.shape)]
        if name in made and name in given and len(given[name]) == len(shape):
            # A module may make it anew for another input size; what the plan cuts must fit all the same.
            shape = [n if a in kept.get(name, {}) else given[name][a] for a, n in enumerate(shape)]
        if name not in given or list(given[name]) != shape:
            have = list(given[name]) if name in given else "nothing"
            raise ModelError(f"{folder / _WEIGHTS} holds {have} for {name}, where {shape} is due")
