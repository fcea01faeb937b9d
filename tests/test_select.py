"""`select` keeps exactly what it was asked for, whatever the scores."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from secateur.errors import NumericalError
from secateur.select import keep_count, select


def by_stable_sort(score_pu: Tensor, count: int) -> Tensor:
    """Brute force: of equal scores the earlier index comes first."""
    mask = torch.zeros_like(score_pu, dtype=torch.bool)
    for p, row in enumerate(score_pu.tolist()):
        for u in sorted(range(len(row)), key=lambda u: (-row[u], u))[:count]:
            mask[p, u] = True
    return mask


# Few distinct values, so that ties are the rule.
VALUES = st.sampled_from([-torch.inf, -1.5, -1.0, -0.0, 0.0, 1e-45, 0.5, 1.0, 3.0e38, torch.inf])


@given(st.integers(1, 4), st.integers(1, 12), st.data())
def test_select_is_a_stable_sort(pools: int, units: int, data: st.DataObject) -> None:
    score = torch.tensor([[data.draw(VALUES) for _ in range(units)] for _ in range(pools)])
    count = data.draw(st.integers(0, units))
    mask = select(score, count)
    assert mask.dtype == torch.bool and mask.shape == score.shape
    assert torch.equal(mask, by_stable_sort(score, count))
    assert torch.equal(select(score, count / units), mask)


@pytest.mark.parametrize("units", [4096, 4097, 9000])  # both ways to find the edge
@pytest.mark.parametrize("distinct", [1, 7, 10**6])
def test_select_of_large_pools_is_a_stable_sort(units: int, distinct: int, rng: torch.Generator) -> None:
    score = torch.randint(-distinct, distinct, (2, units), generator=rng).float()
    for count in (1, units // 3, units - 1):
        assert torch.equal(select(score, count), by_stable_sort(score, count))


@pytest.mark.parametrize("value", [0.0, 1.0, -2.0, torch.inf, -torch.inf])
@pytest.mark.parametrize("units", [8, 5000])
def test_a_constant_tensor_loses_exactly_half(value: float, units: int) -> None:
    mask = select(torch.full((3, units), value), 0.5)
    assert torch.equal(mask, (torch.arange(units) < units // 2).expand(3, units))


@given(st.integers(1, 400), st.floats(0, 1))
def test_the_count_is_the_nearest_whole_number(units: int, keep: float) -> None:
    count = keep_count(keep, units)
    assert 0 <= count <= units
    assert abs(count - keep * units) <= 0.5 + 1e-8
    assert int(select(torch.zeros(1, units), keep).sum()) == count


def test_half_a_unit_is_kept_also_where_the_fraction_is_not_exact_in_binary() -> None:
    assert keep_count(1 - 0.9, 5) == 1  # 0.4999...
    assert keep_count(0.5, 5) == 3
    assert keep_count(0.3, 5) == 2


def test_int_is_a_number_and_float_a_fraction() -> None:
    score = torch.arange(10.0)[None]
    assert int(select(score, 1).sum()) == 1
    assert int(select(score, 1.0).sum()) == 10
    assert int(select(score, 99).sum()) == 10
    assert int(select(score, 0).sum()) == 0


def test_no_pools_and_low_precision() -> None:
    assert select(torch.zeros(0, 4), 0.5).shape == (0, 4)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert select(torch.tensor([[1.0, 3.0, 2.0]], dtype=dtype), 2).tolist() == [[False, True, True]]


@pytest.mark.parametrize("keep", [0.0, 0.5, 1.0, 2])
def test_nan_is_an_error(keep: float) -> None:
    with pytest.raises(NumericalError, match="NaN"):
        select(torch.tensor([[1.0, torch.nan, 2.0]]), keep)
