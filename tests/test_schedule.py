"""Schedules: end points, order, and the papers' formulas."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur.errors import UnknownName
from secateur.registry import parts
from secateur.schedule import sparsity_at

NAMES = sorted(parts("schedule"))
FRACTION = st.floats(0, 1)
SPARSITY = st.floats(0, 0.999)


def test_all_are_here() -> None:
    assert {"one-shot", "linear", "cubic", "geometric"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
@given(SPARSITY)
def test_end_points(name: str, sparsity: float) -> None:
    assert sparsity_at(name, 1.0, sparsity) == pytest.approx(sparsity, abs=1e-12)
    assert sparsity_at(name, 7.0, sparsity) == sparsity_at(name, 1.0, sparsity)
    assert sparsity_at(name, -1.0, sparsity) == sparsity_at(name, 0.0, sparsity)
    if name != "one-shot":
        assert sparsity_at(name, 0.0, sparsity) == 0.0


@pytest.mark.parametrize("name", NAMES)
@given(SPARSITY, FRACTION, FRACTION)
def test_monotone_and_never_past_the_target(name: str, sparsity: float, t: float, u: float) -> None:
    early, late = sparsity_at(name, min(t, u), sparsity), sparsity_at(name, max(t, u), sparsity)
    assert 0.0 <= early <= late + 1e-12 <= sparsity + 2e-12


@given(SPARSITY, st.integers(1, 20), st.data())
def test_cubic_is_equation_1_of_zhu_and_gupta(s_f: float, n: int, data: st.DataObject) -> None:
    # s_t = s_f + (s_i - s_f) (1 - (t - t_0) / (n dt))^3 with s_i = 0, t_0 = 0, dt = 1
    t = data.draw(st.integers(0, n))
    assert sparsity_at("cubic", t / n, s_f) == pytest.approx(s_f + (0.0 - s_f) * (1 - t / n) ** 3, abs=1e-12)


@given(SPARSITY, st.integers(1, 20), st.data())
def test_geometric_is_algorithm_1_of_synflow(sparsity: float, n: int, data: st.DataObject) -> None:
    # The compression ratio rho = 1 / keep grows as rho^(k / n).
    k = data.draw(st.integers(0, n))
    rho = 1 / (1 - sparsity)
    assert 1 - sparsity_at("geometric", k / n, sparsity) == pytest.approx(rho ** (-k / n), abs=1e-9)


@given(SPARSITY, FRACTION)
def test_linear_and_one_shot(sparsity: float, t: float) -> None:
    assert sparsity_at("linear", t, sparsity) == pytest.approx(sparsity * t)
    assert sparsity_at("one-shot", t, sparsity) == sparsity


def test_an_unknown_schedule_has_a_nearest_match() -> None:
    with pytest.raises(UnknownName, match="no schedule named 'cubik'; did you mean 'cubic'"):
        sparsity_at("cubik", 0.5, 0.5)
