"""SynFlow: conserved flow, no layer collapse, and the network that it looks at."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import secateur
from secateur.calibrate import run_model
from secateur.criteria.initial import synflow
from secateur.errors import ModelError, NumericalError, RecipeError
from secateur.evidence import gather_flow
from secateur.layers import find_layers
from secateur.recipe import Recipe
from tests import tiny
from tests.before.nets import NETS, ViT, images, loss, made, vgg


def scores(model: nn.Module, batch: object) -> dict[str, Tensor]:
    layers, _ = find_layers(model)
    found = gather_flow(model, layers, batch, run_model)
    return {x.name: synflow(x.weight().double(), found[x.name]["flow"]) for x in layers}


@given(st.lists(st.integers(2, 9), min_size=3, max_size=6), st.booleans(), st.integers(0, 99))
def test_the_flow_through_every_layer_of_a_chain_is_the_same(widths: list[int], bias: bool, seed: int) -> None:
    """Tanaka et al., theorem 1: as a share it is 1; what comes into a hidden unit and what leaves it agree too."""
    torch.manual_seed(seed)
    net = nn.Sequential(*[m for i, o in pairwise(widths) for m in (nn.Linear(i, o, bias=bias), nn.ReLU())])
    found = list(scores(net, torch.zeros(3, widths[0])).values())
    for score in found:
        assert score.dtype == torch.float64
        torch.testing.assert_close(float(score.sum()), 1.0, rtol=1e-12, atol=0)
    for before, after in pairwise(found):
        torch.testing.assert_close(before.sum(1), after.sum(0), rtol=1e-10, atol=1e-14)


def test_the_scores_are_the_gradient_of_the_product_of_absolute_weights() -> None:
    """Equation 2 by hand, for two layers: R = 1^T |W2| |W1| 1."""
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    w1, w2 = net[0].weight.detach().double().abs(), net[2].weight.detach().double().abs()
    whole = (w2 @ w1).sum()
    found = scores(net, torch.randn(5, 3))
    torch.testing.assert_close(found["0"], w1 * w2.sum(0)[:, None] / whole)
    torch.testing.assert_close(found["2"], w2 * w1.sum(1)[None] / whole)


@pytest.mark.parametrize("norm", [False, True])
def test_convolutions_with_batch_norms_conserve_it(norm: bool) -> None:
    net = made(lambda: vgg(4, norm))
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, -2, 2)
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2)
    for score in scores(net, images()[0]).values():
        torch.testing.assert_close(float(score.sum()), 1.0, rtol=1e-10, atol=0)


@pytest.mark.parametrize("kind", NETS)
def test_every_kind_of_network(kind: str) -> None:
    """Nothing is dead, the model is as it was, and the labels, values and number of rows do not matter."""
    make, batch = NETS[kind]
    net = made(make).train()
    state = copy.deepcopy(net.state_dict())
    x, y = batch()
    found = scores(net, (x, y))
    other = scores(net, x[:3] if kind == "encoder" else torch.full_like(x[:3], 7.0))
    for name, score in found.items():
        assert bool((score >= 0).all()) and float(score.sum()) > 0 and torch.equal(score, other[name])
        assert kind == "vgg" or bool((score > 0).all())  # where maps are small, paddings are all that some weights read
    assert net.training and all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in net.parameters())


def test_attention_conserves_it_among_queries_keys_and_values() -> None:
    """In a block alone, all of the flow of the branch passes the queries, the keys and the values."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (m(x).unflatten(-1, (2, 4)).transpose(1, 2) for m in (self.q, self.k, self.v))
            causal = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            eager = (q @ k.mT / 2).masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf).softmax(-1) @ v
            both: Tensor = self.o((causal + eager).transpose(1, 2).flatten(2))
            return both

    for score in scores(made(Attention), torch.randn(2, 5, 8)).values():
        torch.testing.assert_close(float(score.sum()), 1.0, rtol=1e-10, atol=0)


@pytest.mark.parametrize("sparsity", [0.99, 0.999])
def test_no_layer_collapses_where_others_empty_some(sparsity: float) -> None:
    """Up to the critical compression, N weights / L layers; SNIP and magnitude empty layers long before."""
    emptied = {}
    for method in ("synflow", "snip", "global-magnitude"):
        net = made(vgg)
        kept = secateur.prune(net, method, sparsity=sparsity, data=[images()], loss=loss).masks
        emptied[method] = sum(not bool(m.any()) for m in kept.values())
        total = sum(m.numel() for m in kept.values())
        assert sum(int(m.sum()) for m in kept.values()) == round((1 - sparsity) * total)
    assert emptied["synflow"] == 0 and emptied["snip"] > 0 and emptied["global-magnitude"] > 0


