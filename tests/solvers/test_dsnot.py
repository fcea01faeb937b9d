"""DSnoT against a slow scalar reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from secateur.errors import RecipeError
from secateur.granularity import parse
from secateur.select import select
from secateur.solvers import dsnot, rank


def problem(o: int, i: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(o, i, generator=g)
    x = torch.randn(64, i, generator=g) * (0.2 + torch.rand(i, generator=g)) + torch.randn(i, generator=g)
    return weight, x.mean(0), x.var(0, correction=0), x.square().sum(0).sqrt()


def reference(
    weight: Tensor, mask: Tensor, score: Tensor, facts: tuple[Tensor, Tensor, Tensor], run: int, cycles: int, same: bool
) -> Tensor:
    """One row, one swap at a time, from the text of the paper; ``run`` is 0 without groups."""
    mean, var, norm = facts
    mask = mask.clone()
    for r in range(weight.shape[0]):
        effect = weight[r] * (mean * 2048)
        first = mask[r].clone()
        error = torch.where(first, 0.0, effect).sum()
        sign = error.sign()
        can_grow = {j for j in range(len(first)) if not first[j]}
        can_go = {j for j in range(len(first)) if first[j]}
        for _ in range(cycles):
            ups = [j for j in can_grow if effect[j] * error > 0]
            if abs(error) <= 0.1 or not ups:
                break
            up = max(ups, key=lambda j: float((effect[j] / var[j]).abs()))
            can_grow.discard(up)
            if run:
                downs = [j for j in can_go if j // run == up // run]
                if not downs:
                    continue
                down = min(downs, key=lambda j: float(score[r, j]))
            else:
                downs = [j for j in can_go if effect[j] * error < 0]
                if not downs:
                    break
                down = min(downs, key=lambda j: float(weight[r, j].abs() * norm[j]))
            after = error + effect[down] - effect[up]
            if (run or same) and after.sign() != sign:
                break
            can_go.discard(down)
            mask[r, up], mask[r, down] = True, False
            error = after
    return mask


@pytest.mark.parametrize("granularity", ["element", "row", "2:4", "1:4", "4:8"])
@pytest.mark.parametrize("same", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_equals_the_reference(granularity: str, same: bool, seed: int) -> None:
    weight, *facts = problem(10, 32, seed)
    parsed = parse(granularity)
    keep = parsed.keep or 0.5
    score = weight.abs() * facts[2]
    start = parsed.unpool(select(parsed.pool(score), keep), (10, 32))
    run = 0 if parsed.keep is None else parsed.run
    expected = reference(weight, start, score, (facts[0], facts[1], facts[2]), run, 50, same)
    solved = dsnot(weight, score, keep, parsed, *facts, same_sign=same)
    assert torch.equal(solved.mask, expected)
    assert not torch.equal(solved.mask, start)
    assert torch.equal(solved.weight, weight * solved.mask)


def test_few_cycles_equal_the_reference() -> None:
    weight, *facts = problem(6, 24, 9)
    start = select(weight.abs(), 0.5)
    for cycles in (0, 1, 3):
        expected = reference(weight, start, weight.abs(), (facts[0], facts[1], facts[2]), 0, cycles, False)
        assert torch.equal(dsnot(weight, weight.abs(), 0.5, parse("row"), *facts, max_cycles=cycles).mask, expected)


def test_the_expected_change_of_the_output_shrinks() -> None:
    weight, *facts = problem(32, 64, 1)
    parsed = parse("row")
    before = (weight - rank(weight, weight.abs(), 0.5, parsed).weight) @ facts[0]
    after = (weight - dsnot(weight, weight.abs(), 0.5, parsed, *facts, same_sign=True).weight) @ facts[0]
    assert (after.abs() <= before.abs() + 1e-5).all()
    assert after.abs().mean() < 0.3 * before.abs().mean()


def test_inputs_of_mean_zero_change_nothing() -> None:
    weight, mean, var, norm = problem(4, 16, 0)
    start = select(weight.abs(), 0.5)
    assert torch.equal(dsnot(weight, weight.abs(), 0.5, parse("row"), mean * 0, var, norm).mask, start)


def test_blocks_are_refused() -> None:
    weight, *facts = problem(4, 16, 0)
    with pytest.raises(RecipeError, match="block"):
        dsnot(weight, weight.abs(), 0.5, parse("block(2,2)"), *facts)
