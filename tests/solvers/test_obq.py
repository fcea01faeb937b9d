"""OBQ against its definition, against exhaustive search, and against doing one after the other."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from secateur.errors import RecipeError
from secateur.formats.grid import Grid
from secateur.granularity import parse
from secateur.layers import find_layers
from secateur.recipe import Recipe
from secateur.solvers import Curvature, obc, obq, output_error, sparsegpt_gptq


def layer(seed: int, rows: int, columns: int) -> tuple[Tensor, Curvature]:
    """A layer whose inputs are correlated."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(8 * columns, columns, generator=rng) @ (
        torch.randn(columns, columns, generator=rng) + 0.5 * torch.eye(columns)
    )
    return torch.randn(rows, columns, generator=rng), Curvature(x.t() @ x)


def lost(weight: Tensor, found: Tensor, curvature: Curvature) -> float:
    change = weight.double() - found.double()
    return float((change @ curvature.gram.double() * change).sum())


def by_definition(dense: Tensor, kept: list[int], gram: Tensor, of: Grid) -> Tensor:
    """Each time the weight is fixed at its nearest value that costs least when all others are refitted; one row."""
    h, w0 = gram.double(), dense.double()
    fixed: dict[int, float] = {}

    def refit(held: dict[int, float]) -> Tensor:
        free = [k for k in kept if k not in held]
        x = torch.zeros_like(w0)
        for k, v in held.items():
            x[k] = v
        if free:
            x[free] = torch.linalg.solve(h[free][:, free], h[free] @ (w0 - x))
        return x

    for _ in kept:
        x = refit(fixed)
        q = of.round(x[None].float())[0].double()
        half = float(of.scale) / 2
        free = [k for k in kept if k not in fixed]
        out = [k for k in free if abs(x[k] - q[k]) > half * (1 + 1e-6)]
        if out:
            p = max(out, key=lambda k: abs(x[k] - q[k]))
        else:
            cost = {}
            for k in free:
                y = refit({**fixed, k: float(q[k])}) - w0
                cost[k] = float(y @ h @ y)
            p = min(free, key=cost.__getitem__)
        fixed[p] = float(q[p])
    return refit(fixed)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("clip", ["absmax", "mse"])
def test_without_moves_it_is_the_greedy_of_the_paper(seed: int, clip: str) -> None:
    weight, curvature = layer(seed, 3, 8)
    made = obq(weight, curvature, 0.625, parse("element"), bits=3, clip=clip, damp=0.0, moves=0, chunk=2)
    assert torch.equal(made.mask, obc(weight, curvature, 0.625, parse("element"), damp=0.0).mask)
    assert isinstance(made.grid, Grid)
    for r in range(3):
        of = Grid(3, 8, made.grid.scale[r : r + 1])
        expected = by_definition(weight[r], made.mask[r].nonzero()[:, 0].tolist(), curvature.gram, of)
        torch.testing.assert_close(made.weight[r].double(), expected, rtol=1e-5, atol=1e-5)


def optimum(weight: Tensor, curvature: Curvature, of: Grid, count: int) -> float:
    """The least error over all masks and all values of the grid, row by row."""
    half = 1 << (of.bits - 1)
    n = weight.shape[1]
    codes = torch.tensor(list(itertools.product(range(-half, half), repeat=n)), dtype=torch.int8)
    total = 0.0
    for r, row in enumerate(weight):
        values = Grid(of.bits, n, of.scale[r : r + 1].expand(len(codes), 1)).values(codes)
        values = values[values.count_nonzero(1) <= count].double()
        change = values - row.double()
        total += float((change @ curvature.gram.double() * change).sum(1).min())
    return total


def test_against_the_exhaustive_optimum() -> None:
    """All masks and all values: never below it, on most tiny rows equal to it, and nearer than one after the other."""
    joint_ratios, after_ratios = [], []
    for seed in range(20):
        weight, curvature = layer(seed, 1, 5)
        kw = {"bits": 2, "damp": 1e-6}
        joint = obq(weight, curvature, 0.6, parse("row"), **kw)
        after = obq(weight, curvature, 0.6, parse("row"), moves=0, **kw)
        assert isinstance(joint.grid, Grid) and isinstance(after.grid, Grid)
        assert torch.equal(joint.grid.scale, after.grid.scale)
        least = optimum(weight, curvature, joint.grid, 3)
        mine, one_by_one = lost(weight, joint.weight, curvature), lost(weight, after.weight, curvature)
        assert least <= mine * (1 + 1e-6) and mine <= one_by_one * (1 + 1e-9)
        joint_ratios.append(mine / least)
        after_ratios.append(one_by_one / least)
    joint_hits, after_hits = (sum(x <= 1 + 1e-6 for x in found) for found in (joint_ratios, after_ratios))
    assert joint_hits >= 16 and after_hits <= 12, (joint_hits, after_hits)
    assert sum(joint_ratios) < 0.9 * sum(after_ratios)


@given(
    st.integers(0, 2**20), st.sampled_from(["element", "row", "2:4"]), st.sampled_from([0, 4]), st.integers(2, 4),
    st.booleans(),
)  # fmt: skip
@settings(max_examples=20)
def test_never_worse_than_one_after_the_other(seed: int, pattern: str, group: int, bits: int, symmetric: bool) -> None:
    weight, curvature = layer(seed, 4, 12)
    cut = parse(pattern)
    joint, after = (
        obq(weight, curvature, 0.5, cut, bits=bits, group=group, symmetric=symmetric, moves=m) for m in (64, 0)
    )
    assert lost(weight, joint.weight, curvature) <= lost(weight, after.weight, curvature) * (1 + 1e-6)
    for made in (joint, after):
        assert int(made.mask.sum()) == 24 and not bool(made.weight[~made.mask].any())
        assert made.grid is not None and torch.equal(made.grid.round(made.weight), made.weight)
        if pattern == "2:4":
            assert bool((made.mask.reshape(4, 3, 4).sum(2) == 2).all())


@pytest.mark.parametrize("bits", [2, 3])
def test_lower_error_than_the_sweep(bits: int) -> None:
    weight, curvature = layer(3, 8, 32)
    slow = obq(weight, curvature, 0.5, parse("row"), bits=bits)
    fast = sparsegpt_gptq(weight, curvature, 0.5, parse("row"), bits=bits, group=0)
    assert output_error(weight, slow.weight, curvature.gram) < output_error(weight, fast.weight, curvature.gram)


def test_dead_inputs_and_what_is_too_large() -> None:
    weight, curvature = layer(5, 3, 8)
    gram = curvature.gram.clone()
    gram[2], gram[:, 2] = 0, 0
    made = obq(weight, Curvature(gram), 0.5, parse("row"))
    assert not bool(made.weight[:, 2].any())
    with pytest.raises(RecipeError, match="is not a divisor of the 8 inputs"):
        obq(weight, curvature, 0.5, parse("row"), group=3)
    for moves in (-1, 1.5, True):
        recipe = Recipe.of("magnitude", criterion=None, solver="obq", sparsity=0.5, knobs={"solver": {"moves": moves}})
        with pytest.raises(RecipeError, match="moves is how many a row may take"):
            recipe.check(find_layers(nn.Linear(8, 3), only=("*",))[0])
    with pytest.raises(RecipeError, match="raise max_flops"):
        obq(weight, curvature, 0.5, parse("row"), max_flops=10)
