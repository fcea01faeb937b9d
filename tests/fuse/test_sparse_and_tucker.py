"""Low rank and sparse together are no worse than either; Tucker-2 keeps its bound, and is exact at full rank."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import secateur
from secateur.errors import ModelError, RecipeError
from secateur.fuse.lowrank import Made, low_rank, principal
from secateur.fuse.sparse import Split, alternate, chosen, fitted, low_rank_sparse, splits, turned
from secateur.fuse.tucker import along, expand, hooi, project, tucker
from secateur.solvers.curvature import Curvature


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense(made: Made) -> Tensor:
    if made.facts["kind"] == "sparse":
        return made.tensors[0]
    product = made.tensors[1] @ made.tensors[0]
    return product + made.tensors[2] if len(made.tensors) == 3 else product


def lost(weight: Tensor, other: Tensor, x: Tensor) -> float:
    return float((x @ (weight - other).T).norm() / (x @ weight.T).norm())


def planted(o: int, i: int, seed: int) -> Tensor:
    """Low rank with some large weights of their own."""
    own = drawn(o, i, seed=seed + 5)
    return drawn(o, 2, seed=seed) @ drawn(2, i, seed=seed + 3) + 8 * own * (own.abs() > 1.6)


@settings(max_examples=12, deadline=None)
@given(
    o=st.integers(6, 12), i=st.integers(6, 12), keep=st.floats(0.35, 0.7), bits=st.booleans(), seed=st.integers(0, 50)
)
def test_no_worse_than_either_alone_at_equal_bytes(o: int, i: int, keep: float, bits: bool, seed: int) -> None:
    w, x = planted(o, i, seed), drawn(3 * i, i, seed=seed + 9) @ drawn(i, i, seed=seed + 8)
    gram, budget, mask = x.T @ x, keep * o * i, o * i / 32 if bits else 0.0
    made = low_rank_sparse(w, gram, budget, mask, iterations=4)
    nonzeros, ranks = int(made.facts.get("nonzeros", 0)), made.facts.get("ranks", [0])
    size = ranks[0] * (o + i) + nonzeros + (mask if nonzeros else 0)
    assert budget - (o + i if not nonzeros else 1) < size <= budget
    if nonzeros:
        assert int(made.tensors[-1].count_nonzero()) == nonzeros
    error = lost(w, dense(made), x)
    assert made.error == pytest.approx(error, rel=1e-6, abs=1e-9)
    options = low_rank(w, gram)
    fitting = [k for k, s in enumerate(options.curve.sizes) if s <= budget]
    if fitting:
        assert error <= options.make(fitting[-1]).error + 1e-9
    alone = chosen(w, gram.diagonal().sqrt(), int(budget - mask))
    assert error <= lost(w, alone, x) + 1e-9


def test_both_together_find_what_was_planted() -> None:
    w = planted(16, 16, 0)
    own = int((drawn(16, 16, seed=5).abs() > 1.6).sum())
    gram = torch.eye(16, dtype=torch.float64)
    made = low_rank_sparse(w, gram, 2 * 32 + own, 0.0, shares=(2.01 * 32 / (64 + own),), iterations=60)
    assert made.facts == {"kind": "low-rank+sparse", "ranks": [2], "nonzeros": own}
    assert made.error < 0.02
    alone = low_rank(w, gram)
    assert 10 * made.error < alone.make((2 * 32 + own) // 32 - 1).error


def test_turns_lower_the_error_where_inputs_are_white() -> None:
    """Both steps are projections then, as in OATS's scale; with a Gram matrix the best turn is kept."""
    w = planted(10, 12, 4)
    gram = torch.diag(torch.logspace(0, 1, 12, dtype=torch.float64))
    basis = principal(w, gram)[0]
    errors = [alternate(w, gram, Split(2, 20), n, basis).error for n in (1, 2, 4, 8)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.8 * errors[0]


@settings(max_examples=12, deadline=None)
@given(o=st.integers(4, 12), i=st.integers(4, 12), rank=st.integers(1, 3), seed=st.integers(0, 50))
def test_a_step_of_orthogonal_iteration_holds_no_less(o: int, i: int, rank: int, seed: int) -> None:
    """And many of them hold what the leading singular vectors hold."""
    w, x = drawn(o, i, seed=seed), drawn(3 * i, i, seed=seed + 1)
    gram = x.T @ x
    held = [0.0]
    basis = torch.linalg.qr(drawn(o, rank, seed=seed + 2))[0]
    for _ in range(300):
        basis = turned(w, gram, basis)
        assert torch.allclose(basis.T @ basis, torch.eye(rank, dtype=w.dtype), atol=1e-10)
        held.append(float(((basis.T @ w @ gram) * (basis.T @ w)).sum()))
        assert held[-1] >= held[-2] * (1 - 1e-12)
    best = float(torch.linalg.svdvals(x @ w.T)[:rank].square().sum())
    assert held[-1] <= best * (1 + 1e-9) and held[-1] > 0.97 * best


def test_values_are_fitted_beside_the_ranks() -> None:
    """The sparse term's values are those of a least squares fit, row by row; and the error is never higher."""
    w, x = planted(9, 12, 1), drawn(60, 12, seed=2) @ drawn(12, 12, seed=3)
    gram, basis = x.T @ x, principal(w, x.T @ x)[0]
    terms = alternate(w, gram, Split(2, 40), 6, basis)
    better = fitted(w, Curvature(gram), terms, 200)
    assert better.error < 0.9 * terms.error
    assert torch.equal(better.sparse != 0, terms.sparse != 0)
    for row in range(9):
        held = better.sparse[row] != 0
        goal = x @ (w - better.low)[row]
        value = torch.linalg.lstsq(x[:, held], goal).solution
        own = float((x[:, held] @ better.sparse[row, held] - goal).norm())
        assert own <= 1.02 * float((x[:, held] @ value - goal).norm()) + 1e-9
    plain = low_rank_sparse(w, gram, 60.0, 0.0, fit=0)
    assert low_rank_sparse(w, gram, 60.0, 0.0).error < plain.error
    with pytest.raises(RecipeError, match="fit is a whole number of iterations, or 0 for none, not -1"):
        low_rank_sparse(w, gram, 60.0, 0.0, fit=-1)


def test_exact_counts_on_a_constant_matrix() -> None:
    assert int(chosen(torch.ones(5, 7), torch.ones(7), 11).count_nonzero()) == 11
    for split in splits((8, 8), 40.0, 2.0, (0.5,)):
        assert split.rank * 16 + split.nonzeros + (2 if split.nonzeros else 0) <= 40


@pytest.mark.parametrize("quantity", ["params", "bytes"])
def test_model_with_sparse_terms_and_its_files(quantity: str, tmp_path: Path) -> None:
    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(4, 12, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(12 * 9, 24))

    model, x = net(), torch.randn(60, 4, 5, 5)
    with torch.no_grad():
        model[3].weight.copy_(planted(24, 108, 0))  # type: ignore[union-attr]
    before = model(x)
    made = secateur.decompose(model, "low-rank+sparse", target=f"{quantity} 50%", data=x, iterations=3, shares=(0.5,))
    assert {r.kind for r in made.records} <= {"low-rank+sparse", "sparse", "low-rank"}
    assert any(r.kind == "low-rank+sparse" for r in made.records)
    goal = made.run["before"][quantity] / 2
    slack = 64 + sum(4 * sum(r.shape) for r in made.records if r.kind == "low-rank")
    assert goal - slack < made.run["after"][quantity] <= goal
    with torch.no_grad():
        error = float((model(x) - before).norm() / before.norm())
    assert error < 0.8
    secateur.save(model, tmp_path / "out")
    again = secateur.load(tmp_path / "out", net())
    assert torch.equal(again(x), model(x))
    on_disk = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert made.run["after"]["bytes"] <= on_disk < made.run["after"]["bytes"] + 1500  # headers


@pytest.mark.parametrize("quantity", ["params", "bytes"])
def test_one_budget_for_ranks_and_single_weights(quantity: str) -> None:
    """Each layer gets ranks, weights of its own, both or neither, by what loses least."""

    def net() -> nn.Module:
        torch.manual_seed(0)
        made = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24), nn.Linear(24, 24), nn.Linear(24, 24))
        with torch.no_grad():
            made[3].weight.copy_(drawn(24, 3, seed=1) @ drawn(3, 24, seed=2))  # low rank
            made[1].weight.mul_((torch.rand(24, 24) < 0.2) * 5.0 + 0.001)  # few weights matter
            made[0].weight.copy_(torch.linalg.qr(drawn(24, 24, seed=3))[0])  # neither
            made[2].weight.copy_(planted(24, 24, 4))  # both
        return made

    x = drawn(200, 24, seed=7).float()
    errors, kinds = {}, {}
    for how in ("greedy", "uniform"):
        model = net()
        made = secateur.decompose(
            model, "low-rank+sparse", target=f"{quantity} 45%", data=x, allocation=how, iterations=3
        )  # fmt: skip
        assert made.run["after"][quantity] <= 0.55 * made.run["before"][quantity]
        errors[how] = sum(r.error**2 for r in made.records)
        kinds[how] = [r.kind for r in made.records]
    assert errors["greedy"] < 0.7 * errors["uniform"]
    assert kinds["greedy"][0] == "dense" and kinds["greedy"][1] == "sparse"
    assert kinds["greedy"][3] in ("low-rank", "low-rank+sparse")


