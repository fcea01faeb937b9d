"""A smaller model is a plain module: torch.export and ONNX take it, and compute the same."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tests import nets
from torch import Tensor, nn

import secateur


class Logits(nn.Module):
    """A language model as exporters like it: ids in, logits out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits


def convolutional() -> tuple[nn.Module, Tensor]:
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, groups=4), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    ).eval()  # fmt: skip
    return net, nets.noise(2, 3, 10, 10)


def vision() -> tuple[nn.Module, Any]:
    config = transformers.ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=4
    )
    return transformers.ViTForImageClassification(config).eval(), {"pixel_values": nets.noise(1, 3, 16, 16)}


def language() -> tuple[nn.Module, Any]:
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval(), {"input_ids": torch.arange(12)[None]}


class Image(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        logits: Tensor = self.model(pixel_values=pixels).logits
        return logits


def smaller(name: str) -> tuple[nn.Module, Tensor]:
    """A smaller model and one input, as a single-input module."""
    if name == "convolutional":
        net, x = convolutional()
        return secateur.plan(net, "l1-norm", target="params 40%", example=x).shrink(), x  # type: ignore[union-attr]
    net, example = vision() if name == "vision" else language()
    recipe: dict[str, Any] = {"method": "l1-norm", "skip": ["@residual"]}
    if name == "depth":
        recipe = {"method": "magnitude", "granularity": "depth"}
    plan = secateur.plan(net, recipe.pop("method"), target="params 20%", example=example, **recipe)
    small = plan.shrink().eval()  # type: ignore[union-attr]
    return (Image(small), example["pixel_values"]) if name == "vision" else (Logits(small), example["input_ids"])


@pytest.mark.parametrize("name", ["convolutional", "vision", "language", "depth"])
def test_torch_export(name: str) -> None:
    small, x = smaller(name)
    program = torch.export.export(small, (x,))
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), small(x))


@pytest.mark.parametrize("name", ["convolutional", "vision", "language", "depth"])
def test_onnx(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    small, x = smaller(name)
    file = tmp_path / "small.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(small, (x,), file, dynamo=True, verbose=False)
    session = runtime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(found, small(x).numpy(), rtol=1e-3, atol=1e-4)
