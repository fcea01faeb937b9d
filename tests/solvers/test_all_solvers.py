"""What holds for every solver."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import secateur.solvers  # noqa: F401
from secateur.errors import NumericalError, RecipeError
from secateur.granularity import parse
from secateur.registry import get, parts
from secateur.solvers import Curvature, Solved, admm, least_squares, obc, output_error, rank, sparsegpt

NAMES = ("rank", "sparsegpt", "obc", "least-squares", "admm", "dsnot")
SINGLE = ("obc", "dsnot")  # refuse blocks
WITH_HESSIAN = ("sparsegpt", "obc", "least-squares", "admm")


def facts(weight: Tensor, x: Tensor, keep: float, granularity: str) -> dict[str, Any]:
    gram = x.t() @ x
    return {
        "weight": weight,
        "score": weight.abs() * gram.diagonal().sqrt(),
        "curvature": Curvature(gram, "test"),
        "keep": keep,
        "granularity": parse(granularity),
        "input_mean": x.mean(0),
        "input_var": x.var(0, correction=0),
        "input_norm": gram.diagonal().sqrt(),
        "tokens": x.shape[0],
        "mask": torch.ones(weight.shape, dtype=torch.bool),
    }


def solve(name: str, weight: Tensor, x: Tensor, keep: float, granularity: str, **knobs: Any) -> Solved:
    result = get("solver", name)(facts(weight, x, keep, granularity), **knobs)
    assert isinstance(result, Solved)
    return result


def random_layer(o: int, i: int, seed: int, tokens: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(o, i, generator=g), torch.randn(tokens or 4 * i, i, generator=g) @ torch.randn(i, i, generator=g)


def test_all_are_registered_with_cards() -> None:
    assert set(NAMES) <= set(parts("solver"))
    for name in NAMES:
        card = get("solver", name).card
        assert card.summary
        assert card.choose.startswith("Choose it")
        assert card.source


@settings(max_examples=120, deadline=None)
@given(
    name=st.sampled_from(NAMES),
    granularity=st.sampled_from(("element", "row", "2:4", "1:4", "3:4", "4:4", "block(2,4)", "block(4,2)")),
    keep=st.floats(0.0, 1.0),
    o=st.integers(1, 3),
    i=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_keeps_exactly_its_count(name: str, granularity: str, keep: float, o: int, i: int, seed: int) -> None:
    parsed = parse(granularity)
    keep = keep if parsed.keep is None else parsed.keep
    weight, x = random_layer(4 * o, 4 * i, seed)
    if granularity.startswith("block") and name in SINGLE:
        with pytest.raises(RecipeError, match="sparsegpt"):
            solve(name, weight, x, keep, granularity)
        return
    solved = solve(name, weight, x, keep, granularity)
    assert int(solved.mask.sum()) == parsed.kept((4 * o, 4 * i), keep)
    assert (solved.weight[~solved.mask] == 0).all()
    units = parsed.split(solved.mask.float())
    assert ((units == 0) | (units == 1)).all()
    assert (units == units[..., :1]).all()
    if parsed.keep is not None or granularity == "row":
        assert parsed.pool(solved.mask.float()).sum(1).unique().numel() == 1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("granularity", ["element", "row", "2:4"])
def test_leaves_its_inputs_alone_and_returns_float32(name: str, granularity: str) -> None:
    weight, x = random_layer(6, 16, 1)
    x[:, 3] = 0
    given_facts = facts(weight, x, 0.5, granularity)
    curvature = given_facts["curvature"]
    before = {k: v.clone() for k, v in given_facts.items() if isinstance(v, Tensor)}
    gram = curvature.gram.clone()
    solved = get("solver", name)(given_facts)
    assert solved.weight.dtype == torch.float32
    assert solved.mask.dtype == torch.bool
    assert solved.weight.shape == weight.shape == solved.mask.shape
    assert all(torch.equal(given_facts[k], v) for k, v in before.items())
    assert torch.equal(curvature.gram, gram)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("granularity", ["element", "row"])
def test_dead_inputs_go_first(name: str, granularity: str) -> None:
    weight, x = random_layer(6, 16, 2)
    x[:, [1, 5, 6]] = 0
    solved = solve(name, weight, x, 0.5, granularity)
    assert torch.isfinite(solved.weight).all()
    assert not solved.mask[:, [1, 5, 6]].any()


@pytest.mark.parametrize("name", NAMES)
def test_a_layer_whose_inputs_are_all_dead(name: str) -> None:
    weight, x = random_layer(4, 8, 3)
    solved = solve(name, weight, x * 0, 0.5, "row")
    assert torch.isfinite(solved.weight).all()
    assert (solved.mask.sum(1) == 4).all()


@pytest.mark.parametrize("name", WITH_HESSIAN)
def test_fewer_tokens_than_inputs(name: str) -> None:
    weight, x = random_layer(6, 32, 4, tokens=12)
    solved = solve(name, weight, x, 0.5, "row")
    assert torch.isfinite(solved.weight).all()
    assert output_error(weight, solved.weight, x.t() @ x) <= 1.0


@pytest.mark.parametrize("solver", [sparsegpt, obc, admm])
def test_damping_that_had_to_grow_is_noted(solver: Any) -> None:
    weight, x = random_layer(4, 16, 5, tokens=6)
    gram = x.t() @ x
    gram -= 0.03 * gram.diagonal().mean() * torch.eye(16)  # not positive definite at 0.01
    notes = solver(weight, Curvature(gram), 0.5, parse("row"), damp=0.01).notes
    assert any("damping 0.01; solved with 0.1" in note for note in notes)


@pytest.mark.parametrize("solver", [sparsegpt, obc, admm])
def test_an_indefinite_matrix_is_an_error(solver: Any) -> None:
    weight, x = random_layer(4, 16, 6)
    gram = x.t() @ x
    gram[0, 1] = gram[1, 0] = 50 * gram.diagonal().max()
    with pytest.raises(NumericalError, match="not positive definite"):
        solver(weight, Curvature(gram, "layer.0"), 0.5, parse("row"))


def test_a_gram_matrix_that_is_not_finite_is_an_error() -> None:
    gram = torch.eye(4)
    gram[0, 1] = float("nan")
    with pytest.raises(NumericalError, match=r"layer\.0"):
        Curvature(gram, "layer.0")


@pytest.mark.parametrize("granularity", ["element", "row", "2:4", "block(4,4)"])
@pytest.mark.parametrize("seed", range(3))
def test_law_13_output_error(granularity: str, seed: int) -> None:
    """For one mask: least squares <= sparsegpt <= rank. And what chooses its mask better wins."""
    weight, x = random_layer(24, 32, seed, tokens=512)
    gram, parsed = x.t() @ x, parse(granularity)
    curvature = Curvature(gram)
    swept = sparsegpt(weight, curvature, 0.5, parsed)
    # A score that ranks like the mask makes the other solvers take the same one.
    ranked = rank(weight, swept.mask.float(), 0.5, parsed)
    fitted = least_squares(weight, swept.mask.float(), curvature, 0.5, parsed, iterations=200, tol=1e-7)
    assert torch.equal(ranked.mask, swept.mask)
    assert torch.equal(fitted.mask, swept.mask)
    best, middle, worst = (output_error(weight, s.weight, gram) for s in (fitted, swept, ranked))
    assert best <= middle * (1 + 1e-5)
    assert middle <= worst
    assert output_error(weight, admm(weight, curvature, 0.5, parsed).weight, gram) <= middle
