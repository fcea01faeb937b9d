"""Canonical polyadic convolutions: exact where the rank is, never worse for another step, and the same convolution."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import secateur
from secateur.errors import ModelError
from secateur.fuse.cp import alternate, balanced, compose, cp, rows, wider
from secateur.surgery.factors import factored, fill


def drawn(shape: tuple[int, ...], rank: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, rank, generator=generator, dtype=torch.float64) for n in shape]


def test_the_products_are_their_definition() -> None:
    a, b, c = drawn((3, 4, 2), 5, 0)
    torch.testing.assert_close(compose([a, b, c]), torch.einsum("ir,jr,kr->ijk", a, b, c))
    torch.testing.assert_close(rows([b, c]), torch.einsum("jr,kr->jkr", b, c).reshape(8, 5))
    torch.testing.assert_close(compose(balanced([a, 9 * b, c])), 9 * compose([a, b, c]))


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_an_exact_rank_is_found(rank: int) -> None:
    tensor = compose(drawn((8, 7, 3, 3), rank, rank))
    options = cp(tensor, iterations=400, ranks=40)
    ladder = [round(float(s) / 21) for s in options.curve.sizes]
    assert ladder == list(range(1, len(ladder) + 1))
    assert options.curve.errors[rank - 1] < 1e-6
    made = options.make(rank - 1)
    assert made.facts == {"kind": "cp", "ranks": [rank]} and [t.shape[0] for t in made.tensors] == [rank, rank, rank, 8]


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 3), st.integers(0, 99))
def test_the_error_never_grows(o: int, c: int, k: int, seed: int) -> None:
    """Neither by a sweep nor by a wider factor; a tensor of two axes is a matrix, whose best rank is known."""
    tensor = torch.randn(o, c, k, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    factors, last = [tensor.new_zeros(n, 0) for n in tensor.shape], float(tensor.square().sum())
    for rank in (1, 2, 4):
        start = wider(tensor, factors, rank, generator)
        assert float((tensor - compose(start)).square().sum()) == pytest.approx(last)
        for _ in range(3):
            start, error = alternate(tensor, start, 1)
            assert error <= last * (1 + 1e-9) + 1e-12
            last = error
        factors = start
    matrix = tensor[:, :, 0, 0]
    best = float(torch.linalg.svdvals(matrix)[1:].square().sum())
    found = alternate(matrix, wider(matrix, [matrix.new_zeros(n, 0) for n in matrix.shape], 1, generator), 300)[1]
    assert found == pytest.approx(best, rel=1e-3, abs=1e-9)


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 6, 3, stride=2, padding=1),
        nn.Conv2d(4, 6, (3, 5), stride=(1, 2), padding=(0, 2), dilation=(2, 1), bias=False),
        nn.Conv2d(4, 6, 3, padding="same", padding_mode="circular"),
        nn.Conv1d(4, 6, 5, padding=2),
        nn.Conv3d(2, 3, (1, 3, 2), padding=(0, 1, 1)),
    ],
    ids=str,
)
def test_the_layers_are_one_convolution(conv: nn.Module) -> None:
    """Four convolutions in a row give what the convolution with the composed kernel gives."""
    torch.manual_seed(0)
    conv = conv.double()
    weight: Tensor = conv.weight  # type: ignore[assignment]
    factors = drawn(tuple(weight.shape), 3, 1)
    with torch.no_grad():
        weight.copy_(compose(factors))
    made = factored(conv, {"kind": "cp", "ranks": [3]})
    fill(made, [factors[1].mT, *(f.mT for f in factors[2:]), factors[0]], getattr(conv, "bias", None))
    x = torch.randn(2, weight.shape[1], *[9] * (weight.dim() - 2), dtype=torch.float64)
    torch.testing.assert_close(made(x), conv(x))
    assert sum(p.numel() for n, p in made.named_parameters() if "weight" in n) == 3 * sum(weight.shape)


def test_a_model_and_its_files(tmp_path: Path) -> None:
    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 16, 5), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(1), nn.Linear(64, 4))

    model = net()
    made = secateur.prune(model, "cp", target="params 40%", iterations=5, ranks=6)
    kinds = {r.name: r.kind for r in made.records}
    assert set(kinds.values()) <= {"cp", "dense"} and "cp" in kinds.values()
    assert made.run["after"]["params"] == sum(p.numel() for p in model.parameters())
    made.save(tmp_path / "out")
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(secateur.load(tmp_path / "out", net())(x), model(x))


def test_a_rank_that_no_kernel_has() -> None:
    with pytest.raises(ModelError, match="has no rank 37: ranks are 1 to 36"):
        factored(nn.Conv2d(4, 6, 3), {"kind": "cp", "ranks": [37]})
    with pytest.raises(ModelError, match="'cp' is for convolutions"):
        factored(nn.Linear(4, 6), {"kind": "cp", "ranks": [1]})
