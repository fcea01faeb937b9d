"""Save a compressed model, and load it without ever making its weights dense."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..errors import ModelError, OutputError
from ..formats import restore
from ..kernels.library import ACTIVATIONS, BUILD, library
from ..models import blank
from .make import Compression
from .modules import Sparse, SparseConv2d, SparseLinear

_RECORD, _WEIGHTS = "compressed.json", "compressed.safetensors"
_GEOMETRY = ("kernel", "stride", "padding", "dilation")


def is_compressed(path: str | Path) -> bool:
    """Whether a directory holds what `save_compressed` wrote."""
    return (Path(path) / _RECORD).is_file()


def save_compressed(model: nn.Module, out: str | Path, *, source: str = "", force: bool = False) -> Path:
    """Write ``compressed.safetensors`` and ``compressed.json``; of a transformers model its config too.

    Stock loaders refuse the directory, for they would fill what they do not know with random numbers; `load` reads it.

    Raises:
        ModelError: no layer of the model is packed.
        OutputError: ``out`` exists and is not empty.
    """
    packed = {name: m for name, m in model.named_modules() if isinstance(m, Sparse)}
    if not packed:
        raise ModelError("no layer of this model is packed: save it as you would save any other")
    target = Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())) and not force:
        raise OutputError(f"{target} exists: choose another directory")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise OutputError(f"{target} cannot be written: {error}") from None
    part.chmod(0o755)
    try:
        tensors, tied = _plain(model, packed)
        layers = {}
        for name, module in packed.items():
            stored, facts = module.packed.stored()
            own = {**stored, **({} if module.bias is None else {"bias": module.bias})}
            tensors |= {f"{name}.{key}": t.detach().contiguous() for key, t in own.items()}
            index = [key for key in ("col", "bits") if getattr(module, key) is not None]
            layers[name] = {**facts, "index": index, "activation": module.activation, "parts": sorted(own)}
            if isinstance(module, SparseConv2d):
                layers[name] |= {key: getattr(module, key) for key in _GEOMETRY}
        save_file(tensors, part / _WEIGHTS)
        (part / _WEIGHTS).chmod(0o644)
        config: Any = getattr(model, "config", None)
        stock = config is not None and hasattr(model, "save_pretrained")
        if stock:
            config.save_pretrained(part)
        report = getattr(model, "compression", None)
        record = {
            "version": 1,
            "format": "transformers" if stock else "module",
            "class": type(model).__name__,
            "source": source,
            "layers": layers,
            "folded": sorted(n for n, m in model.named_modules() if type(m) is nn.Identity),
            "tied": tied,
            "shapes": {name: list(t.shape) for name, t in tensors.items()},
            "sha256": _digest(part / _WEIGHTS),
            "report": report.to_dict() if isinstance(report, Compression) else None,
        }
        (part / _RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")
        if target.exists():
            shutil.rmtree(target) if target.is_dir() else target.unlink()
        part.rename(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return target


def load_compressed(path: str | Path, model: nn.Module | None = None) -> nn.Module:
    """Load what `save_compressed` wrote.

    Args:
        model: from the factory of the original; its weights do not matter, and it is changed in place. Not needed for
            transformers models.

    Raises:
        ModelError: a file is missing, was changed, or does not fit the model.
    """
    folder = Path(path)
    try:
        record = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
        if not isinstance(record, dict) or record.get("version") != 1:
            raise ModelError(f"{folder / _RECORD} has another version than this secateur reads")
        if _digest(folder / _WEIGHTS) != record.get("sha256"):
            raise ModelError(f"{folder / _WEIGHTS} is not the file that {_RECORD} describes: it was changed or cut off")
        tensors = load_file(folder / _WEIGHTS)
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise ModelError(f"{folder} is not a model that secateur compressed: {error}") from None
    if model is None:
        if record.get("format") != "transformers":
            raise ModelError(f"{folder} needs a fresh model from the factory of the original: load(path, model)")
        model = blank(folder)
    try:
        made = {name: _layer(name, facts, tensors) for name, facts in record["layers"].items()}
        _check_fit(model, record, made, tensors)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ModelError(f"{folder / _RECORD} is damaged or belongs to another model: {error}") from None
    for name, layer in (*made.items(), *((n, nn.Identity()) for n in record["folded"])):
        owner, _, key = name.rpartition(".")
        setattr(model.get_submodule(owner), key, layer)
    own = {f"{name}.{key}" for name in made for key in made[name]._buffers}
    model.load_state_dict({n: t for n, t in tensors.items() if n not in own}, strict=False, assign=True)
    for alias, name in record["tied"].items():
        owner, _, key = alias.rpartition(".")
        model.get_submodule(owner).register_parameter(key, model.get_parameter(name))
    if lost := [n for n, p in model.named_parameters() if p.device.type == "meta"]:
        raise ModelError(f"{folder} lacks {lost[0]}{f' and {len(lost) - 1} more' if len(lost) > 1 else ''}")
    if library() is None:
        warnings.warn(f"{folder} was made dense: the sparse kernels are not built here ({BUILD})", stacklevel=2)
        dense_again(model)
    return model.eval()


def _layer(name: str, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Sparse:
    own = {key: tensors[f"{name}.{key}"] for key in facts["parts"]}
    bias = own.pop("bias", None)
    index, activation = list(facts["index"]), str(facts["activation"])
    packed = restore(own, facts).indexed(col="col" in index, bits="bits" in index).check()
    if activation not in ACTIVATIONS or (bias is not None and bias.shape != (packed.rows,)):
        raise ValueError(f"layer '{name}'")
    if "kernel" not in facts:
        return SparseLinear(packed, bias, activation)
    kernel, stride, padding, dilation = ([int(n) for n in facts[key]] for key in _GEOMETRY)
    least = (*kernel, *stride, *dilation, *(n + 1 for n in padding))
    if len(least) != 8 or min(least) < 1 or packed.cols % (kernel[0] * kernel[1]):
        raise ValueError(f"the convolution '{name}'")
    return SparseConv2d(packed, bias, kernel, stride, padding, dilation, activation)


def _check_fit(
    model: nn.Module, record: Mapping[str, Any], made: Mapping[str, Sparse], tensors: Mapping[str, Tensor]
) -> None:
    """Every tensor has a place of its shape in the model; nothing has been changed so far."""
    if {n: list(t.shape) for n, t in tensors.items()} != record["shapes"]:
        raise ValueError("its tensors have other shapes")
    for name, layer in made.items():
        there = model.get_submodule(name)
        weight: Any = there.weight
        sizes = sorted((layer.rows, layer.cols))
        if sorted((weight.shape[0], weight.numel() // weight.shape[0])) != sizes:
            raise ValueError(f"'{name}' is {tuple(weight.shape)} in the model and {layer.rows} x {layer.cols} here")
    state = model.state_dict()
    for name in record["folded"]:
        if type(model.get_submodule(name)) not in (nn.BatchNorm2d, nn.ReLU, nn.Identity):
            raise ValueError(f"'{name}' cannot be part of another layer")
    inside = tuple(f"{name}." for name in (*made, *record["folded"]))
    lost = [n for n in state if n not in tensors and n not in record["tied"] and not n.startswith(inside)]
    if lost:
        raise ValueError(f"there is nothing for '{lost[0]}'")
    for name, tensor in tensors.items():
        layer_name, _, _ = name.rpartition(".")
        if layer_name not in made and (name not in state or state[name].shape != tensor.shape):
            raise ValueError(f"the model has no '{name}' of shape {tuple(tensor.shape)}")
    for alias, name in record["tied"].items():
        if model.get_parameter(alias).shape != tensors[name].shape:
            raise ValueError(f"'{alias}' is not '{name}'")


def _plain(model: nn.Module, packed: Mapping[str, Sparse]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of all other layers, and which names share one."""
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[int, str] = {}
    inside = {f"{name}.{key}" for name, module in packed.items() for key in module._buffers}
    state = model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        if name in inside:
            continue
        if id(tensor) in first:
            tied[name] = first[id(tensor)]
            continue
        first[id(tensor)] = name
        tensors[name] = tensor.detach().contiguous().clone() if _shares(tensor) else tensor.detach()
    return tensors, tied


def _shares(tensor: Tensor) -> bool:
    """Whether it is a view of more than itself, which safetensors refuses."""
    return not tensor.is_contiguous() or tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size()


def _digest(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 24):
            found.update(chunk)
    return found.hexdigest()


def dense_again(model: nn.Module) -> nn.Module:
    """The same model with ordinary layers, for tools that know nothing else; changes the model in place."""
    for name, module in list(model.named_modules()):
        if not isinstance(module, Sparse):
            continue
        weight = module.weight
        if isinstance(module, SparseConv2d):
            made: nn.Module = nn.Conv2d(
                weight.shape[1], module.rows, module.kernel, module.stride, module.padding, module.dilation,  # type: ignore[arg-type]
                bias=module.bias is not None, device="meta",
            )  # fmt: skip
        else:
            made = nn.Linear(module.cols, module.rows, bias=module.bias is not None, device="meta")
        made.weight = nn.Parameter(weight.float(), requires_grad=False)
        if module.bias is not None:
            made.bias = nn.Parameter(module.bias.clone(), requires_grad=False)
        if module.activation != "none":
            made = nn.Sequential(made, nn.ReLU())
        owner, _, key = name.rpartition(".")
        setattr(model.get_submodule(owner), key, made.train(module.training))
    return model
