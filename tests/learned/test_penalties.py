"""Each penalty against its definition: numerical minimization, exhaustion, plain loops."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from secateur.errors import RecipeError
from secateur.learned import Now, Penalty
from secateur.learned.penalties import soft, soft_rows
from secateur.learned.projections import half_space
from secateur.registry import get


def made(name: str, **knobs: object) -> Penalty:
    penalty: Penalty = get("penalty", name).function(**knobs)
    return penalty


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moved(penalty: Penalty, x: Tensor, at: int, state: Mapping[str, Tensor], **now: float) -> tuple[Tensor, dict]:
    """One step of a penalty by itself."""
    moment = Now(at, 20, 0.5, lr=now.get("lr", 0.1), final=now.get("final", 0.5))
    new = dict(penalty.update(x, state, moment))
    return (x if penalty.step is None else penalty.step(x, new, moment)), new


def minimized(x: Tensor, penalty: object) -> Tensor:
    """``argmin 0.5 ||w - x||^2 + penalty(w)`` by many small steps from several starts, best of all."""
    best, at = None, None
    for start in (x, torch.zeros_like(x), 0.5 * x):
        w = start.clone().requires_grad_()
        for k in range(600):
            value = 0.5 * (w - x).square().sum() + penalty(w)  # type: ignore[operator]
            (slope,) = torch.autograd.grad(value, w)
            with torch.no_grad():
                w -= 0.05 / (1 + 0.02 * k) * slope
        if best is None or value.item() < best:
            best, at = value.item(), w.detach()
    assert at is not None
    return at


@pytest.mark.parametrize("amount", [0.3, 1.0, 4.0])
def test_the_group_lasso_operator_minimizes(amount: float) -> None:
    x = draw(1, 3, 4)
    found = soft_rows(x, amount)
    expected = minimized(x, lambda w: amount * (w.square().sum(-1) + 1e-12).sqrt().sum())
    assert torch.allclose(found, expected, atol=0.02)
    zero = x.square().sum(-1).sqrt() <= amount
    assert torch.equal((found == 0).all(-1), zero)


@pytest.mark.parametrize("amount", [0.2, 1.0])
def test_the_l1_operator_minimizes(amount: float) -> None:
    x = draw(1, 6, 1)
    assert torch.allclose(soft(x, amount), minimized(x, lambda w: amount * w.abs().sum()), atol=0.02)


def test_values_and_steps_follow_the_strength_and_the_learning_rate() -> None:
    x = draw(2, 3, 4)
    assert made("l1", strength=0.5).value(x, {}) == pytest.approx(float(0.5 * x.abs().sum()))  # type: ignore[misc]
    norms = x.square().sum(-1).sqrt().sum()
    assert made("group-lasso", strength=0.5).value(x, {}) == pytest.approx(float(0.5 * 2 * norms))  # type: ignore[misc]
    plain = made("group-lasso", strength=0.5, sized=False)
    assert plain.value(x, {}) == pytest.approx(float(0.5 * norms))  # type: ignore[misc]
    assert made("slimming", strength=0.5).value(x, {}) == pytest.approx(float(0.5 * x.abs().sum()))  # type: ignore[misc]
    assert torch.allclose(moved(made("l1", strength=2.0, proximal=True), x, 1, {})[0], soft(x, 0.2))
    assert torch.allclose(moved(made("ista-bn", strength=3.0), x, 1, {}, lr=0.01)[0], soft(x, 0.03))
    assert torch.allclose(moved(made("group-lasso", strength=2.0, proximal=True), x, 1, {})[0], soft_rows(x, 0.4))


def test_growing_regularization_grows_on_the_smallest_and_stops() -> None:
    penalty = made("greg", rise=0.1, every=2, ceiling=0.3)
    x = draw(1, 4, 3)
    state = dict(penalty.start(x, Now(0, 20, 0.5, final=0.5)))
    order = x.abs().mean(-1)[0].argsort()
    assert set(state["gone"][0].nonzero().flatten().tolist()) == set(order[:2].tolist())
    grown = []
    for at in range(1, 13):
        _, state = moved(penalty, x, at, state)
        grown.append(round(float(state["strength"]), 6))
    assert grown == [0.0, 0.1, 0.1, 0.2, 0.2, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3]
    assert penalty.value is not None
    y = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(penalty.value(y, state), y)
    assert torch.allclose(slope, 0.3 * x * state["gone"][..., None])


@given(st.integers(0, 60), st.floats(-0.5, 0.9))
def test_the_half_space_is_that_of_the_unit_before(seed: int, epsilon: float) -> None:
    x, before = draw(1, 5, 3, seed=seed), draw(1, 5, 3, seed=seed + 1000)
    found = half_space(x, before, epsilon)
    for k in range(5):
        inner = sum(float(a) * float(b) for a, b in zip(x[0, k], before[0, k], strict=True))
        out = inner < epsilon * sum(float(b) ** 2 for b in before[0, k])
        assert torch.equal(found[0, k], torch.zeros(3, dtype=torch.float64) if out else x[0, k])


def test_oto_projects_the_chosen_that_turn_away_and_keeps_them_at_zero() -> None:
    penalty = made("oto", strength=0.5, begin=0.25)
    x = torch.tensor([[[0.1, 0.0], [2.0, 0.0], [0.2, 0.0], [3.0, 0.0]]])
    state = dict(penalty.start(x, Now(0, 20, 0.5, final=0.5)))
    assert not state["chosen"].any() and penalty.value is not None and float(penalty.value(x, state)) == 0
    for at in range(1, 5):
        same, state = moved(penalty, x, at, state)
        assert torch.equal(same, x)
    x, state = moved(penalty, x, 5, state)
    assert state["chosen"].tolist() == [[True, False, True, False]]
    assert float(penalty.value(x, state)) == pytest.approx(0.5 * 0.3)
    x[0, :, 0] = torch.tensor([-0.1, -2.0, 0.05, 3.0])
    x, state = moved(penalty, x, 6, state)
    assert x[0, :, 0].tolist() == pytest.approx([0.0, -2.0, 0.05, 3.0])  # who was not chosen may turn
    x[0, :, 0] = torch.tensor([0.3, -2.0, 0.04, 3.0])
    x, _ = moved(penalty, x, 7, state)
    assert x[0, :, 0].tolist() == pytest.approx([0.0, -2.0, 0.04, 3.0])  # momentum does not revive


@given(st.integers(0, 40), st.integers(3, 12), st.sampled_from([0.3, 0.5, 0.75]), st.integers(1, 4))
def test_hesso_ends_with_the_exact_count_at_zero(seed: int, units: int, keep: float, periods: int) -> None:
    penalty = made("hesso", begin=0.1, end=0.9, periods=periods)
    x = draw(1, units, 3, seed=seed)
    state: dict[str, Tensor] = dict(penalty.start(x, Now(0, 20, keep, final=keep)))
    zeros = []
    for at in range(1, 21):
        x = x + 0.01 * draw(1, units, 3, seed=seed + at)  # training moves everything
        x, state = moved(penalty, x, at, state, final=keep)
        zeros.append(int((x == 0).all(-1).sum()))
    assert zeros == sorted(zeros) and zeros[1] == 0
    assert zeros[-1] == units - int(keep * units + 0.5)


def test_hesso_fades_linearly() -> None:
    penalty = made("hesso", begin=0.0, end=0.2, periods=1)  # one period of four steps
    x = torch.tensor([[[1.0], [5.0]]])
    state = dict(penalty.start(x, Now(0, 20, 0.5, final=0.5)))
    seen = []
    for at in range(1, 6):
        x, state = moved(penalty, x, at, state)
        seen.append(x[0, :, 0].tolist())
    assert [round(a, 6) for a, _ in seen] == [0.75, 0.5, 0.25, 0.0, 0.0] and all(b == 5.0 for _, b in seen)


def test_admm_projects_on_the_nearest_sparse_matrix() -> None:
    """Against exhaustion over all supports, of single weights and of units."""
    penalty = made("admm-training", rho=0.4, every=1)
    for shape, count in (((1, 6, 1), 2), ((2, 4, 2), 2)):
        x = draw(*shape, seed=sum(shape))
        state = dict(penalty.start(x, Now(0, 20, 0.5, final=count / shape[1])))
        for pool, z in zip(x, state["z"], strict=True):
            size = pool.square().sum(-1)
            supports = list(itertools.combinations(range(shape[1]), count))
            distance = {s: float(size.sum() - size[list(s)].sum()) for s in supports}
            best = min(distance, key=lambda s: distance[s])
            assert float((pool - z).square().sum()) == pytest.approx(distance[best])
            assert set(z.any(-1).nonzero().flatten().tolist()) == set(best)


def test_admm_takes_turns() -> None:
    penalty = made("admm-training", rho=0.4, every=2)
    x = draw(1, 4, 1)
    state = dict(penalty.start(x, Now(0, 20, 0.5, final=0.5)))
    z0 = state["z"].clone()
    assert penalty.value is not None
    assert float(penalty.value(x, state)) == pytest.approx(float(0.2 * (x - z0).square().sum()))
    _, state = moved(penalty, x, 1, state)
    assert torch.equal(state["z"], z0) and not state["u"].any()
    _, state = moved(penalty, x, 2, state)
    assert torch.allclose(state["u"], x - state["z"])
    kept = (x + 0).abs()[0, :, 0].argsort(descending=True)[:2]
    assert set(state["z"][0, :, 0].nonzero().flatten().tolist()) == set(kept.tolist())


def test_multipliers_ascend_the_violation() -> None:
    penalty = made("lagrangian", gain=0.5, stiffness=2.0)
    d = torch.tensor(0.8)
    state = dict(penalty.start(d, Now(0, 20, 0.6)))
    assert penalty.value is not None and float(penalty.value(d, state)) == pytest.approx(2.0 * 0.04)
    state = dict(penalty.update(d, state, Now(1, 20, 0.5)))
    assert float(state["linear"]) == pytest.approx(0.5 * 0.2) and float(state["square"]) == pytest.approx(
        2 + 0.5 * 0.04
    )
    assert float(penalty.value(d, state)) == pytest.approx(0.1 * 0.3 + 2.02 * 0.09)


def test_a_regularizer_warms_up() -> None:
    penalty = made("regularizer", strength=2.0, warmup=0.5)
    x = torch.tensor(3.0)
    state = dict(penalty.start(x, Now(0, 20, 0.5)))
    assert penalty.value is not None
    seen = [float(penalty.value(x, state))]
    for at in (5, 10, 20):
        state = dict(penalty.update(x, state, Now(at, 20, 0.5)))
        seen.append(float(penalty.value(x, state)))
    assert seen == pytest.approx([0.0, 3.0, 6.0, 6.0])


def test_bad_knobs_are_one_sentence() -> None:
    for name, knobs, said in (
        ("greg", {"every": 0}, "at least 1, not 0"),
        ("admm-training", {"every": 1.5}, "not 1.5"),
        ("oto", {"begin": 2.0}, "fractions of the run, not 2"),
        ("hesso", {"begin": 0.5, "end": 0.5}, "begin lies before end"),
    ):
        with pytest.raises(RecipeError, match=said):
            made(name, **knobs)
