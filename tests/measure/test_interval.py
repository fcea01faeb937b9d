"""Intervals of the median against their definition, and what turns do."""

from __future__ import annotations

import itertools
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from secateur.errors import DataError
from secateur.measure.interval import interval, ratio
from secateur.measure.latency import turns


@pytest.mark.parametrize("n", range(1, 15))
@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95])
def test_coverage_is_that_of_all_outcomes(n: int, confidence: float) -> None:
    """Each value falls below or above the true median, 0 here, with equal chances: go through all 2^n outcomes."""
    found = interval(range(n), confidence)
    low, high = int(found.low), int(found.high)
    assert low + high == n - 1

    def covered(below: int) -> float:
        hits = 0
        for signs in itertools.product((-1, 1), repeat=n):
            ranked = sorted(signs)
            hits += ranked[below] < 0 < ranked[n - 1 - below]
        return hits / 2**n

    assert found.coverage == covered(low)
    assert found.coverage >= confidence or low == 0
    assert low == (n - 1) // 2 or covered(low + 1) < confidence  # none narrower would do


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40), st.floats(0.01, 1e3))
def test_it_encloses_the_median_and_scales(values: list[float], scale: float) -> None:
    found = interval(values)
    assert found.low <= found.median <= found.high and found.median == statistics.median(values)
    assert {found.low, found.high} <= {*values}
    scaled = interval([scale * v for v in values])
    assert (scaled.low, scaled.high) == (scale * found.low, scale * found.high)


def test_a_ratio_is_of_turns_not_of_medians() -> None:
    one, two = [1.0, 10.0, 100.0, 3.0, 7.0, 2.0], [0.5, 5.0, 50.0, 1.5, 3.5, 1.0]
    assert ratio(one, two) == interval([2.0] * 6)
    assert ratio(one, two[::-1]).low < 2.0 < ratio(one, two[::-1]).high
    with pytest.raises(ValueError, match="zip"):
        ratio(one, two[:-1])


def test_bad_input() -> None:
    with pytest.raises(DataError, match="at least one value"):
        interval([])
    with pytest.raises(DataError, match="not 95"):
        interval([1.0], 95)


def test_models_take_turns_in_both_orders_and_warm_up() -> None:
    log: list[nn.Module] = []
    models = {"a": nn.Linear(1, 1).train(), "b": nn.Linear(1, 1).eval()}

    def action(model: nn.Module) -> int:
        assert not model.training and torch.is_inference_mode_enabled()
        log.append(model)
        return len(log)

    found = turns(models, action, repeats=3, warmup=2)
    a, b = models.values()
    assert log == [a, b, b, a, a, b, b, a, a, b]
    assert found == {"a": [5, 8, 9], "b": [6, 7, 10]}
    assert a.training and not b.training
