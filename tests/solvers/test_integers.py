"""Pruning and quantization in one sweep: against brute force, against doing one after the other, and its limits."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from secateur import granularity
from secateur.errors import RecipeError
from secateur.formats.grid import grid
from secateur.recipe import Recipe
from secateur.registry import get
from secateur.solvers import Curvature, gptq, output_error, round_to_nearest, sparsegpt, sparsegpt_gptq


def layer(seed: int, rows: int = 16, columns: int = 64, tokens: int = 128) -> tuple[Tensor, Curvature]:
    """A layer whose inputs are correlated, as activations are."""
    rng = torch.Generator().manual_seed(seed)
    mixed = torch.randn(columns, columns, generator=rng) / columns**0.5 + 0.5 * torch.eye(columns)
    x = torch.randn(tokens, columns, generator=rng) @ mixed
    return torch.randn(rows, columns, generator=rng), Curvature(x.t() @ x)


@pytest.mark.parametrize("pattern", ["element", "row", "2:4", "block(4,4)"])
def test_many_bits_are_sparsegpt(pattern: str) -> None:
    weight, curvature = layer(1, 16, 96)
    cut = granularity.parse(pattern)
    dense = sparsegpt(weight, curvature, 0.5, cut, block=32)
    fine = sparsegpt_gptq(weight, curvature, 0.5, cut, bits=16, group=16, clip="absmax", block=32)
    assert torch.equal(fine.mask, dense.mask)
    assert torch.allclose(fine.weight, dense.weight, atol=2e-3)


def plain_loop(weight: Tensor, kept: Tensor, upper: Tensor, group: int, symmetric: bool) -> Tensor:
    """GPTQ with a mask in float64, column by column, nothing deferred; grids as pruning alone would need them."""
    w, whole = weight.double().clone(), None
    for j in range(w.shape[1]):
        if j % group == 0:
            ahead = w.clone()
            for k in range(j, j + group):
                ahead[:, k + 1 :] -= (ahead[:, k] * ~kept[:, k] / upper[k, k])[:, None] * upper[k, k + 1 :]
            part = slice(j, j + group)
            whole = grid(ahead[:, part].float(), 4, 0, symmetric=symmetric, mask=kept[:, part])
        assert whole is not None
        q = whole.column((w[:, j] * kept[:, j]).float(), 0).double()
        w[:, j + 1 :] -= ((w[:, j] - q) / upper[j, j])[:, None] * upper[j, j + 1 :]
        w[:, j] = q
    return w.float()


@pytest.mark.parametrize(("group", "block"), [(16, 128), (16, 40), (0, 32), (64, 16)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_against_the_plain_loop(group: int, block: int, symmetric: bool, rng: torch.Generator) -> None:
    weight, curvature = layer(2, 5, 64)
    score = torch.rand(weight.shape, generator=rng)
    cut = granularity.parse("element")
    found = gptq(weight, score, curvature, 0.6, cut, group=group, symmetric=symmetric, block=block)
    expected = plain_loop(weight, found.mask, curvature.inverse_factor(0.01).double(), group or 64, symmetric)
    assert torch.allclose(found.weight, expected, atol=1e-4)
    assert found.grid is not None and torch.equal(found.grid.round(found.weight), found.weight)


@pytest.mark.parametrize("pattern", ["element", "row"])
def test_within_a_block_joint_is_one_after_the_other(pattern: str) -> None:
    """The sweep is linear: where the mask is chosen before anything is rounded, the order does not matter."""
    weight, curvature = layer(6)
    cut = granularity.parse(pattern)
    joint = sparsegpt_gptq(weight, curvature, 0.5, cut, group=16)
    pruned = sparsegpt(weight, curvature, 0.5, cut)
    after = gptq(pruned.weight, pruned.weight.abs(), curvature, 0.5, cut, group=16)
    assert torch.equal(joint.mask, after.mask) and torch.allclose(joint.weight, after.weight, atol=1e-4)
    later = sparsegpt_gptq(weight, curvature, 0.5, cut, group=16, bits=2, block=16)
    assert not torch.equal(later.mask, sparsegpt(weight, curvature, 0.5, cut, block=16).mask), "masks see the rounding"


@pytest.mark.parametrize("seed", range(4))
def test_near_the_exhaustive_optimum(seed: int) -> None:
    """On a row of four weights with two bits: all masks and all codes of the grid that the solver found."""
    weight, curvature = layer(seed, 1, 4, 16)
    found = sparsegpt_gptq(weight, curvature, 0.5, granularity.parse("row"), bits=2, group=0, damp=1e-6)
    assert found.grid is not None
    best = torch.inf
    for codes in itertools.product(range(-2, 2), repeat=4):
        candidate = found.grid.values(torch.tensor([codes], dtype=torch.int8))
        if int(candidate.count_nonzero()) <= 2:
            best = min(best, output_error(weight, candidate, curvature.gram))
    mine = output_error(weight, found.weight, curvature.gram)
    assert best <= mine * (1 + 1e-5)
    assert mine <= 3 * best + 1e-6


@pytest.mark.parametrize("pattern", ["element", "2:4"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_order_of_things(pattern: str, bits: int) -> None:
    """Joint is not worse than prune, then round, and GPTQ on the pruned weights lies between.

    With blocks of 16 columns, so that most masks are chosen when some columns are integers already.
    """
    cut = granularity.parse(pattern)
    errors: list[tuple[float, float, float]] = []
    for seed in range(5):
        weight, curvature = layer(seed)
        joint = sparsegpt_gptq(weight, curvature, 0.5, cut, bits=bits, group=16, block=16)
        pruned = sparsegpt(weight, curvature, 0.5, cut, block=16)
        rounded = grid(pruned.weight, bits, 16, mask=pruned.mask).round(pruned.weight)
        after = gptq(pruned.weight, pruned.weight.abs(), curvature, 0.5, cut, bits=bits, group=16)
        assert torch.equal(after.mask, pruned.mask), "what is sparse already stays as it is"
        made = [output_error(weight, w, curvature.gram) for w in (joint.weight, after.weight, rounded)]
        assert made[0] <= made[2] * 1.01
        errors.append((made[0], made[1], made[2]))
    joint_mean, after_mean, rounded_mean = torch.tensor(errors).mean(0).tolist()
    assert joint_mean <= min(after_mean, rounded_mean)
    if bits < 4:  # at 4 bits rounding costs so little beside pruning half that the two orders differ by chance
        assert after_mean < rounded_mean


def test_masks_and_codes_are_exact() -> None:
    weight, curvature = layer(3)
    for made in (
        sparsegpt_gptq(weight, curvature, 0.5, granularity.parse("2:4")),
        gptq(weight, weight.abs(), curvature, 0.25, granularity.parse("row"), symmetric=False),
        round_to_nearest(weight, weight.abs(), 0.5, granularity.parse("element"), bits=8, group=0),
    ):
        assert made.grid is not None and bool((made.weight[~made.mask] == 0).all())
        assert torch.equal(made.grid.round(made.weight), made.weight)
    assert int(sparsegpt_gptq(weight, curvature, 0.5, granularity.parse("2:4")).mask.reshape(-1, 4).sum(1).max()) == 2


def test_without_sparsity_it_is_gptq() -> None:
    weight, curvature = layer(4)
    a = sparsegpt_gptq(weight, curvature, 1.0, granularity.parse("element"), bits=3, group=16)
    b = gptq(weight, weight.abs(), curvature, 1.0, granularity.parse("element"), bits=3, group=16)
    assert torch.equal(a.weight, b.weight) and bool(a.mask.all())
    nearest = grid(weight, 3, 16).round(weight)
    assert output_error(weight, a.weight, curvature.gram) < 0.8 * output_error(weight, nearest, curvature.gram)


def test_a_dead_input_gets_zeros() -> None:
    weight, curvature = layer(5)
    gram = curvature.gram.clone()
    gram[7], gram[:, 7] = 0, 0
    made = sparsegpt_gptq(weight, Curvature(gram), 1.0, granularity.parse("element"))
    assert bool((made.weight[:, 7] == 0).all())


def test_recipes() -> None:
    recipe = Recipe.of("sparsegpt", knobs={"solver": {"damp": 0.05}}).quantized("int4:32")
    assert recipe.solver == "sparsegpt-gptq" and dict(recipe.knobs["solver"]) == {"bits": 4, "damp": 0.05, "group": 32}
    assert Recipe.of("wanda").quantized("int8").solver == "round"
    assert recipe.quantized("int8").knobs_of("solver")["bits"] == 8
    assert Recipe.load(recipe.dump()) == recipe
    assert Recipe.of("obc").quantized("int4").solver == "obq"
    shared = Recipe.of("magnitude").quantized("shared:4")
    assert shared.solver == "share" and dict(shared.knobs["solver"]) == {"bits": 4}
    assert shared.quantized("int8").solver == "round" and Recipe.load(shared.dump()) == shared
    with pytest.raises(RecipeError, match="solver 'dsnot' has no form for 'int4'"):
        Recipe.of("wanda", solver="dsnot").quantized("int4")
    with pytest.raises(RecipeError, match="has no form for 'shared:5': choose rank"):
        Recipe.of("sparsegpt").quantized("shared:5")
    with pytest.raises(RecipeError, match="no later step may move"):
        Recipe.of("sparsegpt-blockwise").quantized("int4")
    with pytest.raises(RecipeError, match="is not a multiple of 4"):
        get("solver", "sparsegpt-gptq").facts["check"](
            (8, 24), "a", granularity.parse("2:4"), {"bits": 4, "group": 6, "clip": "mse"}
        )
