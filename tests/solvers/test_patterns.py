"""Kernel patterns: exact counts, the library by hand, and the best choice from it by trying all."""

from __future__ import annotations

from collections import Counter
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import secateur
from secateur.errors import RecipeError
from secateur.granularity import parse
from secateur.solvers import kernel_patterns


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 9), st.integers(1, 6), st.integers(0, 1000), st.booleans())
def test_each_kernel_keeps_its_count_in_a_pattern_of_the_library(n: int, most: int, seed: int, center: bool) -> None:
    score = torch.rand(6, 4 * 9, generator=torch.Generator().manual_seed(seed))
    made = kernel_patterns(score, score, n / 9, parse(f"{n}:9"), patterns=most, center=center)
    kernels = made.mask.reshape(-1, 9)
    assert (kernels.sum(1) == n).all()
    assert len(kernels.unique(dim=0)) <= most
    assert not center or bool(kernels[:, 4].all())


def test_against_trying_all() -> None:
    score = torch.rand(8, 3 * 9, generator=torch.Generator().manual_seed(0))
    made = kernel_patterns(score, score, 4 / 9, parse("4:9"), patterns=3)
    kernels = score.reshape(-1, 9).tolist()
    with_center = [c for c in combinations(range(9), 4) if 4 in c]
    natural = Counter(max(with_center, key=lambda c, k=k: sum(k[j] for j in c)) for k in kernels)
    assert len(natural) > 3
    least = sorted(natural.values(), reverse=True)[2]
    library = {tuple(m.nonzero().flatten().tolist()) for m in made.mask.reshape(-1, 9)}
    assert len(library) <= 3 and all(natural[c] >= least for c in library)
    for k, mask in zip(kernels, made.mask.reshape(-1, 9), strict=True):
        best = max(sum(k[j] for j in c) for c in library)
        assert sum(k[j] for j in mask.nonzero().flatten().tolist()) == pytest.approx(best)


def test_as_a_method() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(16, 4))
    made = secateur.prune(net, "kernel-patterns", only=("0", "2"))
    assert made.sparsity == pytest.approx(5 / 9)
    assert len((net[2].weight != 0).reshape(-1, 9).unique(dim=0)) <= 8
    with pytest.raises(RecipeError, match="multiple of 9; 4 has 16"):
        secateur.prune(net, "kernel-patterns")
    with pytest.raises(RecipeError, match="works on N:M"):
        secateur.prune(net, "kernel-patterns", granularity="element", only=("0",))
    with pytest.raises(RecipeError, match="at least 1"):
        secateur.prune(net, "kernel-patterns", only=("0",), knobs={"solver": {"patterns": 0}})
