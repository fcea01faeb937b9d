"""OBC against closed forms and exhaustive search."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

import pytest
import torch
from torch import Tensor

from secateur.errors import RecipeError
from secateur.granularity import parse
from secateur.select import select
from secateur.solvers import Curvature, admm, least_squares, obc, output_error, sparsegpt

Make = Callable[..., tuple[Tensor, Tensor]]


def best_fit(w: Tensor, gram: Tensor, kept: list[int]) -> Tensor:
    """The exact least-squares row with that support, float64."""
    h, w = gram.double(), w.double()
    x = torch.zeros_like(w)
    if kept:
        x[kept] = torch.linalg.solve(h[kept][:, kept], (h @ w)[kept])
    return x


def lost(w: Tensor, x: Tensor, gram: Tensor) -> float:
    change = w.double() - x.double()
    return float((change @ gram.double() * change).sum())


def slow_greedy(weight: Tensor, gram: Tensor, removals: int) -> Tensor:
    """Each time remove the weight of any row whose removal raises the refitted error least; the mask."""
    mask = torch.ones_like(weight, dtype=torch.bool)

    def error(r: int, kept: Tensor) -> float:
        return lost(weight[r], best_fit(weight[r], gram, kept.nonzero()[:, 0].tolist()), gram)

    for _ in range(removals):
        options = []
        for r, p in mask.nonzero().tolist():
            rest = mask[r].clone()
            rest[p] = False
            options.append((error(r, rest) - error(r, mask[r]), r, p))
        _, r, p = min(options)
        mask[r, p] = False
    return mask


def optimum(w: Tensor, gram: Tensor, count: int) -> float:
    fits = (best_fit(w, gram, list(kept)) for kept in combinations(range(len(w)), count))
    return min(lost(w, x, gram) for x in fits)


def test_one_removal_is_the_closed_form(layer: Make) -> None:
    weight, x = layer(1, 6, seed=1)
    gram = x.t() @ x
    inverse = torch.linalg.inv(gram.double())
    w = weight[0].double()
    cost = w**2 / inverse.diagonal()
    p = int(cost.argmin())
    solved = obc(weight, Curvature(gram), 5 / 6, parse("row"), damp=0.0)
    expected = w - w[p] / inverse[p, p] * inverse[:, p]
    assert solved.mask[0].logical_not().nonzero().tolist() == [[p]]
    torch.testing.assert_close(solved.weight[0].double(), expected, rtol=1e-4, atol=1e-5)
    assert lost(weight[0], solved.weight[0], gram) == pytest.approx(float(cost[p]), rel=1e-3)


@pytest.mark.parametrize("seed", range(8))
def test_no_solver_beats_exhaustive_search(seed: int, layer: Make) -> None:
    weight, x = layer(1, 6, seed=seed)
    gram = x.t() @ x
    least = optimum(weight[0], gram, 3)
    greedy = lost(weight[0], obc(weight, Curvature(gram), 0.5, parse("row"), damp=0.0).weight[0], gram)
    slow = slow_greedy(weight, gram, 3)[0].nonzero()[:, 0].tolist()
    assert greedy == pytest.approx(lost(weight[0], best_fit(weight[0], gram, slow), gram), rel=1e-3)
    assert least <= greedy * (1 + 1e-4)
    for other in (
        admm(weight, Curvature(gram), 0.5, parse("row"), damp=0.0),
        sparsegpt(weight, Curvature(gram), 0.5, parse("row"), damp=0.0),
        least_squares(weight, weight.abs(), Curvature(gram), 0.5, parse("row")),
    ):
        assert least <= lost(weight[0], other.weight[0], gram) * (1 + 1e-4)


@pytest.mark.parametrize("granularity", ["element", "row", "2:4"])
def test_greedy_is_exact_on_orthogonal_inputs(granularity: str) -> None:
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 8, generator=g)
    power = torch.rand(8, generator=g) + 0.1
    parsed = parse(granularity)
    solved = obc(weight, Curvature(power.diag()), 0.5, parsed, damp=0.0)
    score = parsed.pool(weight.square() * power)
    assert torch.equal(solved.mask, parsed.unpool(select(score, 0.5), (5, 8)))
    torch.testing.assert_close(solved.weight, weight * solved.mask, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("granularity", ["element", "row", "2:4"])
def test_survivors_are_the_exact_fit_of_their_mask(granularity: str, layer: Make) -> None:
    weight, x = layer(7, 12, seed=5)
    gram = x.t() @ x
    solved = obc(weight, Curvature(gram), 0.5, parse(granularity), damp=0.0, chunk=3)
    for w, found, mask in zip(weight, solved.weight, solved.mask, strict=True):
        expected = best_fit(w, gram, mask.nonzero()[:, 0].tolist())
        torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)


def test_rows_compete_as_in_a_slow_greedy(layer: Make) -> None:
    """Algorithm 2: at each step the row whose next removal is cheapest loses one weight."""
    weight, x = layer(3, 6, seed=7)
    gram = x.t() @ x
    mask = slow_greedy(weight, gram, 9)
    assert not torch.equal(mask.sum(1), torch.full((3,), 3))
    assert torch.equal(obc(weight, Curvature(gram), 0.5, parse("element"), damp=0.0).mask, mask)


@pytest.mark.parametrize("granularity", ["element", "row", "2:4"])
def test_lower_error_than_sparsegpt(granularity: str, layer: Make) -> None:
    weight, x = layer(16, 48, seed=2)
    gram = x.t() @ x
    exact, swept = (f(weight, Curvature(gram), 0.5, parse(granularity)) for f in (obc, sparsegpt))
    assert output_error(weight, exact.weight, gram) < output_error(weight, swept.weight, gram)


def test_refuses_what_is_too_large_and_says_what_to_do() -> None:
    with pytest.raises(RecipeError, match="sparsegpt"):
        obc(torch.ones(4096, 4096), Curvature(torch.ones(1, 1).expand(4096, 4096)), 0.5, parse("row"))
