"""The optimal brain surgeon on a block-wise Fisher, against closed forms and brute force."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.tasks.conftest import _one_thread  # noqa: F401
from tests.tasks.tiny import TASK
from torch import Tensor, nn

import secateur
from secateur import Recipe, train
from secateur.criteria.curvature import obert, woodfisher
from secateur.errors import NumericalError, RecipeError
from secateur.evidence import GradientEvidence
from secateur.granularity import parse
from secateur.layers import find_layers
from secateur.masks import Masks
from secateur.registry import get
from secateur.solvers import obs


def case(o: int, i: int, block: int, seed: int = 0, gradients: int = 40, damp: float = 1e-2) -> tuple[Tensor, Tensor]:
    """A weight and the blocks of its Fisher."""
    g = torch.Generator().manual_seed(seed)
    evidence = GradientEvidence((o, i), {"fisher_blocks"}, block=block, damp=damp)
    mix = torch.randn(o * i, o * i, generator=g) / (o * i) ** 0.5
    for _ in range(gradients):
        evidence.update((torch.randn(o * i, generator=g) @ mix).reshape(o, i))
    return torch.randn(o, i, generator=g), evidence["fisher_blocks"]


def whole(blocks: Tensor, size: int) -> Tensor:
    """The Fisher as one matrix."""
    return torch.block_diag(*blocks.double())[:size, :size]


def best(w: Tensor, fisher: Tensor, gone: list[int], frozen: list[int] | None = None) -> tuple[Tensor, float]:
    """The survivors that minimize the quadratic loss without these, and that loss, from the normal equations."""
    out = {*gone, *(frozen or [])}
    stay = [k for k in range(len(w)) if k not in out]
    change = -w.clone()
    change[stay] = 0
    if stay:
        change[stay] = torch.linalg.solve(fisher[stay][:, stay], -(fisher @ change)[stay])
    return w + change, float(change @ fisher @ change / 2)


def everything(w: Tensor) -> Tensor:
    return torch.ones(w.shape, dtype=torch.bool)


@settings(max_examples=25, deadline=None)
@given(o=st.integers(1, 4), i=st.integers(1, 5), block=st.integers(1, 25), seed=st.integers(0, 99))
def test_a_score_is_the_least_loss_without_that_weight(o: int, i: int, block: int, seed: int) -> None:
    w, blocks = case(o, i, block, seed)
    fisher, flat = whole(blocks, o * i), w.double().reshape(-1)
    score = obert(w, blocks, everything(w), parse("element")).reshape(-1)
    for q in range(o * i):
        assert float(score[q]) == pytest.approx(best(flat, fisher, [q])[1], rel=1e-4, abs=1e-9)


@pytest.mark.parametrize(("granularity", "block"), [("block(1,2)", 4), ("block(2,2)", 6), ("block(1,4)", 50)])
def test_the_score_of_a_group_is_the_least_loss_without_it(granularity: str, block: int) -> None:
    w, blocks = case(4, 4, block, 1)
    fisher, flat, pattern = whole(blocks, 16), w.double().reshape(-1), parse(granularity)
    score = pattern.pool(obert(w, blocks, everything(w), pattern))[0]
    for u, members in enumerate(pattern.split(torch.arange(16).reshape(4, 4))[0]):
        assert float(score[u]) == pytest.approx(best(flat, fisher, members.tolist())[1], rel=1e-4)
    each = pattern.split(obert(w, blocks, everything(w), pattern))
    assert torch.equal(each, each[..., :1].expand_as(each))  # a ranking of all layers takes single entries


def test_what_earlier_rounds_took_does_not_come_back_to_help() -> None:
    w, blocks = case(3, 4, 12, 2)
    mask = everything(w)
    mask[0, 1] = mask[2, 2] = False
    w = w * mask
    fisher, flat = whole(blocks, 12), w.double().reshape(-1)
    score = obert(w, blocks, mask, parse("element")).reshape(-1)
    for q in range(12):
        if q not in (1, 10):
            assert float(score[q]) == pytest.approx(best(flat, fisher, [q], [1, 10])[1], rel=1e-4)
    inverse = torch.linalg.inv(fisher).diagonal().reshape(3, 4).float()
    assert not torch.allclose(woodfisher(w, inverse)[mask], score.reshape(3, 4)[mask], rtol=1e-2)
    solved = obs(w, torch.where(mask, score.reshape(3, 4), -torch.inf), blocks, 0.5, parse("element"))
    assert not bool((solved.mask & ~mask).any())
    gone = (~solved.mask).reshape(-1).nonzero()[:, 0].tolist()
    torch.testing.assert_close(solved.weight.reshape(-1).double(), best(flat, fisher, gone)[0], rtol=1e-4, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(
    block=st.sampled_from((1, 3, 7, 24, 50)),
    granularity=st.sampled_from(("element", "row", "2:4", "block(2,2)")),
    keep=st.sampled_from((0.0, 0.25, 0.5, 1.0)),
    seed=st.integers(0, 99),
)
def test_the_survivors_minimize_the_quadratic(block: int, granularity: str, keep: float, seed: int) -> None:
    w, blocks = case(2, 12, block, seed)
    pattern = parse(granularity)
    keep = keep if pattern.keep is None else pattern.keep
    score = obert(w, blocks, everything(w), pattern)
    solved, ranked = (get("solver", n) for n in ("obs", "rank"))
    facts: dict[str, Any] = {
        "weight": w, "score": score, "fisher_blocks": blocks, "keep": keep, "granularity": pattern
    }  # fmt: skip
    made, plain = solved(facts), ranked(facts)
    assert torch.equal(made.mask, plain.mask) and not bool(made.weight[~made.mask].any())
    fisher, flat = whole(blocks, 24), w.double().reshape(-1)
    gone = (~made.mask).reshape(-1).nonzero()[:, 0].tolist()
    torch.testing.assert_close(made.weight.reshape(-1).double(), best(flat, fisher, gone)[0], rtol=1e-3, atol=1e-4)

    def rise(x: Tensor) -> float:
        change = x.double().reshape(-1) - flat
        return float(change @ fisher @ change / 2)

    assert rise(made.weight) <= rise(plain.weight) * (1 + 1e-6) + 1e-9


def test_in_one_block_it_is_the_exact_surgeon_and_in_blocks_of_one_nothing_moves() -> None:
    w, blocks = case(2, 6, 12, 5)
    full = whole(blocks, 12)
    score = obert(w, blocks, everything(w), parse("element"))
    q = int(score.argmin())
    inverse = torch.linalg.inv(full)
    flat = w.double().reshape(-1)
    wanted = flat - flat[q] / inverse[q, q] * inverse[:, q]
    made = obs(w, score, blocks, 11 / 12, parse("element"))
    torch.testing.assert_close(made.weight.double().reshape(-1), wanted, rtol=1e-4, atol=1e-5)
    _, single = case(2, 6, 1, 5)
    alone = obs(w, obert(w, single, everything(w), parse("element")), single, 0.5, parse("element"))
    assert torch.equal(alone.weight, torch.where(alone.mask, w, 0.0))


def test_the_loss_of_a_model_rises_by_the_least_that_it_can() -> None:
    """Each input twice, with residuals 1 and -1: a minimum, at which the Fisher of single examples is the Hessian."""
    g = torch.Generator().manual_seed(0)
    model = nn.Linear(6, 1, bias=False).double()
    x = torch.randn(40, 6, generator=g, dtype=torch.float64).repeat(2, 1)
    w = model.weight.detach()[0].clone()
    y = x @ w + torch.tensor([1.0, -1.0], dtype=torch.float64).repeat_interleave(40)

    def loss(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (net(batch[0])[:, 0] - batch[1]).square().sum() / 2

    before = float(loss(model, (x, y)).detach())
    least = min(best(w, x.t() @ x, [q])[1] for q in range(6))
    batches = [(x[k : k + 1], y[k : k + 1]) for k in range(80)]
    pruned = secateur.prune(
        model, Recipe(criterion="obert", solver="obs", sparsity=1 / 6), data=batches, loss=loss
    )  # fmt: skip
    assert int(pruned.masks["weight"].sum()) == 5
    assert float(loss(model, (x, y)).detach()) - before == pytest.approx(least, rel=1e-3)


def test_rounds_keep_their_zeros_and_count() -> None:
    made = train(TASK, "obert", sparsity=0.8, steps=3, epochs=1, calibration=6, knobs={"recovery": {"length": 0.34}})
    assert made.sparsity == pytest.approx(0.8, abs=0.01)
    layers = {x.name: x for x in find_layers(made.model)[0]}
    assert all(not bool(layers[n].weight()[~m].any()) for n, m in made.masks.items())
    shares = [row["sparsity"] for row in made.run["rounds"]]
    assert shares == pytest.approx([0.8 * (1 - (1 - k / 3) ** 3) for k in (1, 2, 3)], abs=0.01)
    assert {row["leg"] for row in made.run["curves"]} == {"dense", "round-1", "round-2", "round-3"}


def test_rounds_are_nested() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    data = [(torch.randn(4, 8), torch.randint(0, 3, (4,))) for _ in range(12)]
    loss = lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1])  # noqa: E731
    recipe = Recipe(criterion="obert", solver="obs", allocation="global", knobs={"criterion": {"fisher_block": 16}})
    first = secateur.prune(model, recipe.override(sparsity=0.4), data=data, loss=loss).masks
    second = secateur.prune(model, recipe.override(sparsity=0.7), data=data, loss=loss, masks=first).masks
    assert not any(bool((second[n] & ~m).any()) for n, m in first.items())
    assert Masks(second).sparsity == pytest.approx(0.7, abs=0.01)
    both = secateur.prune(model, recipe.override(sparsity=0.9, steps=2, schedule="linear"), data=data, loss=loss)
    assert both.sparsity == pytest.approx(0.9, abs=0.01)


def test_what_is_refused() -> None:
    with pytest.raises(RecipeError, match="at least one weight and a damping above 0, not 0"):
        secateur.prune(
            nn.Linear(2, 2), Recipe(criterion="obert", solver="obs", knobs={"criterion": {"fisher_block": 0}}),
            data=[torch.ones(1, 2)], loss=lambda m, b: m(b).sum(),
        )  # fmt: skip
    with pytest.raises(NumericalError, match="not positive definite"):
        obs(torch.ones(1, 2), torch.ones(1, 2), -torch.eye(2)[None], 0.5, parse("element"))
    with pytest.raises(RecipeError, match="one step"):
        Recipe(criterion=None, solver="sparsegpt", steps=2, schedule="linear")
