"""What a model is, by its structure: kind and size, from headers and configs, without its weights where they can be."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..coupled import load_module
from ..errors import ModelError, RecipeError
from ..layers import find_layers
from ..models import cache_directory
from ..modules import is_module
from ..registry import parts
from ..tasks import find, names_a_task
from .situation import KINDS

_WAY_OUT = "or say what it is: --kind cnn --parameters 25M"
#: What the demo model is, where its directory has not been made yet.
_DEMO = ("decoder", 134_515_008)


@dataclass(frozen=True)
class Subject:
    """What was, or is to be, pruned.

    Attributes:
        name: how it is named.
        kind: one of `situation.KINDS`.
        parameters: of the dense model; None where that is not known.
    """

    name: str
    kind: str = "other"
    parameters: int | None = None

    @property
    def task(self) -> str:
        """The name without the sizes that a study writes behind it: with other sizes it is the same task.

        >>> Subject("fashion-vgg (images=6000)").task
        'fashion-vgg'
        """
        return self.name.partition(" (")[0]


def look(source: str, kind: str | None = None, parameters: int | None = None) -> Subject:
    """What a model is; what the user says of it is believed, and the rest is found out.

    Raises:
        ModelError: it cannot be found out, with the way out.
    """
    if kind is not None and kind not in KINDS:
        raise RecipeError(f"kind '{kind}' is not known: write one of {', '.join(KINDS)}")
    if kind is not None and parameters is not None:
        return Subject(source, kind, parameters)
    if not source:
        raise RecipeError("what is to be pruned? Name it with --model, or describe it: --kind cnn --parameters 25M")
    try:
        found = _look(source)
    except ModelError as error:
        if kind is not None:  # the size alone is not known, and an answer does not depend on it
            return Subject(source, kind, None)
        raise ModelError(f"{error}; {_WAY_OUT}") from None
    return Subject(source, kind or found.kind, parameters or found.parameters)


def _look(source: str) -> Subject:
    if names_a_task(source):
        return of_module(source, find(source).model(0))
    if is_module(source):
        return of_module(source, load_module(source, weights=False))
    path = cache_directory() / "SmolLM2-135M-Instruct" if source == "demo" else Path(source)
    if source == "demo" and not (path / "config.json").exists():
        return Subject(source, *_DEMO)
    if source.startswith("hf-config:"):
        return _of_config(source, _json(Path(source.removeprefix("hf-config:"))), None)
    if path.is_dir():
        return _of_config(source, _json(path / "config.json"), _stored(path))
    return _of_hub(source)


def _of_hub(source: str) -> Subject:
    """Of a model on the hub its config and the headers of its files are read."""
    if source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise ModelError(f"there is no model at {source}: give a directory, a hub id (owner/name), timm:NAME or 'demo'")
    try:
        from huggingface_hub import get_safetensors_metadata, hf_hub_download
        from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError
    except ImportError:
        raise ModelError("models of the hub need transformers: pip install 'secateur[llm]'") from None
    try:
        config = _json(Path(hf_hub_download(source, "config.json")))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"{source} is neither a directory here nor a model that can be fetched: {reason}") from None
    try:
        size: int | None = sum(get_safetensors_metadata(source).parameter_count.values())
    except (OSError, ValueError, NotASafetensorsRepoError, SafetensorsParsingError):
        size = None
    return _of_config(source, config, size)


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from None
    return found if isinstance(found, dict) else {}


def _stored(folder: Path) -> int | None:
    """Parameters in a directory's files, from their headers."""
    total = 0
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 0 < length < 100_000_000:
                return None
            try:
                header = json.loads(stream.read(length))
            except ValueError:
                return None
        for name, tensor in header.items():
            if name != "__metadata__" and not name.startswith("masks"):
                size = 1
                for n in tensor.get("shape", ()):
                    size *= int(n)
                total += size
    return total or None


