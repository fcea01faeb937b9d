"""Shares of layers from forward passes alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from secateur.errors import DataError, RecipeError
from secateur.families import ecoflap
from secateur.families.vision_language import layer_scores, ratios
from secateur.layers import find_layers


@given(
    st.lists(st.tuples(st.floats(0, 100), st.integers(1, 5000)), min_size=1, max_size=8),
    st.floats(0.05, 0.9),
    st.floats(0.0, 0.09),
)
def test_shares_meet_the_budget_and_their_bounds(
    layers: list[tuple[float, int]], sparsity: float, slack: float
) -> None:
    scores, sizes = ({str(k): x[j] for k, x in enumerate(layers)} for j in (0, 1))
    found = ratios(scores, sizes, sparsity, sparsity + slack)
    total = sum(sizes.values())
    assert all(-1e-9 <= v <= sparsity + slack + 1e-9 for v in found.values())
    gone = sum(found[n] * sizes[n] for n in sizes)
    assert gone == pytest.approx(sparsity * total, abs=0.51 + 1e-5 * total)


def test_layers_that_the_loss_feels_more_keep_more() -> None:
    found = ratios({"a": 9.0, "b": 1.0, "c": 1.0}, {"a": 100, "b": 100, "c": 100}, 0.5, 0.6)
    assert found["a"] < found["b"] == found["c"]


class Towers(nn.Module):
    """Two layers; the second hardly counts."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) + 0.01 * self.two(x)


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


def test_scores_are_directional_derivatives_and_the_model_is_as_it_was() -> None:
    torch.manual_seed(0)
    model = Towers()
    before = {n: p.clone() for n, p in model.named_parameters()}
    data = [torch.randn(4, 16)]
    layers = find_layers(model)[0]
    scores = layer_scores(model, layers, data, loss, eps=1e-3, draws=1, seed=3)
    generator = torch.Generator().manual_seed(3)
    gradients = torch.autograd.grad(loss(model, data[0]), [model.one.weight, model.two.weight])
    for layer, gradient in zip(("one", "two"), gradients, strict=True):
        z = torch.randn(16, 16, generator=generator)
        assert scores[layer] == pytest.approx(float((gradient * z).sum().abs()), rel=1e-2, abs=1e-4)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_ecoflap_prunes_to_the_sparsity() -> None:
    torch.manual_seed(0)
    model = Towers()
    made = ecoflap(model, [torch.randn(4, 16) for _ in range(2)], loss, sparsity=0.5)
    assert made.sparsity == pytest.approx(0.5, abs=0.01)
    kept = {r.name: r.kept for r in made.records}
    assert kept["one"] > kept["two"]
    assert int(model.one.weight.count_nonzero()) == kept["one"]


def test_bad_input() -> None:
    with pytest.raises(DataError, match="at least one"):
        ecoflap(Towers(), [], loss)
    with pytest.raises(RecipeError, match="highest sparsity of a layer"):
        ecoflap(Towers(), [torch.randn(2, 16)], loss, sparsity=0.5, most=0.4)
    with pytest.raises(RecipeError, match="eps is a step"):
        ecoflap(Towers(), [torch.randn(2, 16)], loss, eps=0.0)


def test_a_loss_that_fails_leaves_the_model_as_it_was() -> None:
    model = nn.Linear(4, 2)
    kept = model.weight.detach().clone()

    def fails(net: nn.Module, batch: Tensor) -> Tensor:
        raise ValueError("no loss")

    with pytest.raises(ValueError, match="no loss"):
        layer_scores(model, find_layers(model)[0], [torch.ones(1, 4)], fails, eps=0.1, draws=1, seed=0)
    assert torch.equal(model.weight, kept)
