"""Every parameter of a model is a layer or skipped with a reason, and matrices go there and back."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from secateur.errors import ModelError, NumericalError, RecipeError
from secateur.layers import find_layers


def _assert_complete(model, **choice):
    """Each parameter is accounted for exactly once."""
    layers, skipped = find_layers(model, **choice)
    names = [x.name for x in layers] + [s.name for s in skipped]
    assert len(names) == len(set(names))
    assert sum(x.numel for x in layers) + sum(s.numel for s in skipped) == sum(p.numel() for p in model.parameters())
    assert all(s.reason for s in skipped)
    return {x.name: x for x in layers}, {s.name: s.reason for s in skipped}


MODULES = [
    (lambda: nn.Linear(4, 6), "linear", (6, 4)),
    (lambda: nn.Conv1d(4, 6, 3), "conv", (6, 12)),
    (lambda: nn.Conv2d(4, 6, (3, 2)), "conv", (6, 24)),
    (lambda: nn.Conv2d(4, 6, 3, groups=2), "conv", (6, 18)),
    (lambda: nn.Conv3d(4, 6, 2), "conv", (6, 32)),
    (lambda: nn.ConvTranspose1d(4, 6, 3), "conv-transpose", (6, 12)),
    (lambda: nn.ConvTranspose2d(4, 6, (3, 2)), "conv-transpose", (6, 24)),
    (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), "conv-transpose", (6, 18)),
    (lambda: nn.ConvTranspose3d(4, 6, 2, groups=2), "conv-transpose", (6, 16)),
    (lambda: nn.Embedding(10, 4), "embedding", (4, 10)),
    (lambda: Conv1D(6, 4), "conv1d-hf", (6, 4)),
]


@pytest.mark.parametrize("make,kind,shape", MODULES, ids=lambda v: str(v) if isinstance(v, (str, tuple)) else "")
def test_kinds_shapes_and_round_trip(make, kind, shape):
    torch.manual_seed(0)
    model = make()
    by_name, _ = _assert_complete(model, only=["weight"])
    layer = by_name["weight"]
    assert (layer.kind, layer.shape) == (kind, shape)
    matrix = layer.weight()
    assert tuple(matrix.shape) == shape
    assert torch.equal(layer.from_oi(matrix), layer.stored)
    number = torch.arange(layer.numel, dtype=torch.float32).reshape(layer.stored.shape)
    assert torch.equal(layer.from_oi(layer.to_oi(number)), number)
    assert layer.to_oi(number).unique().numel() == layer.numel
    layer.write(torch.ones(shape))
    assert (model.weight == 1).all()


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_row_of_a_transposed_convolution_makes_its_output(dims, groups):
    """Zeroing row ``o`` of the matrix zeroes output channel ``o``, and no other."""
    torch.manual_seed(0)
    model = [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d][dims - 1](4, 6, 2, groups=groups, bias=False)
    (layer,), _ = find_layers(model)
    x = torch.randn(1, 4, *[3] * dims)
    before, weight = model(x).detach(), layer.weight().clone()
    for o in range(6):
        pruned = weight.clone()
        pruned[o] = 0
        layer.write(pruned)
        after = model(x).detach()
        assert not after[:, o].any()
        rest = [k for k in range(6) if k != o]
        assert torch.equal(after[:, rest], before[:, rest])
    # and the columns are (input of the group, kernel position) in that order
    inputs = torch.zeros(1, 4, *[1] * dims)
    inputs[0, 1] = 1  # the second input of the first group
    layer.write(weight)
    y, kernel = model(inputs)[0].detach(), 2**dims
    outputs = 6 // groups
    torch.testing.assert_close(y[:outputs].flatten(1), weight[:outputs, kernel : 2 * kernel])


def test_the_matrix_means_x_times_w_transposed():
    torch.manual_seed(0)
    hf, embedding = Conv1D(6, 4), nn.Embedding(10, 4)
    x, tokens = torch.randn(3, 4), torch.tensor([3, 9])
    (layer,), _ = find_layers(hf)
    torch.testing.assert_close(F.linear(x, layer.weight(), hf.bias), hf(x))
    (layer,), _ = find_layers(embedding, only=["weight"])
    assert torch.equal(F.linear(F.one_hot(tokens, 10).float(), layer.weight()), embedding(tokens))


def test_weight_is_float32_or_better_and_write_keeps_the_dtype():
    for dtype, seen in (
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float64, torch.float64),
    ):
        model = nn.Linear(3, 2).to(dtype)
        (layer,), _ = find_layers(model)
        assert layer.weight().dtype == seen and not layer.weight().requires_grad
        kept = model.weight
        layer.write(torch.full((2, 3), 0.5))
        assert model.weight is kept and model.weight.dtype == dtype and (model.weight == 0.5).all()
        assert model.weight.requires_grad


def test_gradient():
    model = nn.Sequential(Conv1D(6, 4), nn.Linear(6, 2))
    layers, _ = find_layers(model)
    with pytest.raises(ModelError, match="0 received no gradient"):
        layers[0].gradient()
    model(torch.randn(3, 4)).sum().backward()
    assert torch.equal(layers[0].gradient(), model[0].weight.grad.t())


def test_weights_that_are_not_finite_are_named():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with torch.no_grad():
        model[1].weight[0, 0] = float("nan")
    layers, _ = find_layers(model)
    layers[0].check_finite()
    with pytest.raises(NumericalError, match="1 has NaN or infinite weights"):
        layers[1].check_finite()


class _Language(nn.Module):
    """A little of everything: tied embedding, tied bias, repeated blocks, a router, a 3-D table."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(12, 4)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(4, 8), "norm": nn.LayerNorm(4), "down": nn.Linear(8, 4)}) for _ in range(2)
        )
        self.blocks[1]["up"].bias = self.blocks[0]["up"].bias
        self.router = nn.Parameter(torch.randn(3, 4))
        self.table = nn.Parameter(torch.randn(2, 3, 4))
        self.head = nn.Linear(4, 12, bias=False)
        self.head.weight = self.embed.weight


