"""Each gate against its own equation: closed forms, brute force, Monte Carlo, finite differences."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from secateur.errors import RecipeError
from secateur.granularity import parse
from secateur.learned import Gate, Now
from secateur.learned.base import long_tailed_step
from secateur.learned.stochastic import candidates, open_probability
from secateur.registry import get


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def made(name: str, weight: Tensor, granularity: str = "element", **knobs: object) -> Gate:
    part, pattern = get("gate", name), parse(granularity)
    shape = pattern.pool_shape(weight.shape[0], weight.shape[1])[:2]
    facts = {"weight": weight, "granularity": pattern, "pool_shape": shape, "generator": generator()}
    gate: Gate = part(facts, **knobs)
    return gate


def slope_of(function: object, x: Tensor, eps: float = 1e-6) -> Tensor:
    """Central differences of a scalar function, in float64."""
    found = torch.zeros_like(x)
    for k in range(x.numel()):
        for sign in (1, -1):
            moved = x.clone()
            moved.view(-1)[k] += sign * eps
            found.view(-1)[k] += sign * float(function(moved)) / (2 * eps)  # type: ignore[operator]
    return found


# -- thresholds -------------------------------------------------------------------------------------------------


def test_str_is_its_equation_and_has_its_gradient() -> None:
    w = torch.randn(4, 5, generator=generator(), dtype=torch.float64).requires_grad_()
    s = torch.tensor(-0.5, dtype=torch.float64, requires_grad=True)
    gate = made("str", w.detach())
    assert gate.weight is not None
    found = gate.weight(w, {"s": s}, {}, True)
    t = 1 / (1 + math.exp(0.5))
    for value, x in zip(found.flatten().tolist(), w.flatten().tolist(), strict=True):
        assert value == pytest.approx(math.copysign(max(abs(x) - t, 0), x))
    c = torch.randn(4, 5, generator=generator(1), dtype=torch.float64)
    to_w, to_s = torch.autograd.grad((found * c).sum(), (w, s))
    open_ = (w.abs() > t).detach()
    assert torch.allclose(to_w, c * open_)
    assert float(to_s) == pytest.approx(-float((c * w.detach().sign() * open_).sum()) * t * (1 - t))


def test_str_lowers_its_threshold_to_the_count_that_is_wanted() -> None:
    w = torch.tensor([[0.9, -0.5, 0.3, 0.1]])
    gate = made("str", w)
    assert gate.final is not None
    kept = torch.tensor([[True, True, True, False]])
    left = gate.final(w, {"s": torch.tensor(0.0)}, {}, kept) * kept  # the threshold is 0.5, and goes to 0.2997
    assert torch.allclose(left, torch.tensor([[0.6003, -0.2003, 0.0003, 0.0]]))
    few = torch.tensor([[True, False, False, False]])
    assert torch.allclose(gate.final(w, {"s": torch.tensor(0.0)}, {}, few)[0, 0], torch.tensor(0.4))


def test_dst_thresholds_rows_with_the_long_tailed_derivative() -> None:
    w = torch.tensor([[0.2, -0.5, 1.8], [0.05, 0.6, -0.1]], requires_grad=True)
    t = torch.tensor([[0.3], [0.0]], requires_grad=True)
    gate = made("dst", w.detach())
    assert gate.weight is not None and gate.regularizer is not None
    found = gate.weight(w, {"t": t}, {}, True)
    assert torch.allclose(found, torch.tensor([[0.0, -0.5, 1.8], [0.05, 0.6, -0.1]]))

    def slope(x: float) -> float:
        return 2 - 4 * abs(x) if abs(x) <= 0.4 else 0.4 if abs(x) <= 1 else 0.0

    to_w, to_t = torch.autograd.grad(found.sum(), (w, t))
    for i, j in itertools.product(range(2), range(3)):
        x, edge = w.tolist()[i][j], t.tolist()[i][0]
        mask, d = float(abs(x) > edge), slope(abs(x) - edge)
        assert float(to_w[i, j]) == pytest.approx(mask + x * d * math.copysign(1, x), abs=1e-5)
    for i in range(2):
        expected = -sum(x * slope(abs(x) - t.tolist()[i][0]) for x in w.tolist()[i])
        assert float(to_t[i, 0]) == pytest.approx(expected, abs=1e-5)
    assert float(gate.regularizer(w, {"t": t.detach()}, {})) == pytest.approx(math.exp(-0.3) + 1)


def test_dst_opens_a_layer_that_is_all_but_closed() -> None:
    w = torch.rand(10, 20, generator=generator())
    gate = made("dst", w)
    for level, expected in ((0.5, 0.5), (5.0, 0.0)):
        learned = {"t": torch.full((10, 1), level)}
        gate.settle(w, learned, Now(1, 2, 0.5))
        assert bool((learned["t"] == expected).all())


@given(st.integers(0, 50), st.sampled_from(["element", "row", "2:4"]), st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0]))
def test_pdp_is_the_softmax_of_squares_against_the_edge(seed: int, granularity: str, keep: float) -> None:
    w = torch.randn(3, 8, generator=generator(seed), dtype=torch.float64)
    tau, pattern = 0.3, parse(granularity)
    gate = made("pdp", w, granularity, tau=tau)
    fixed = gate.settle(w, {}, Now(1, 2, keep))
    assert gate.weight is not None
    mask = gate.weight(w, {}, fixed, True) / w
    pools = pattern.pool(w.abs())
    for row, m in zip(pools.tolist(), pattern.pool(mask).tolist(), strict=True):
        count = int(keep * len(row) + 0.5)
        ranked = sorted(row, reverse=True)
        if 0 < count < len(row):
            t = (ranked[count - 1] + ranked[count]) / 2
            for x, found in zip(row, m, strict=True):
                a, b = math.exp(x * x / tau), math.exp(t * t / tau)
                assert found == pytest.approx(a / (a + b), rel=1e-6)
            assert sum(v > 0.5 for v in m) == count
        else:
            assert all(v == (count > 0) for v in m)


def test_pdp_trains_through_its_mask() -> None:
    w = torch.randn(2, 6, generator=generator(), dtype=torch.float64)
    gate = made("pdp", w, tau=0.5)
    fixed = gate.settle(w, {}, Now(1, 2, 0.5))

    def value(x: Tensor) -> Tensor:
        assert gate.weight is not None
        return gate.weight(x, {}, fixed, True).square().sum()

    x = w.clone().requires_grad_()
    (found,) = torch.autograd.grad(value(x), x)
    assert torch.allclose(found, slope_of(value, w), atol=1e-6)
    with pytest.raises(RecipeError, match="single weights, not the units of granularity 'block"):
        made("pdp", w, "block(2,2)")


def test_the_step_is_one_where_positive() -> None:
    assert long_tailed_step(torch.tensor([-1.0, 0.0, 1e-9])).tolist() == [0.0, 0.0, 1.0]


# -- drawn gates ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("log_alpha", [-2.0, 0.0, 1.5])
def test_l0_expects_what_is_drawn(log_alpha: float) -> None:
    """The closed form is the probability of a gate that is not zero, by Monte Carlo."""
    n = 200_000
    gate = made("l0", torch.zeros(1, n))
    assert gate.factor is not None and gate.density is not None
    learned = {"log_alpha": torch.full((1, n), log_alpha)}
    fixed = gate.settle(torch.zeros(1, n), learned, Now(1, 2, 1.0, generator(3)))
    drawn = gate.factor(learned, fixed, True)
    share = float((drawn > 0).double().mean())
    p = float(gate.density(torch.zeros(1, n), learned, fixed)[0, 0])
    assert share == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / n))
    assert float(drawn.min()) >= 0 and float(drawn.max()) <= 1 and float((drawn == 1).double().mean()) > 0.01


def test_l0_the_gradient_of_the_expected_count_is_that_of_finite_differences() -> None:
    x = torch.linspace(-3, 3, 7, dtype=torch.float64)
    y = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(open_probability(y, 2 / 3).sum(), y)
    assert torch.allclose(found, slope_of(lambda z: open_probability(z, 2 / 3).sum(), x), atol=1e-7)
    p = open_probability(x, 2 / 3)
    assert torch.allclose(found, p * (1 - p))


def test_l0_is_deterministic_in_evaluation_and_bounded() -> None:
    gate = made("l0", torch.zeros(1, 3))
    learned = {"log_alpha": torch.tensor([[-9.0, 0.0, 9.0]])}
    fixed = gate.settle(torch.zeros(1, 3), learned, Now(1, 2, 1.0, generator()))
    assert torch.allclose(learned["log_alpha"], torch.tensor([[math.log(1e-2), 0.0, math.log(1e2)]]))
    assert gate.factor is not None
    z = [min(1.0, max(0.0, 1.2 / (1 + math.exp(-a)) - 0.1)) for a in (math.log(1e-2), 0.0, math.log(1e2))]
    assert torch.allclose(gate.factor(learned, fixed, False), torch.tensor([z]))
    assert z[0] == 0 and z[2] == 1
    assert gate.final is not None  # what the count wants back is left nearly closed
    assert float(gate.final(torch.zeros(1, 3), learned, fixed, torch.ones(1, 3))[0, 0]) == pytest.approx(1 / 101)


@pytest.mark.parametrize("granularity, units", [("element", 32), ("block(2,4)", 4)])
def test_l0_has_a_gate_for_each_unit(granularity: str, units: int) -> None:
    gate = made("l0", torch.zeros(4, 8), granularity)
    assert gate.learned["log_alpha"].numel() == units
    mean = float(gate.learned["log_alpha"].mean())
    assert mean == pytest.approx(math.log(0.9) - math.log(0.1), abs=0.02)


def test_variational_dropout_has_the_divergence_from_a_log_uniform_prior() -> None:
    """``KL = E log|1 + sqrt(alpha) e| - 0.5 log alpha + c``, integrated; c makes it vanish at infinity."""
    e = torch.linspace(-12, 12, 400_001, dtype=torch.float64)
    density = torch.exp(-e.square() / 2) / math.sqrt(2 * math.pi) * (e[1] - e[0])

    def integrated(log_alpha: float) -> float:
        x = (1 + math.exp(log_alpha / 2) * e).abs().clamp_min(1e-12)
        return float((x.log() * density).sum()) - 0.5 * log_alpha

    limit = integrated(16.0)
    w = torch.ones(1, 1, dtype=torch.float64)
    gate = made("variational-dropout", w)
    assert gate.regularizer is not None
    for log_alpha in (-4.0, -1.0, 0.0, 1.0, 3.0):
        learned = {"log_sigma2": torch.full((1, 1), log_alpha, dtype=torch.float64)}
        assert float(gate.regularizer(w, learned, {})) == pytest.approx(integrated(log_alpha) - limit, abs=0.02)


def test_variational_dropout_adds_noise_of_its_variance_and_drops_above_three() -> None:
    n = 50_000
    w = torch.full((1, n), 2.0)
    gate = made("variational-dropout", w)
    assert gate.weight is not None
    learned = {"log_sigma2": torch.full((1, n), math.log(0.25))}
    fixed = gate.settle(w, learned, Now(1, 2, 1.0, generator()))
    noisy = gate.weight(w, learned, fixed, True)
    assert float(noisy.mean()) == pytest.approx(2.0, abs=0.01) and float(noisy.std()) == pytest.approx(0.5, abs=0.01)
    loud = {"log_sigma2": torch.tensor([[2.9, 3.1]]) + math.log(4.0)}
    assert gate.weight(torch.full((1, 2), 2.0), loud, {}, False).tolist() == [[2.0, 0.0]]
    score = gate.score(torch.tensor([[2.0, 1.0]]), {"log_sigma2": torch.tensor([[0.0, 0.0]])})
    assert bool(score[0, 0] > score[0, 1])


@pytest.mark.parametrize("n, m", [(1, 4), (2, 4), (4, 8)])
def test_gumbel_masks_are_distributions_over_all_candidates(n: int, m: int) -> None:
    options = candidates(n, m)
    assert len(options) == math.comb(m, n) and len({tuple(x) for x in options.tolist()}) == len(options)
    assert bool((options.sum(1) == n).all())
    w = torch.randn(4, 2 * m, generator=generator())
    gate = made("gumbel-nm", w, f"{n}:{m}")
    assert gate.weight is not None and gate.frozen
    learned = {"logits": gate.learned["logits"] * 30}
    for at in (0, 5, 10):
        fixed = gate.settle(w, learned, Now(at, 10, n / m, generator(at)))
        soft = (gate.weight(w, learned, fixed, True) / w).reshape(-1, m)
        assert torch.allclose(soft.sum(1), torch.full((len(soft),), float(n)), atol=1e-4)  # probabilities sum to one
        assert float(soft.min()) >= 0 and float(soft.max()) <= 1 + 1e-5
    hard = (gate.weight(w, learned, fixed, False) / w).reshape(-1, m)
    assert bool(((hard == 0) | (hard == 1)).all()) and bool((hard.sum(1) == n).all())
    assert torch.equal(gate.score(w, learned).reshape(-1, m), hard)
    best = options[learned["logits"].argmax(1)]
    assert torch.equal(hard, best)


def test_gumbel_sharpens_and_starts_from_the_largest_weights() -> None:
    w = torch.randn(64, 4, generator=generator())
    gate = made("gumbel-nm", w, "2:4", prior=20.0)
    top = w.abs().topk(2, 1).indices
    assert bool((gate.score(w, gate.learned).gather(1, top) == 1).all())
    first, last = (gate.settle(w, gate.learned, Now(at, 10, 0.5, generator())) for at in (0, 10))
    assert torch.allclose(first["scale"], torch.tensor([100 / 4, 1 / 4]))
    assert torch.allclose(last["scale"], torch.tensor([500 / 0.05, 1 / 0.05]))
    with pytest.raises(RecipeError, match="write 2:4"):
        made("gumbel-nm", w, "element")


def test_gumbel_draws_follow_the_softmax_of_the_logits() -> None:
    """The largest of logits plus Gumbel noise is a draw from their softmax."""
    n = 40_000
    w = torch.ones(n, 4)
    gate = made("gumbel-nm", w, "1:4", low=1.0, high=1.0, hot=1.0, cold=1.0, prior=0.0)
    learned = {"logits": torch.tensor([0.0, 1.0, -1.0, 0.5]).expand(n, 4).contiguous()}
    fixed = gate.settle(w, learned, Now(0, 10, 0.25, generator()))
    assert gate.weight is not None
    drawn = gate.weight(w, learned, fixed, True).argmax(1)
    share = torch.bincount(drawn, minlength=4) / n
    assert torch.allclose(share, learned["logits"][0].softmax(0), atol=0.012)


# -- scores -----------------------------------------------------------------------------------------------------


def test_continuous_sparsification_hardens_into_a_step() -> None:
    gate = made("continuous-sparsification", torch.zeros(1, 4), start=0.1)
    scale = 1 + math.exp(-0.1)
    learned = {"s": torch.tensor([[-0.5, -0.1, 0.2, 0.5]])}
    assert gate.factor is not None and gate.regularizer is not None
    for at, beta in ((0, 1.0), (5, math.sqrt(200)), (10, 200.0), (20, 200.0)):
        fixed = gate.settle(torch.zeros(1, 4), learned, Now(at, 10, 1.0))
        expected = torch.sigmoid(beta * learned["s"])
        assert torch.allclose(gate.factor(learned, fixed, True), scale * expected)
        assert torch.allclose(gate.regularizer(torch.zeros(1, 4), learned, fixed), expected.sum())
    assert torch.allclose(gate.factor(learned, fixed, False), scale * torch.tensor([[0.0, 0.0, 1.0, 1.0]]), atol=1e-6)
    fixed = gate.settle(torch.zeros(1, 4), gate.learned, Now(0, 10, 1.0))
    assert torch.allclose(gate.factor(gate.learned, fixed, True), torch.ones(1, 4))


@given(st.integers(0, 30), st.sampled_from(["element", "row", "2:4", "block(1,2)"]))
def test_edge_popup_keeps_the_best_scores(seed: int, granularity: str) -> None:
    """Against exhaustion: no other choice of as many units has a larger sum of scores."""
    w, keep, pattern = torch.ones(2, 4), 0.5, parse(granularity)
    gate = made("edge-popup", w, granularity)
    shape = gate.learned["s"].shape
    learned = {"s": torch.randn(shape, generator=generator(seed))}
    fixed = gate.settle(w, learned, Now(1, 2, keep))
    assert gate.factor is not None and gate.frozen
    mask = gate.factor(learned, fixed, True)
    for row, kept in zip(learned["s"].abs().tolist(), mask.tolist(), strict=True):
        count = int(keep * len(row) + 0.5)
        best = max(itertools.combinations(range(len(row)), count), key=lambda c: sum(row[k] for k in c))
        assert {k for k, v in enumerate(kept) if v == 1} == set(best) and set(kept) <= {0.0, 1.0}
    assert pattern.unpool(mask, (2, 4)).shape == (2, 4)


def test_edge_popup_has_the_straight_through_gradient() -> None:
    w = torch.randn(1, 6, generator=generator())
    gate = made("edge-popup", w)
    s = torch.randn(1, 6, generator=generator(1)).requires_grad_()
    fixed = gate.settle(w, {"s": s.detach()}, Now(1, 2, 0.5))
    assert gate.factor is not None
    c = torch.randn(1, 6, generator=generator(2))
    (found,) = torch.autograd.grad((w * gate.factor({"s": s}, fixed, True) * c).sum(), s)
    assert torch.allclose(found, c * w * s.detach().sign())
