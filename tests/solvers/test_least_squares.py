"""The re-fit against exact normal equations, and its promises."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from secateur.granularity import parse
from secateur.solvers import Curvature, least_squares, rank, refit

Make = Callable[..., tuple[Tensor, Tensor]]


def row_errors(weight: Tensor, x: Tensor, gram: Tensor) -> Tensor:
    change = (weight - x).double()
    return ((change @ gram.double()) * change).sum(1)


@pytest.mark.parametrize("damp", [0.0, 0.1])
def test_equals_the_normal_equations(damp: float, layer: Make) -> None:
    weight, x = layer(5, 12, seed=1)
    gram = x.t() @ x
    mask = torch.rand(5, 12, generator=torch.Generator().manual_seed(0)) > 0.4
    found = refit(weight, mask, Curvature(gram), damp=damp, iterations=100, tol=0.0)
    h = gram.double() + damp * gram.double().diagonal().mean() * torch.eye(12)
    for w, row, m in zip(weight.double(), found, mask, strict=True):
        expected = torch.zeros(12, dtype=torch.float64)
        expected[m] = torch.linalg.solve(h[m][:, m], (h @ w)[m])
        torch.testing.assert_close(row.double(), expected, rtol=1e-3, atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 999),
    iterations=st.integers(0, 20),
    tokens=st.integers(1, 40),
    damp=st.sampled_from([0.0, 0.01, 1.0]),
    spread=st.floats(0, 4),
)
def test_no_row_gets_worse(seed: int, iterations: int, tokens: int, damp: float, spread: float) -> None:
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(4, 16, generator=g)
    x = torch.randn(tokens, 16, generator=g) * torch.exp(spread * torch.randn(16, generator=g))
    gram, parsed = x.t() @ x, parse("2:4")
    score = weight.abs()
    fitted = least_squares(weight, score, Curvature(gram), 0.5, parsed, damp=damp, iterations=iterations)
    ranked = rank(weight, score, 0.5, parsed)
    assert torch.equal(fitted.mask, ranked.mask)
    before, after = row_errors(weight, ranked.weight, gram), row_errors(weight, fitted.weight, gram)
    whole = row_errors(weight, weight * 0, gram)
    assert (after <= before * (1 + 1e-5) + 1e-6 * whole).all()


def test_starts_where_it_is_told(layer: Make) -> None:
    weight, x = layer(3, 8)
    gram = x.t() @ x
    mask = weight > 0
    start = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(refit(weight, mask, Curvature(gram), start=start, iterations=0), start * mask)
    a = refit(weight, mask, Curvature(gram), start=start, iterations=50, tol=0.0)
    torch.testing.assert_close(a, refit(weight, mask, Curvature(gram), iterations=50, tol=0.0), rtol=1e-3, atol=1e-4)


def test_an_empty_mask_and_a_full_one(layer: Make) -> None:
    weight, x = layer(3, 8)
    curvature = Curvature(x.t() @ x)
    assert (refit(weight, torch.zeros(3, 8, dtype=torch.bool), curvature) == 0).all()
    torch.testing.assert_close(refit(weight, torch.ones(3, 8, dtype=torch.bool), curvature), weight)
