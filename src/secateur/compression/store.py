"""Save a compressed model, and load it without ever making its weights dense."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..disk import beside, digest
from ..errors import ModelError
from ..formats import restore
from ..kernels.library import ACTIVATIONS, BUILD, library
from ..models import blank
from .candidates import Site
from .dense import DenseLinear
from .gpu_layers import gpu_for, restored
from .int4 import Int4Linear
from .make import Compression
from .modules import GEOMETRY, Installed, SparseConv2d, SparseLinear

_RECORD, _WEIGHTS = "compressed.json", "compressed.safetensors"


def is_compressed(path: str | Path) -> bool:
    """Whether a directory holds what `save_compressed` wrote."""
    return (Path(path) / _RECORD).is_file()


def save_compressed(
    model: nn.Module, out: str | Path, *, source: str = "", tokenizer: Any = None, force: bool = False
) -> Path:
    """Write ``compressed.safetensors`` and ``compressed.json``; of a transformers model its config too.

    Stock loaders refuse the directory, for they would fill what they do not know with random numbers; `load` reads it.

    Raises:
        ModelError: no layer of the model is packed, or it is nothing but one.
        OutputError: ``out`` exists and is not empty.
    """
    packed = {name: m for name, m in model.named_modules() if isinstance(m, Installed)}
    if not packed:
        raise ModelError("no layer of this model is packed: save it as you would save any other")
    if "" in packed:
        raise ModelError("this model is a single layer: put it into a torch.nn.Sequential")
    with beside(out, force) as part:
        tensors, tied = _plain(model, packed)
        layers = {}
        for name, module in packed.items():
            stored, facts = module.parts()
            own = {**stored, **({} if module.bias is None else {"bias": module.bias})}
            tensors |= {f"{name}.{key}": t.detach().contiguous() for key, t in own.items()}
            layers[name] = {**facts, "activation": module.activation, "parts": sorted(own)}
        save_file(tensors, part / _WEIGHTS)
        (part / _WEIGHTS).chmod(0o644)
        config: Any = getattr(model, "config", None)
        stock = config is not None and hasattr(model, "save_pretrained")
        if stock:
            config.save_pretrained(part)
        if tokenizer is not None:
            tokenizer.save_pretrained(part)
        report = getattr(model, "compression", None)
        record = {
            "version": 1,
            "format": "transformers" if stock else "module",
            "class": type(model).__name__,
            "dtype": _dtype(model),
            "source": source,
            "layers": layers,
            "folded": sorted(n for n, m in model.named_modules() if type(m) is nn.Identity),
            "tied": tied,
            "shapes": {name: list(t.shape) for name, t in tensors.items()},
            "sha256": digest(part / _WEIGHTS),
            "report": report.to_dict() if isinstance(report, Compression) else None,
        }
        record["record"] = _of_record(record)
        (part / _RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")
    return Path(out)


def _dtype(model: nn.Module) -> str:
    """Of its floats that are not packed, or of the packed ones where there are no others."""
    floats = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    return str(floats[0].dtype)[6:] if floats else "float32"


def _of_record(record: Mapping[str, Any]) -> str:
    """The hash of what the record says, so that damage to it is seen as well."""
    told = json.dumps({k: v for k, v in record.items() if k != "record"}, sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()


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
        if record.get("record") != _of_record(record):
            raise ModelError(f"{folder / _RECORD} was changed after it was written")
        if digest(folder / _WEIGHTS) != record.get("sha256"):
            raise ModelError(f"{folder / _WEIGHTS} is not the file that {_RECORD} describes: it was changed or cut off")
        tensors = load_file(folder / _WEIGHTS)
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise ModelError(f"{folder} is not a model that secateur compressed: {error}") from None
    if model is None:
        if record.get("format") != "transformers":
            raise ModelError(f"{folder} needs a fresh model from the factory of the original: load(path, model)")
        model = blank(folder)
    try:
        device, problem = gpu_for(record["layers"])
        place = "cpu" if problem or device is None else device
        made = {name: _layer(name, facts, tensors, place) for name, facts in record["layers"].items()}
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
    if device is None and library() is None:
        problem = f"the sparse kernels are not built here ({BUILD})"
    if problem:
        warnings.warn(f"{folder} was made dense: {problem}", stacklevel=2)
        dense_again(model)
    return (model if device is None else model.to(device)).eval()


def _layer(name: str, facts: Mapping[str, Any], tensors: Mapping[str, Tensor], place: str) -> Installed:
    own = {key: tensors[f"{name}.{key}"] for key in facts["parts"]}
    bias = own.pop("bias", None)
    index, activation = list(facts["index"]), str(facts["activation"])
    if index == ["dense"]:
        dense: DenseLinear | Int4Linear
        if facts["kind"] == "int4":
            dense = Int4Linear.restored(own["values"], own["scale"], own.get("zero"), bias, activation)
        else:
            dense = DenseLinear.restored(own["values"], own.get("scale"), bias, activation)
        if activation not in ACTIVATIONS or (bias is not None and bias.shape != (dense.rows,)):
            raise ValueError(f"layer '{name}'")
        return dense
    packed = restore(own, facts).indexed(*(name in index for name in ("col", "bits", "quad"))).check()
    if activation not in ACTIVATIONS or (bias is not None and bias.shape != (packed.rows,)):
        raise ValueError(f"layer '{name}'")
    if "form" in facts:
        return restored(packed, bias, activation, str(facts["form"]), place)
    if "kernel" not in facts:
        return SparseLinear(packed, bias, activation)
    kernel, stride, padding, dilation = ([int(n) for n in facts[key]] for key in GEOMETRY)
    least = (*kernel, *stride, *dilation, *(n + 1 for n in padding))
    if len(least) != 8 or min(least) < 1 or packed.cols % (kernel[0] * kernel[1]):
        raise ValueError(f"the convolution '{name}'")
    return SparseConv2d(packed, bias, kernel, stride, padding, dilation, activation)


def _check_fit(
    model: nn.Module, record: Mapping[str, Any], made: Mapping[str, Installed], tensors: Mapping[str, Tensor]
) -> None:
    """Every tensor has a place of its shape in the model; nothing has been changed so far."""
    if {n: list(t.shape) for n, t in tensors.items()} != record["shapes"]:
        raise ValueError("its tensors have other shapes")
    for name, layer in made.items():
        there: Any = model.get_submodule(name)
        shape = tuple(Site(name, there).matrix().shape)
        if shape != (layer.rows, layer.cols) or isinstance(there, nn.Conv2d) != isinstance(layer, SparseConv2d):
            raise ValueError(f"'{name}' is {shape} in the model and {layer.rows} x {layer.cols} here")
        if isinstance(layer, SparseConv2d):
            sizes = [list(x) for x in (there.kernel_size, there.stride, there.padding, there.dilation)]
            if sizes != [getattr(layer, key) for key in GEOMETRY]:
                raise ValueError(f"'{name}' has another kernel, stride, padding or dilation in the model")
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


def _plain(model: nn.Module, packed: Mapping[str, Installed]) -> tuple[dict[str, Tensor], dict[str, str]]:
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


def dense_again(model: nn.Module) -> nn.Module:
    """The same model with ordinary layers, for tools that know nothing else; changes the model in place."""
    for name, module in list(model.named_modules()):
        if not isinstance(module, Installed):
            continue
        weight = module.weight
        if isinstance(module, SparseConv2d):
            made: nn.Module = nn.Conv2d(
                weight.shape[1], module.rows, module.kernel, module.stride, module.padding, module.dilation,  # type: ignore[arg-type]
                bias=module.bias is not None, device="meta",
            )  # fmt: skip
        else:
            made = nn.Linear(module.cols, module.rows, bias=module.bias is not None, device="meta")
        made.weight = nn.Parameter(weight.to(getattr(module, "dtype", torch.float32)), requires_grad=False)
        if module.bias is not None:
            made.bias = nn.Parameter(module.bias.clone(), requires_grad=False)
        if module.activation != "none":
            made = nn.Sequential(made, nn.ReLU())
        owner, _, key = name.rpartition(".")
        setattr(model.get_submodule(owner), key, made.train(module.training))
    return model