def _of_config(name: str, config: dict[str, Any], parameters: int | None) -> Subject:
    """The kind by what a config of transformers says of the structure, then by the head that its class has."""
    text = config.get("text_config") if isinstance(config.get("text_config"), dict) else {}
    merged = {**config, **(text or {})}
    architecture = str((config.get("architectures") or [""])[0])
    experts = any(int(merged.get(k) or 0) > 1 for k in ("num_local_experts", "num_experts", "n_routed_experts"))
    if experts:
        kind = "moe"
    elif config.get("is_encoder_decoder"):
        kind = "encoder-decoder"
    elif "CausalLM" in architecture or "LMHead" in architecture:
        kind = "decoder"
    elif merged.get("patch_size") and merged.get("num_attention_heads"):
        kind = "vit"
    elif merged.get("num_attention_heads") and merged.get("vocab_size"):
        kind = "encoder"
    elif merged.get("num_channels") and not merged.get("num_attention_heads"):
        kind = "cnn"
    else:
        kind = "other"
    return Subject(name, kind, parameters or _size(merged))


def _size(config: dict[str, Any]) -> int | None:
    """About how many parameters a transformer of these sizes has, where no file says it."""
    width, depth = (int(config.get(k) or 0) for k in ("hidden_size", "num_hidden_layers"))
    if not width or not depth:
        return None
    inner = int(config.get("intermediate_size") or 4 * width)
    return depth * (4 * width * width + 3 * width * inner) + int(config.get("vocab_size") or 0) * width


def of_module(name: str, module: nn.Module) -> Subject:
    """What a module is: by what its weights are, what stands in front of its blocks, and what its answer is.

    >>> of_module("net", nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)))
    Subject(name='net', kind='cnn', parameters=808)
    """
    parameters = sum(p.numel() for p in module.parameters())
    config = getattr(module, "config", None)
    if config is not None and hasattr(config, "to_dict") and getattr(config, "architectures", None):
        return Subject(name, _of_config(name, config.to_dict(), parameters).kind, parameters)
    weights: Counter[str] = Counter()
    try:
        layers = find_layers(module)[0]
    except RecipeError:  # nothing in it can be pruned; what it is can be said all the same
        layers = []
    for layer in layers:
        weights[layer.kind] += layer.numel
    embeddings = [m for m in module.modules() if isinstance(m, nn.Embedding)]
    linears = [m for m in module.modules() if isinstance(m, nn.Linear)]
    blocks = max(
        (len(m) for m in module.modules() if isinstance(m, (nn.ModuleList, nn.Sequential)) and _alike(m)), default=0
    )
    patches = [
        m for m in module.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == m.stride and m.kernel_size[0] > 1
    ]
    if weights["expert"]:
        kind = "moe"
    elif weights["conv"] + weights["conv-transpose"] > 0.5 * max(1, sum(weights.values())):
        kind = "cnn"
    elif blocks > 1 and embeddings:
        words = embeddings[0].num_embeddings
        kind = "decoder" if linears and linears[-1].out_features == words else "encoder"
    elif blocks > 1 and patches:
        kind = "vit"
    else:
        kind = "other"
    return Subject(name, kind, parameters)


def _alike(modules: nn.Module) -> bool:
    """Whether these are blocks of one type, with more than one weight each."""
    found = list(modules.children())
    return (
        len(found) > 1
        and len({type(m) for m in found}) == 1
        and sum(isinstance(m, nn.Linear) for m in found[0].modules()) > 1
    )


def known(name: str) -> Subject:
    """A subject of a study by its name alone: a ready task or the demo; nothing that a study names is run or fetched.

    >>> known("demo").kind, known("somebody/else").kind
    ('decoder', 'other')
    """
    task = Subject(name).task
    if task in parts("task"):
        return of_module(name, find(task).model(0))
    return Subject(name, *_DEMO) if name == "demo" else Subject(name)
