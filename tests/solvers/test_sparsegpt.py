"""SparseGPT against a plain implementation of the paper's algorithm 1."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from secateur.granularity import parse
from secateur.select import keep_count, select
from secateur.solvers import Curvature, sparsegpt


def reference(weight: Tensor, gram: Tensor, granularity: str, keep: float, block: int, damp: float) -> Tensor:
    """Algorithm 1 in float64, one weight at a time; masks are chosen every ``block`` columns (or M of N:M)."""
    rows, columns = weight.shape
    w = weight.double().clone()
    h = gram.double() + damp * gram.double().diagonal().mean() * torch.eye(columns)
    upper = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    mask = torch.ones(rows, columns, dtype=torch.bool)
    n, _, m = granularity.partition(":")
    every = int(m) if m else block
    done = 0
    for j in range(columns):
        if j % every == 0:
            end = min(j + every, columns)
            score = (w[:, j:end] / upper.diagonal()[j:end]) ** 2
            if m:
                mask[:, j:end] = select(score, int(n))
            else:
                pools, units = (rows, columns) if granularity == "row" else (1, rows * columns)
                due = round(keep_count(keep, units) * end / columns) - done
                mask[:, j:end] = select(score.reshape(pools, -1), due).reshape(rows, -1)
                done += due
        for r in range(rows):
            if not mask[r, j]:
                error = w[r, j] / upper[j, j]
                w[r, j:] -= error * upper[j, j:]
                w[r, j] = 0
    return w


@pytest.mark.parametrize("granularity", ["element", "row", "2:4", "4:8"])
@pytest.mark.parametrize("block", [16, 40, 128])
def test_equals_the_reference(granularity: str, block: int, layer: Callable[..., tuple[Tensor, Tensor]]) -> None:
    weight, x = layer(12, 88, seed=3)
    gram = x.t() @ x
    parsed = parse(granularity)
    keep = parsed.keep or 0.4
    expected = reference(weight, gram, granularity, keep, block, 0.01)
    solved = sparsegpt(weight, Curvature(gram), keep, parsed, damp=0.01, block=block)
    assert torch.equal(solved.mask, expected != 0)
    torch.testing.assert_close(solved.weight, expected.float(), rtol=1e-3, atol=1e-4)


def test_keeping_everything_changes_nothing(layer: Callable[..., tuple[Tensor, Tensor]]) -> None:
    weight, x = layer(4, 12)
    assert torch.equal(sparsegpt(weight, Curvature(x.t() @ x), 1.0, parse("row")).weight, weight)


def test_the_factor_is_made_once(layer: Callable[..., tuple[Tensor, Tensor]], monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = layer(4, 12)
    curvature = Curvature(x.t() @ x)
    first = sparsegpt(weight, curvature, 0.5, parse("row")).weight
    monkeypatch.setattr(curvature, "damped", lambda _: pytest.fail("factorized again"))
    assert torch.equal(sparsegpt(weight, curvature, 0.5, parse("row")).weight, first)
