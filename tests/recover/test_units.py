"""Healing a smaller model: closed forms, exactness where the removed units were redundant, and no harm."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

import secateur
from secateur.recover.units import Smaller, bias, refit
from secateur.structured import StructuredPlan
from secateur.surgery.shrink import shrink


class Wide(nn.Module):
    """Two layers around neurons of which each of the last eight repeats one of the first."""

    def __init__(self, constant: bool = False, biased: bool = True) -> None:
        super().__init__()
        self.up = nn.Linear(6, 16)
        self.down = nn.Linear(16, 5, bias=biased)
        with torch.no_grad():
            self.up.weight[8:] = 0.01 * self.up.weight[:8]
            self.up.bias[8:] = 0.01 * self.up.bias[:8]
            self.down.weight[:, 8:] *= 50
            if constant:
                self.up.weight[8:] = 0
                self.up.bias[8:] = torch.linspace(0.1, 0.4, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(torch.relu(self.up(x)))
        return out


def halved(net: nn.Module, recovery: str, data: Tensor | list[Tensor] | None, **axes: object) -> StructuredPlan:
    made: StructuredPlan = secateur.plan(
        net, "l1-norm", target="params 45%", example=torch.randn(2, 6), data=data, recovery=recovery, **axes
    )  # type: ignore[assignment]
    assert made.proof.proven and made.kept["down.weight"][1].tolist() == list(range(8))
    return made


def test_neurons_that_repeat_others_are_lost_without_a_trace() -> None:
    torch.manual_seed(0)
    net = Wide().double()
    data = [torch.randn(100, 6, dtype=torch.float64) for _ in range(3)]
    plan = secateur.plan(
        net, "l1-norm", target="params 45%", example=data[0][:2], data=data, recovery="refit",
        knobs={"recovery": {"damp": 1e-9}},
    )  # fmt: skip
    x = torch.randn(50, 6, dtype=torch.float64)
    torch.testing.assert_close(plan.shrink()(x), net(x), rtol=0, atol=1e-4)  # its moments are summed in float32


@pytest.mark.parametrize("biased", [True, False])
def test_refit_is_the_least_squares_solution(biased: bool) -> None:
    torch.manual_seed(1)
    net = Wide(biased=biased)
    with torch.no_grad():
        net.up.weight[8:] = 0.3 * torch.randn(8, 6)
        net.down.weight[:, 8:] /= 50
    small = copy.deepcopy(net)
    kept = {"up.weight": {0: np.arange(8)}, "up.bias": {0: np.arange(8)}, "down.weight": {1: np.arange(8)}}
    shrink(small, kept)
    batches = [torch.randn(40, 6) for _ in range(4)]
    refit(Smaller(net, small, kept, batches, lambda m, x: m(x)), damp=0.0)
    x = torch.cat(batches[:3])  # the last batch is held out
    with torch.no_grad():
        inputs = torch.relu(small.up(x))
        inputs = torch.cat([inputs, torch.ones(len(x), 1)], 1) if biased else inputs
        best = torch.linalg.lstsq(inputs.double(), net(x).double()).solution.t()
    found = torch.cat([small.down.weight, small.down.bias[:, None]], 1) if biased else small.down.weight
    torch.testing.assert_close(found.detach().double(), best, rtol=1e-3, atol=1e-4)


def test_a_bias_makes_up_for_constants() -> None:
    torch.manual_seed(2)
    net = Wide(constant=True)
    plan = halved(net, "bias", [torch.randn(64, 6) for _ in range(3)])
    x = torch.randn(20, 6)
    small = plan.shrink()
    torch.testing.assert_close(small(x), net(x), rtol=0, atol=1e-5)
    assert torch.equal(small.down.weight, net.down.weight[:, :8])  # type: ignore[union-attr]


def test_without_a_bias_none_is_made_up() -> None:
    net = Wide(constant=True, biased=False)
    small = copy.deepcopy(net)
    kept = {"up.weight": {0: np.arange(8)}, "up.bias": {0: np.arange(8)}, "down.weight": {1: np.arange(8)}}
    shrink(small, kept)
    notes = bias(Smaller(net, small, kept, [torch.randn(9, 6)] * 2, lambda m, x: m(x)))
    assert any("1 layers have no bias" in note for note in notes)
    assert torch.equal(small.down.weight, net.down.weight[:, :8])


def test_masked_and_smaller_agree_after_healing() -> None:
    torch.manual_seed(3)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.BatchNorm2d(32),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    ).eval()  # fmt: skip
    for module in net:
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    data = [torch.randn(8, 3, 12, 12) for _ in range(4)]
    dense = copy.deepcopy(net)
    plan = secateur.prune(net, "l1-norm", target="flops 50%", example=data[0][:1], data=data)
    assert any("layers that read removed units were fitted" in n for n in plan.notes), plan.notes
    small, x = plan.shrink(), torch.randn(4, 3, 12, 12)
    with torch.no_grad():
        torch.testing.assert_close(small.eval()(x), net.eval()(x), rtol=0, atol=1e-5)
        assert not torch.allclose(small(x), dense(x), atol=1e-3)


def test_healing_that_does_harm_is_taken_back() -> None:
    torch.manual_seed(4)
    net = Wide()
    with torch.no_grad():
        net.up.weight[8:] = 0.01 * torch.randn(8, 6)  # nothing repeats: what is lost must be guessed
    far = [torch.randn(3, 6), 100 + torch.randn(200, 6)]  # fitted on three points, judged far away
    plan = halved(net, "refit", far, knobs={"recovery": {"damp": 0.0}})
    assert any(n.startswith("taken back") for n in plan.notes), plan.notes
    assert not plan.healed


def test_no_data_is_said() -> None:
    plan = halved(Wide(), "refit", None)
    assert any("none was given" in n for n in plan.notes)


def test_a_language_model_heals_and_reloads_in_stock_transformers(tmp_path) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(5)
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=128, max_position_embeddings=64, tie_word_embeddings=True, initializer_range=0.15,
    )  # fmt: skip
    net = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():  # half of the neurons repeat the other half: what goes can be made up for
        for layer in net.model.layers:
            layer.mlp.gate_proj.weight[48:] = layer.mlp.gate_proj.weight[:48]
            layer.mlp.up_proj.weight[48:] = 0.1 * layer.mlp.up_proj.weight[:48]
    ids = torch.randint(0, 128, (32, 48))
    example = {"input_ids": ids[:1]}
    plan = secateur.plan(
        net, "flap", target="params 20%", example=example, data=list(ids.split(1)), only=["model.layers.*.mlp.*"]
    )
    assert all("left alone" not in f.reason for f in plan.families)
    wide = [f.kept for f in plan.families if f.name.startswith("model.layers") and "mlp" in f.name]
    assert wide and max(wide) < 96
    assert plan.healed and all("down_proj" in n or "o_proj" in n for n in plan.healed)
    small = plan.shrink().eval()
    secateur.save(small, tmp_path / "small")
    fresh = transformers.LlamaForCausalLM(config)
    again = secateur.load(tmp_path / "small", fresh).eval()
    with torch.no_grad():
        assert torch.equal(again(**example).logits, small(**example).logits)