def test_a_packed_file_that_does_not_fit(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(16, 16))
    secateur.decompose(model, "low-rank+sparse", target="params 40%", data=torch.randn(40, 16), shares=(0.5,))
    secateur.save(model, tmp_path / "out")
    file = tmp_path / "out" / "surgery.json"
    file.write_text(file.read_text().replace('"packed": {', '"packed": {"1.weight": [4, 4],'))
    with pytest.raises(ModelError, match=r"does not describe model.safetensors: it holds no mask of 16 bits"):
        secateur.load(tmp_path / "out", nn.Sequential(nn.Linear(16, 16)))


def test_tucker_bound_and_full_rank() -> None:
    kernel = drawn(7, 6, 3, 3) + 4 * torch.einsum("oa,cb,abk->ock", drawn(7, 2, seed=1), drawn(6, 2, seed=2), drawn(2, 2, 9, seed=3)).view(7, 6, 3, 3)  # fmt: skip  # noqa: E501
    whole = float(kernel.square().sum())
    values = [torch.linalg.svdvals(along(kernel, a)).square() for a in (0, 1)]
    options = tucker(kernel)
    assert list(options.curve.sizes) == sorted(options.curve.sizes)
    for k, size in enumerate(options.curve.sizes):
        made = options.make(k)
        a, b = made.facts["ranks"]
        assert size == a * 7 + b * 6 + a * b * 9 == sum(t.numel() for t in made.tensors)
        inner, core, outer = made.tensors
        error = float((expand(core, (outer, inner.mT)) - kernel).square().sum()) / whole
        bound = float(values[0][a:].sum() + values[1][b:].sum()) / whole
        assert made.error**2 == pytest.approx(error, abs=1e-9)
        assert error <= options.curve.errors[k] + 1e-9 <= bound + 2e-9  # refined <= HOSVD <= its bound
        assert error >= max(float(values[0][a:].sum()), float(values[1][b:].sum())) / whole - 1e-9
    bases = (torch.linalg.qr(drawn(7, 7))[0], torch.linalg.qr(drawn(6, 6))[0])
    assert torch.allclose(expand(project(kernel, bases), bases), kernel)
    last = options.make(len(options.curve.sizes) - 1)
    assert last.facts["ranks"] == [7, 6] and last.error == 0.0


