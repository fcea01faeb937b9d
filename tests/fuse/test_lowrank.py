"""Low rank: errors are their closed form, no other choice is better, and ranks are what one budget allows."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from secateur.errors import RecipeError
from secateur.fuse.lowrank import Options, asvd, factors, low_rank, principal, svd
from secateur.fuse.ranks import Curve, greedy


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def lost(weight: Tensor, other: Tensor, x: Tensor) -> float:
    """Squared error of the outputs over their square."""
    return float((x @ (weight - other).T).square().sum() / (x @ weight.T).square().sum())


def product(options: Options, option: int) -> Tensor:
    down, up = options.make(option).tensors
    return up @ down


def case(o: int, i: int, n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight and correlated inputs, some features of which are large."""
    scale = torch.logspace(0, 2, i, dtype=torch.float64)
    return drawn(o, i, seed=seed), drawn(n, i, seed=seed + 1) @ drawn(i, i, seed=seed + 2) * scale


@settings(max_examples=25, deadline=None)
@given(o=st.integers(2, 9), i=st.integers(2, 9), n=st.integers(1, 20), seed=st.integers(0, 99))
def test_whitened_error_is_its_closed_form(o: int, i: int, n: int, seed: int) -> None:
    """The sum of the squared singular values of W S that are cut, S S^T = X^T X, also where X^T X is singular."""
    w, x = case(o, i, n, seed)
    values = torch.linalg.svdvals(x @ w.T).square()  # those of W S, whatever S is
    options = low_rank(w, x.T @ x)
    plain = svd(w)
    for k, error in enumerate(options.curve.errors):
        wanted = float(values[k + 1 :].sum() / values.sum())
        assert error == pytest.approx(wanted, abs=1e-9)
        assert lost(w, product(options, k), x) == pytest.approx(wanted, abs=1e-9)
        assert options.make(k).error == pytest.approx(wanted**0.5, abs=1e-4)
        assert wanted <= lost(w, product(plain, k), x) + 1e-9
    whole = torch.linalg.svdvals(w).square()
    assert plain.curve.errors == pytest.approx(
        [float(whole[k + 1 :].sum() / whole.sum()) for k in range(len(plain.curve.errors))]
    )


def test_projection_is_the_truncated_whitened_decomposition() -> None:
    """The same matrix as Cholesky, truncation and the inverse give, which is how the paper's code computes it."""
    w, x = case(6, 5, 40)
    s = torch.linalg.cholesky(x.T @ x)
    u, values, v = torch.linalg.svd(w @ s, full_matrices=False)
    wanted = u[:, :2] * values[:2] @ v[:2] @ torch.linalg.inv(s)
    down, up = factors(w, principal(w, x.T @ x)[0], 2)
    assert torch.allclose(up @ down, wanted)
    assert torch.allclose(down.norm(dim=1), up.norm(dim=0))


def test_no_other_rank_one_matrix_is_better() -> None:
    """Brute force over directions of a plane: for each, the best other factor is a least-squares problem."""
    w, x = case(2, 3, 12)
    found = float(low_rank(w, x.T @ x).curve.errors[0])
    angles = torch.linspace(0, torch.pi, 2_001, dtype=torch.float64)
    best = min(
        float((x @ w.T).sub(torch.outer(x @ w.T @ u, u)).square().sum())
        for u in torch.stack([angles.cos(), angles.sin()], 1)
    )
    best /= float((x @ w.T).square().sum())
    assert found <= best + 1e-12
    assert found == pytest.approx(best, rel=1e-2)


def test_asvd_scales_inputs() -> None:
    w, x = case(5, 7, 30)
    size = x.abs().mean(0)
    s = size.sqrt()
    u, values, v = torch.linalg.svd(w * s, full_matrices=False)
    wanted = (u[:, :2] * values[:2] @ v[:2]) / s
    assert torch.allclose(product(asvd(w, size), 1), wanted)
    assert torch.allclose(product(asvd(w, size, alpha=0.0), 1), product(svd(w), 1))
    assert lost(w, product(low_rank(w, x.T @ x), 1), x) < lost(w, wanted, x) < lost(w, product(svd(w), 1), x)


def test_ranks_that_save_something() -> None:
    options = svd(drawn(12, 8))
    assert options.curve.sizes.tolist() == [20.0, 40.0, 60.0, 80.0]  # 5 ranks have 100 values, the layer 96
    assert options.make(3).facts == {"kind": "low-rank", "ranks": [4]}


def curves(seed: int) -> dict[str, Curve]:
    made = {}
    for k, (o, i) in enumerate([(6, 9), (10, 5)]):
        found = svd(drawn(o, i, seed=seed + k)).curve
        made[f"layer{k}"] = Curve(np.append(found.sizes, o * i), np.append(found.errors, 0.0))
    return made


def exhaustive(curves: dict[str, Curve], budget: float) -> float:
    return min(
        sum(float(c.errors[k]) for c, k in zip(curves.values(), choice, strict=True))
        for choice in itertools.product(*[range(len(c.sizes)) for c in curves.values()])
        if sum(c.sizes[k] for c, k in zip(curves.values(), choice, strict=True)) <= budget
    )


@pytest.mark.parametrize("seed", range(3))
def test_greedy_against_all_choices(seed: int) -> None:
    """Never over the budget, never an improvement left; the optimum wherever a step along the hulls ends."""
    layers = curves(seed)
    least, most = (sum(float(c.sizes[k]) for c in layers.values()) for k in (0, -1))
    vertices = 0
    for budget in np.arange(least, most + 1):
        chosen = greedy(layers, budget)
        size = sum(float(layers[n].sizes[k]) for n, k in chosen.items())
        error = sum(float(layers[n].errors[k]) for n, k in chosen.items())
        best = exhaustive(layers, budget)
        assert size <= budget
        assert best - 1e-12 <= error
        widest = max(float(np.diff(c.sizes[c.corners()]).max()) for c in layers.values())
        if budget - widest >= least:  # a step of the hull lies between the two
            assert error <= exhaustive(layers, budget - widest) + 1e-12
        for name, k in chosen.items():
            more = [
                j
                for j in range(k + 1, len(layers[name].sizes))
                if layers[name].sizes[j] <= layers[name].sizes[k] + budget - size
            ]
            assert all(layers[name].errors[j] >= layers[name].errors[k] for j in more)
        on_hull = all(k in layers[n].corners() for n, k in chosen.items())
        slopes = _slopes(layers, chosen)
        if on_hull and size == budget and slopes[0] >= slopes[1]:
            vertices += 1
            assert error == pytest.approx(best)
    assert vertices >= 3


def _slopes(layers: dict[str, Curve], chosen: dict[str, int]) -> tuple[float, float]:
    """The flattest step taken, and the steepest that was not."""
    taken, left = [np.inf], [0.0]
    for name, k in chosen.items():
        curve, path = layers[name], layers[name].corners()
        for a, b in itertools.pairwise(path):
            slope = (curve.errors[a] - curve.errors[b]) / (curve.sizes[b] - curve.sizes[a])
            (taken if b <= k else left).append(float(slope))
    return min(taken), max(left)


def test_smallest_ranks_over_budget() -> None:
    with pytest.raises(RecipeError, match="the smallest ranks take 30 of a budget of 29"):
        greedy(curves(0), 29)
