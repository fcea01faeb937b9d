"""Half-price products against the whole ones."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from secateur.symmetric import add_gram, invert_upper, mirror, quadratic, upper_blocks


@given(size=st.integers(1, 70), leaf=st.integers(1, 20))
def test_blocks_cover_the_upper_triangle_once(size, leaf):
    seen = torch.zeros(size, size)
    for top, bottom, left, right in upper_blocks(size, leaf):
        assert bottom - top <= max(leaf, size) and top <= left
        seen[top:bottom, left:right] += 1
    upper = torch.ones(size, size).triu()
    assert (seen[upper.bool()] == 1).all() and seen.max() == 1


@pytest.mark.parametrize("size", [1, 143, 144, 145, 300, 611])
def test_gram_and_quadratic_equal_the_plain_products(size):
    x, rows = torch.randn(50, size), torch.randn(7, size)
    gram = torch.zeros(size, size)
    for part in x.split(20):
        add_gram(gram, part)
    mirror(gram)
    whole = x.double().t() @ x.double()
    torch.testing.assert_close(gram.double(), whole, rtol=1e-5, atol=1e-4)
    assert torch.equal(gram, gram.t()) or size <= 144  # a diagonal block is one product
    expected = float((rows.double() @ whole @ rows.double().t()).trace())
    assert quadratic(rows, gram) == pytest.approx(expected, rel=1e-5)


@given(size=st.integers(1, 200))
def test_inverse_of_an_upper_triangle(size):
    upper = torch.randn(size, size, dtype=torch.float64).triu() / size + torch.eye(size, dtype=torch.float64)
    inverse = invert_upper(upper, leaf=16)
    assert torch.equal(inverse, inverse.triu())
    torch.testing.assert_close(upper @ inverse, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-9)
