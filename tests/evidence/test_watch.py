"""Watching: whatever uses a weight, the rows that it multiplied are seen."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from secateur.errors import RecipeError
from secateur.evidence import Stop, watch
from secateur.evidence.watch import as_ni
from secateur.layers import find_layers


def _seen(model, *inputs, **choice):
    layers, _ = find_layers(model, **choice)
    rows: dict[str, list[torch.Tensor]] = {}

    def on_input(layer, x):
        rows.setdefault(layer.name, []).append(as_ni(layer, x))

    with torch.no_grad(), watch(layers, on_input):
        output = model(*inputs)
    return {x.name: x for x in layers}, {k: torch.cat(v) for k, v in rows.items()}, output


CONVS = [
    (nn.Conv1d, {"kernel_size": 3, "stride": 2, "padding": 1}),
    (nn.Conv1d, {"kernel_size": 2, "dilation": 3}),
    (nn.Conv1d, {"kernel_size": 3, "groups": 2}),
    (nn.Conv2d, {"kernel_size": 3, "padding": 1}),
    (nn.Conv2d, {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 2), "dilation": (2, 1)}),
    (nn.Conv2d, {"kernel_size": 3, "groups": 2, "stride": 2, "padding": 1, "dilation": 2}),
    (nn.Conv2d, {"kernel_size": 3, "groups": 4}),  # depthwise
    (nn.Conv2d, {"kernel_size": (3, 4), "padding": "same"}),
    (nn.Conv2d, {"kernel_size": 3, "padding": (2, 1), "padding_mode": "reflect"}),
    (nn.Conv2d, {"kernel_size": 3, "padding": 1, "padding_mode": "circular"}),
    (nn.Conv2d, {"kernel_size": 1}),
    (nn.Conv3d, {"kernel_size": (2, 3, 1), "stride": (1, 2, 1), "padding": (1, 0, 1)}),
    (nn.Conv3d, {"kernel_size": 2, "groups": 2, "dilation": (1, 2, 1)}),
]


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("kind,options", CONVS, ids=lambda v: v.__name__ if isinstance(v, type) else str(v))
@pytest.mark.parametrize("batched", [True, False])
def test_unfolded_rows_times_the_weight_are_the_convolution(kind, options, batched):
    torch.manual_seed(0)
    conv = kind(4, 8, bias=False, **options)
    dims = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}[kind]
    size = (9, 8, 7)[:dims]
    x = torch.randn(2, 4, *size) if batched else torch.randn(4, *size)
    layers, rows, y = _seen(conv, x)
    y = y if batched else y[None]
    weight, groups, n = layers["weight"].weight(), conv.groups, y.shape[0]
    assert rows["weight"].shape[1] == layers["weight"].shape[1]
    by_group = rows["weight"].reshape(n, groups, -1, weight.shape[1])
    for g in range(groups):  # rows are stacked: example, then group, then position
        outputs = slice(g * 8 // groups, (g + 1) * 8 // groups)
        product = by_group[:, g] @ weight[outputs].t()
        torch.testing.assert_close(product.transpose(1, 2), y[:, outputs].flatten(2), rtol=1e-4, atol=1e-5)


def test_linear_merges_batch_and_tokens():
    x = torch.randn(2, 3, 4)
    _, rows, _ = _seen(nn.Linear(4, 5), x)
    assert torch.equal(rows["weight"], x.reshape(6, 4))


def test_hugging_face_conv1d():
    torch.manual_seed(0)
    x, model = torch.randn(2, 3, 4), Conv1D(5, 4)
    layers, rows, y = _seen(model, x)
    layer = layers["weight"]
    assert layer.kind == "conv1d-hf" and layer.shape == (5, 4)
    assert torch.equal(rows["weight"], x.reshape(6, 4))
    torch.testing.assert_close(rows["weight"] @ layer.weight().t() + model.bias, y.reshape(6, 5))


def test_embedding_rows_are_one_hot():
    torch.manual_seed(0)
    model = nn.Embedding(7, 3)
    tokens = torch.tensor([[1, 6], [1, 0]])
    layers, rows, y = _seen(model, tokens, only=["weight"])
    assert layers["weight"].shape == (3, 7)
    assert torch.equal(rows["weight"] @ layers["weight"].weight().t(), y.reshape(4, 3))


class _Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 5, 4))

    def forward(self, x, chosen):
        return sum(F.linear(x[e], self.w[e]) for e in chosen)


class _Outer(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.experts = inner

    def forward(self, *inputs):
        return self.experts(*inputs)


@pytest.mark.parametrize("index", [int, torch.tensor], ids=["int", "tensor"])
def test_slices_of_an_expert_parameter_are_seen(index):
    x = torch.randn(3, 2, 4)
    layers, rows, _ = _seen(_Outer(_Experts()), x, [index(0), index(2)])
    assert list(layers) == [f"experts.w.{e}" for e in range(3)]
    assert rows.keys() == {"experts.w.0", "experts.w.2"}
    assert torch.equal(rows["experts.w.0"], x[0]) and torch.equal(rows["experts.w.2"], x[2])


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this torch has no grouped_mm")
def test_grouped_products_of_experts_are_seen_expert_by_expert():
    class Grouped(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.Parameter(torch.randn(3, 8, 16))

        def forward(self, x, ends):
            return F.grouped_mm(x, self.experts.transpose(1, 2), offs=ends)

    x = torch.randn(10, 16)
    layers, rows, y = _seen(Grouped(), x, torch.tensor([4, 4, 10], dtype=torch.int32))
    assert rows.keys() == {"experts.0", "experts.2"}  # the second expert got no rows
    assert torch.equal(rows["experts.0"], x[:4]) and torch.equal(rows["experts.2"], x[4:])
    torch.testing.assert_close(rows["experts.2"] @ layers["experts.2"].weight().t(), y[4:], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_every_expert_of_a_mixture_model_is_seen(tiny_moe, implementation):
    tiny_moe.set_experts_implementation(implementation)
    layers, rows, _ = _seen(tiny_moe, torch.arange(24).reshape(2, 12))
    per_layer = Counter(n.split(".mlp.experts.")[0] for n in rows for _ in rows[n] if "gate_up_proj" in n)
    assert per_layer == {"model.layers.0": 48, "model.layers.1": 48}  # 24 tokens, two experts each
    assert {n for n, x in layers.items() if x.kind == "linear"} <= rows.keys()


def test_attention_modules_are_looked_into():
    """`nn.MultiheadAttention` hands its weights to one composite function, in evaluation mode to a fused one."""
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(3, 5, 8)
    with torch.no_grad():
        plain = model(x)
    has = F.has_torch_function
    layers, rows, y = _seen(model, x)
    assert rows.keys() == layers.keys() == {"self_attn.out_proj", "linear1", "linear2"}
    assert all(r.shape[0] == 15 for r in rows.values())
    assert F.has_torch_function is has
    torch.testing.assert_close(y, plain)


def test_bare_products_are_seen():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(5, 4))

        def forward(self, x):
            return x @ self.table.t() + torch.matmul(x, self.table.t())

    x = torch.randn(2, 4)
    _, rows, _ = _seen(Bare(), x, only=["table"])
    assert torch.equal(rows["table"], torch.cat([x, x]))


def test_transposed_convolutions_and_tied_embeddings_are_refused():
    with pytest.raises(RecipeError, match=r"weight: input statistics of a transposed convolution"):
        _seen(nn.ConvTranspose2d(2, 2, 2), torch.randn(1, 2, 3, 3))

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(6, 4)

        def forward(self, tokens):
            return F.linear(self.embed(tokens), self.embed.weight)

    with pytest.raises(RecipeError, match=r"embed is an embedding that also serves"):
        _seen(Tied(), torch.tensor([1, 2]), only=["embed"])


def test_a_watcher_may_stop_the_pass_and_nothing_stays_behind():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    layers, _ = find_layers(model)
    seen = []

    def on_input(layer, x):
        seen.append(layer.name)
        raise Stop

    with pytest.raises(Stop), watch(layers, on_input):
        model(torch.ones(1, 2))
    model(torch.ones(1, 2))
    assert seen == ["0"]