def test_hooi_never_loses_more() -> None:
    tensor = drawn(8, 7, 3)
    bases = (torch.linalg.qr(drawn(8, 3, seed=1))[0], torch.linalg.qr(drawn(7, 2, seed=2))[0])
    held = [float(project(tensor, hooi(tensor, bases, n)).square().sum()) for n in range(5)]
    assert held == sorted(held) and held[1] > held[0]


@pytest.mark.parametrize(
    ("kind", "shape"), [(nn.Conv1d, (11,)), (nn.Conv2d, (9, 9)), (nn.Conv3d, (5, 5, 5))], ids=["1d", "2d", "3d"]
)
def test_tucker_of_convolutions(kind: type[nn.Module], shape: tuple[int, ...], tmp_path: Path) -> None:
    """The three layers compute what the kernel that they stand for computes, whatever the geometry."""

    def net() -> nn.Module:
        torch.manual_seed(1)
        return nn.Sequential(kind(6, 8, 3, stride=2, padding=1, padding_mode="reflect"), kind(8, 8, 3, dilation=1))

    model, x = net(), torch.randn(2, 6, *shape)
    made = secateur.decompose(model, "tucker", sparsity=0.4)
    assert any(r.kind == "tucker" for r in made.records)
    again = net()
    for k in (k for k, r in enumerate(made.records) if r.kind == "tucker"):
        inner, core, outer = (m.weight.detach() for m in model[k])  # type: ignore[union-attr]
        with torch.no_grad():
            again[k].weight.copy_(expand(core, (outer.flatten(1), inner.flatten(1).mT)))
    assert torch.allclose(again(x), model(x), atol=1e-4)
    secateur.save(model, tmp_path / "out")
    assert torch.equal(secateur.load(tmp_path / "out", net())(x), model(x))
    with pytest.raises(RecipeError, match="tucker is for layers of kind conv"):
        secateur.decompose(nn.Sequential(nn.Linear(8, 8)), "tucker", sparsity=0.4)
