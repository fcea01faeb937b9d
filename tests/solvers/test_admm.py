"""ALPS: near the optimum of tiny layers, below sparsegpt always, one decomposition for shared inputs."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

import pytest
import torch
from torch import Tensor

from secateur.granularity import parse
from secateur.solvers import Curvature, admm, output_error, refit, sparsegpt

Make = Callable[..., tuple[Tensor, Tensor]]


@pytest.mark.parametrize("seed", range(6))
def test_between_the_optimum_and_sparsegpt(seed: int, layer: Make) -> None:
    weight, x = layer(1, 6, seed=seed)
    gram = x.t() @ x
    masks = torch.zeros(20, 6, dtype=torch.bool)
    for k, kept in enumerate(combinations(range(6), 3)):
        masks[k, list(kept)] = True
    fits = refit(weight.expand(20, 6), masks, Curvature(gram), iterations=60, tol=0.0)
    least = min(output_error(weight, fit[None], gram) for fit in fits)
    found = output_error(weight, admm(weight, Curvature(gram), 0.5, parse("row")).weight, gram)
    assert least * (1 - 1e-3) <= found
    assert found <= output_error(weight, sparsegpt(weight, Curvature(gram), 0.5, parse("row")).weight, gram)


@pytest.mark.parametrize("granularity", ["element", "row", "2:4", "block(4,4)"])
def test_clearly_below_sparsegpt_on_a_larger_layer(granularity: str, layer: Make) -> None:
    weight, x = layer(48, 64, seed=1)
    gram = x.t() @ x
    found = output_error(weight, admm(weight, Curvature(gram), 0.4, parse(granularity)).weight, gram)
    assert found < 0.95 * output_error(weight, sparsegpt(weight, Curvature(gram), 0.4, parse(granularity)).weight, gram)


@pytest.mark.parametrize("iterations", [0, 1, 3, 10, 300])
def test_any_number_of_iterations_is_at_most_sparsegpts_error(iterations: int, layer: Make) -> None:
    weight, x = layer(8, 32, seed=4)
    gram = x.t() @ x
    found = output_error(weight, admm(weight, Curvature(gram), 0.5, parse("row"), iterations=iterations).weight, gram)
    assert found <= output_error(weight, sparsegpt(weight, Curvature(gram), 0.5, parse("row")).weight, gram)


def test_shared_inputs_share_the_decomposition(layer: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = layer(8, 16)
    curvature = Curvature(x.t() @ x)
    calls = []
    eigh = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda a: calls.append(1) or eigh(a))
    for part in weight.split(4):
        admm(part, curvature, 0.5, parse("row"))
    assert len(calls) == 1


def test_rho_that_is_too_large_comes_down(layer: Make) -> None:
    weight, x = layer(8, 32, seed=4)
    gram = x.t() @ x
    stiff = admm(weight, Curvature(gram), 0.5, parse("row"), rho=1e4, iterations=60)
    assert output_error(weight, stiff.weight, gram) < 1.3 * output_error(
        weight, admm(weight, Curvature(gram), 0.5, parse("row")).weight, gram
    )
