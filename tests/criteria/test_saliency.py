"""First-order criteria against finite differences, and the random control."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from secateur.criteria.random import random
from secateur.criteria.saliency import gradient, saliency
from secateur.evidence import gather_gradients
from secateur.layers import find_layers
from secateur.select import select


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()


def _loss(model, batch):
    return (model(batch) - 1).square().mean()


def test_saliency_is_the_slope_of_a_multiplicative_gate():
    """SNIP: dL(c * w)/dc at c = 1, by central differences."""
    model, x, step = _net(), torch.randn(6, 4, dtype=torch.float64), 1e-5
    layers, _ = find_layers(model)
    evidence = gather_gradients(model, layers, {"gradient"}, [x], _loss)
    for layer in layers:
        score = saliency(layer.weight(), evidence[layer.name]["gradient"])
        for o in range(layer.shape[0]):
            for i in range(layer.shape[1]):
                value = layer.stored.detach()[o, i].clone()
                losses = []
                with torch.no_grad():
                    for gate in (1 + step, 1 - step):
                        layer.stored[o, i] = gate * value
                        losses.append(float(_loss(model, x)))
                    layer.stored[o, i] = value
                slope = (losses[0] - losses[1]) / (2 * step)
                assert score[o, i] == pytest.approx(abs(slope), rel=1e-4, abs=1e-7)


def test_snip_and_taylor_give_the_same_masks():
    g = torch.Generator().manual_seed(0)
    w, d = torch.randn(6, 7, generator=g), torch.randn(6, 7, generator=g)
    score = saliency(w, d)
    snip = score / score.sum()  # as SNIP normalizes
    taylor = (w * d).square()  # as Molchanov et al. square
    for keep in (0.1, 0.5, 0.8):
        mask = select(score.reshape(1, -1), keep)
        assert torch.equal(mask, select(snip.reshape(1, -1), keep))
        assert torch.equal(mask, select(taylor.reshape(1, -1), keep))


@settings(max_examples=30, deadline=None)
@given(c=st.floats(0.001, 1000))
def test_saliency_scales_with_the_loss(c):
    model, x = _net(), torch.ones(3, 4, dtype=torch.float64)
    layers, _ = find_layers(model)
    one = gather_gradients(model, layers, {"gradient"}, [x], _loss)["0"]["gradient"]
    many = gather_gradients(model, layers, {"gradient"}, [x], lambda m, b: c * _loss(m, b))["0"]["gradient"]
    w = layers[0].weight()
    torch.testing.assert_close(saliency(w, many), c * saliency(w, one), rtol=1e-4, atol=0)
    torch.testing.assert_close(gradient(many), c * gradient(one), rtol=1e-4, atol=0)


def test_random_is_the_generators_and_only_the_shape_counts():
    a = random(torch.zeros(50, 40), torch.Generator().manual_seed(1))
    b = random(torch.ones(50, 40, dtype=torch.float16), torch.Generator().manual_seed(1))
    assert torch.equal(a, b) and a.dtype == torch.float32
    assert not torch.equal(a, random(torch.zeros(50, 40), torch.Generator().manual_seed(2)))
    assert a.min() >= 0 and a.max() < 1 and abs(float(a.mean()) - 0.5) < 0.03
    state = torch.get_rng_state()
    random(torch.zeros(2, 2), torch.Generator())
    assert torch.equal(state, torch.get_rng_state())  # never the global generator


def test_random_follows_the_weights_device():
    # A CPU generator with a tensor elsewhere; "meta" stands for any other device.
    score = random(torch.zeros(2, 3, device="meta"), torch.Generator())
    assert score.device.type == "meta" and score.shape == (2, 3)