def test_what_is_left_alone_and_why():
    layers, skipped = _assert_complete(_Language())
    assert list(layers) == ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"]
    assert "embedding" in skipped["embed"] and "router" in skipped["router"]
    assert "3-D" in skipped["table"] and "vector" in skipped["blocks.0.norm.weight"]
    assert "head" not in skipped  # it is the embedding's parameter
    assert "blocks.1.up.bias" not in skipped  # it is the first block's


def test_tied_linear_layers_are_seen_once_and_left_alone():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    layers, skipped = _assert_complete(model)
    assert list(layers) == ["1"]
    assert "tied to 0.weight and 2.weight" in skipped["0"]
    layers, _ = _assert_complete(model, only=["0"])
    assert list(layers) == ["0"]


def test_only_skip_and_inside():
    model = _Language()
    assert list(_assert_complete(model, only=["*.up"])[0]) == ["blocks.0.up", "blocks.1.up"]
    assert list(_assert_complete(model, only=["router", "embed"])[0]) == ["router", "embed"]
    assert list(_assert_complete(model, skip=["down"])[0]) == ["blocks.0.up", "blocks.1.up"]
    assert list(_assert_complete(model, only=["blocks.*"], skip=["blocks.0.*"])[0]) == ["blocks.1.up", "blocks.1.down"]
    layers, skipped = _assert_complete(model, inside=["blocks.1"])
    assert list(layers) == ["blocks.1.up", "blocks.1.down"]
    assert "outside the repeated blocks" in skipped["blocks.0.up"]


def test_globs_that_name_nothing_and_models_with_nothing_left():
    with pytest.raises(RecipeError, match=r"no layer is named 'blocks\.9\.up'"):
        find_layers(_Language(), only=["*.up", "blocks.9.up"])
    with pytest.raises(RecipeError, match="no layer is named 'nothing'"):
        find_layers(_Language(), skip=["nothing"])
    with pytest.raises(RecipeError, match="nothing is left to prune"):
        find_layers(nn.LayerNorm(4))


def test_a_mixture_of_experts_is_complete():
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, moe_intermediate_size=8, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=4, num_experts=4, num_experts_per_tok=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    layers, skipped = _assert_complete(model)
    experts = [x for x in layers.values() if x.kind == "expert"]
    assert len(experts) == 2 * 2 * 4 and {x.shape for x in experts} == {(16, 16), (16, 8)}
    assert any("router" in reason for reason in skipped.values())
    layer = layers["model.layers.1.mlp.experts.down_proj.3"]
    whole = model.model.layers[1].mlp.experts.down_proj
    before = whole.detach().clone()
    layer.write(torch.zeros(layer.shape))
    assert not whole[3].any() and torch.equal(whole[:3], before[:3])


def test_transposed_experts():
    class Experts(nn.Module):
        is_transposed = True

        def __init__(self):
            super().__init__()
            self.up = nn.Parameter(torch.randn(2, 4, 6))

    layers, _ = _assert_complete(Experts())
    layer = layers["up.1"]
    assert layer.shape == (6, 4)
    assert torch.equal(layer.weight(), layer.module.up.detach()[1].t())
    layer.write(torch.zeros(6, 4))
    assert not layer.module.up[1].any() and layer.module.up[0].all()