def test_one_weight_in_each_layer_at_critical_compression() -> None:
    """The highest sparsity that can leave a path leaves one, and what is left is connected."""
    net = made(lambda: vgg(2, norm=False))
    layers, _ = find_layers(net)
    total = sum(x.numel for x in layers)
    kept = secateur.prune(net, "synflow", sparsity=1 - len(layers) / total, example=images()[0]).masks
    assert [int(m.sum()) for m in kept.values()] == [1] * len(layers)
    assert min(float(s.sum()) for s in scores(net, images()[0]).values()) == pytest.approx(1.0)


def test_it_takes_an_example_data_or_says_what_is_missing() -> None:
    x = images()[0]
    masks = [
        secateur.prune(made(lambda: vgg(4)), "synflow", sparsity=0.9, steps=5, **{k: v}).masks
        for k, v in {"example": x[:1], "data": [images(seed=3)]}.items()
    ]
    net = made(lambda: vgg(4))
    with secateur.attach(net, Recipe.of("synflow", sparsity=0.9, steps=5), data=x[:2]) as session:
        pass
    masks.append(session.masks)
    for name, mask in masks[0].items():
        assert torch.equal(mask, masks[1][name]) and torch.equal(mask, masks[2][name])
    with pytest.raises(RecipeError, match=r"'synflow' needs flow, which is measured on the shape of an input.*example"):
        secateur.prune(net, "synflow", sparsity=0.9)
    with pytest.raises(RecipeError, match="dict of keywords"):
        secateur.prune(net, "synflow", sparsity=0.9, example=(x, x))
    dead = vgg(2)
    nn.init.zeros_(dead[0].weight)
    with pytest.raises(NumericalError, match="nothing flows"):
        secateur.prune(dead, "synflow", sparsity=0.9, example=x)
    with pytest.raises(ModelError, match="nothing that is pruned lies"):
        secateur.prune(Apart(), "synflow", sparsity=0.5, example=torch.ones(1, 3))


class Apart(nn.Module):
    """A layer that the output does not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.idle = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def test_a_vision_transformer_in_bfloat16_at_high_sparsity() -> None:
    """Residual connections pass the flow around a branch, which may go; never half of one: it would be dead weight."""
    net = made(ViT).bfloat16()
    kept = secateur.prune(net, "synflow", sparsity=0.95, example=images()[0]).masks
    assert abs(kept.sparsity - 0.95) < 1e-3 and bool(kept["blocks.0.qkv"].any())
    for k in range(3):
        assert bool(kept[f"blocks.{k}.up"].any()) == bool(kept[f"blocks.{k}.down"].any())


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3-moe"])
def test_language_models_with_fused_and_plain_attention(family: str) -> None:
    """Attention is the same whichever way it is written; every layer has a part in the flow."""
    ids = torch.arange(18).view(2, 9)
    masks = []
    for kind in ("sdpa", "eager"):
        torch.manual_seed(0)
        net = tiny.build(family)
        net.set_attn_implementation(kind)
        masks.append(secateur.prune(net, "synflow", sparsity=0.7, example=ids, steps=3).masks)
    assert all(torch.equal(masks[1][n], m) and (bool(m.any()) or "expert" in n) for n, m in masks[0].items())


def test_a_compiled_model() -> None:
    net = made(NETS["mlp"][0])
    masks = secateur.prune(torch.compile(copy.deepcopy(net), backend="eager"), "synflow", sparsity=0.8,
                           example=torch.ones(1, 6)).masks  # fmt: skip
    plain = secateur.prune(net, "synflow", sparsity=0.8, example=torch.ones(1, 6)).masks
    assert all(torch.equal(masks[f"_orig_mod.{n}"], m) for n, m in plain.items())


def test_units_of_the_whole_model() -> None:
    net, x = made(lambda: vgg(8)), images()[0]
    plan = secateur.prune(net, "synflow", granularity="coupled", target="params 50%", example=x[:1], steps=1,
                          schedule="one-shot")  # fmt: skip
    small = plan.shrink().eval()
    assert plan.proof.proven and plan.after["params"] <= 0.5 * plan.before["params"]
    torch.testing.assert_close(small(x), net.eval()(x), rtol=1e-4, atol=1e-5)
