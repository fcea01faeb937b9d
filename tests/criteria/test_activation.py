"""Activation-aware criteria against their formulas, written as loops."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.criteria.activation import activation_norm, ria, wanda


@pytest.fixture
def facts() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(20, 5, generator=g)
    return torch.randn(4, 5, generator=g), x.square().sum(0).sqrt()


def test_wanda_is_the_double_loop(facts):
    weight, norm = facts
    score = wanda(weight, norm)
    for o in range(4):
        for i in range(5):
            assert score[o, i] == pytest.approx(abs(float(weight[o, i])) * float(norm[i]))


@pytest.mark.parametrize("a", [0.0, 0.5, 1.0])
def test_ria_is_the_double_loop(facts, a):
    weight, norm = facts
    score = ria(weight, norm, a=a)
    for o in range(4):
        for i in range(5):
            size = abs(float(weight[o, i]))
            row = sum(abs(float(weight[o, k])) for k in range(5))
            column = sum(abs(float(weight[k, i])) for k in range(4))
            assert score[o, i] == pytest.approx((size / row + size / column) * float(norm[i]) ** a, rel=1e-5)


def test_ria_of_dead_rows_and_columns_is_zero():
    weight = torch.tensor([[0.0, 0.0], [0.0, 3.0]])
    assert ria(weight, torch.ones(2)).tolist() == [[0.0, 0.0], [0.0, 2.0]]


def test_wanda_by_row_ignores_outputs_but_activation_norm_ignores_weights(facts):
    weight, norm = facts
    assert torch.equal(activation_norm(weight, norm), activation_norm(10 * weight, norm))
    assert torch.equal(activation_norm(weight, norm)[0], norm)
    assert activation_norm(weight, norm).is_contiguous()


@settings(max_examples=30, deadline=None)
@given(c=st.floats(0.01, 100), d=st.floats(0.01, 100), a=st.floats(0.1, 2))
def test_scale_laws(c, d, a):
    g = torch.Generator().manual_seed(1)
    weight = torch.randn(3, 6, generator=g, dtype=torch.float64)
    norm = torch.rand(6, generator=g, dtype=torch.float64) + 0.1
    torch.testing.assert_close(wanda(c * weight, d * norm), c * d * wanda(weight, norm))
    torch.testing.assert_close(ria(c * weight, d * norm, a=a), math.pow(d, a) * ria(weight, norm, a=a))
    torch.testing.assert_close(activation_norm(c * weight, d * norm), d * activation_norm(weight, norm))
