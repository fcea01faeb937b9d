"""Second-order criteria against true loss changes and brute-force inverses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from secateur.criteria.curvature import fisher, obd, obs, woodfisher
from secateur.evidence import gather_gradients
from secateur.layers import find_layers
from secateur.solvers.curvature import Curvature


def test_obd_is_the_loss_change_where_the_hessian_is_diagonal():
    g = torch.Generator().manual_seed(0)
    model = nn.Linear(4, 3, bias=False)
    curve = torch.rand(3, 4, generator=g) + 0.5
    best = model.weight.detach().clone()  # a minimum: the gradient is zero

    def loss(m, _):
        return 0.5 * (curve * (m.weight - best).square()).sum()

    layers, _ = find_layers(model)
    hessian = gather_gradients(model, layers, {"hessian"}, [None], loss, probes=1)["weight"]["hessian"]
    score = obd(best, hessian)
    for o in range(3):
        for i in range(4):
            with torch.no_grad():
                model.weight[o, i] = 0
                change = float(loss(model, None))
                model.weight.copy_(best)
            assert score[o, i] == pytest.approx(change, rel=1e-5)


def test_obd_counts_negative_curvature_as_flat():
    assert obd(torch.ones(1, 2), torch.tensor([[-3.0, 2.0]])).tolist() == [[0.0, 1.0]]


def _refit_error(weight: torch.Tensor, hessian: torch.Tensor, q: int) -> float:
    """min over d of d^T H d / 2 with d_q = -w_q: what a row loses when q goes and the others move."""
    rest = [k for k in range(len(weight)) if k != q]
    d = torch.zeros_like(weight)
    d[q] = -weight[q]
    d[rest] = -torch.linalg.solve(hessian[rest][:, rest], hessian[rest, q] * d[q])
    return float(0.5 * d @ hessian @ d)


def test_obs_is_the_best_output_error_that_moving_the_row_can_reach():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(30, 5, generator=g, dtype=torch.float64) @ torch.randn(5, 5, generator=g, dtype=torch.float64)
    weight = torch.randn(2, 5, generator=g, dtype=torch.float64)
    gram = x.t() @ x
    score = obs(weight, Curvature(gram.float()), damp=0.05)
    damped = gram + 0.05 * gram.diagonal().mean() * torch.eye(5, dtype=torch.float64)
    for o in range(2):
        for q in range(5):
            assert score[o, q] == pytest.approx(_refit_error(weight[o], damped, q), rel=1e-3)
            brute = weight[o, q] ** 2 / (2 * torch.linalg.inv(damped)[q, q])
            assert score[o, q] == pytest.approx(float(brute), rel=1e-3)


def test_obs_scores_weights_of_dead_inputs_zero():
    gram = torch.diag(torch.tensor([1.0, 0.0, 2.0]))
    assert obs(torch.ones(2, 3), Curvature(gram))[:, 1].tolist() == [0.0, 0.0]
    assert (obs(torch.ones(2, 3), Curvature(gram))[:, [0, 2]] > 0).all()


def test_woodfisher_is_the_best_quadratic_loss_that_moving_the_block_can_reach():
    g = torch.Generator().manual_seed(3)
    model = nn.Linear(3, 2, bias=False)
    layers, _ = find_layers(model)
    gradients = torch.randn(7, 2, 3, generator=g)
    evidence = gather_gradients(model, layers, {"fisher_inverse"}, list(gradients), lambda m, b: (m.weight * b).sum())[
        "weight"
    ]
    flat = gradients.reshape(7, 6).double()
    matrix = flat.t() @ flat / 7 + 1e-5 * torch.eye(6, dtype=torch.float64)
    weight = model.weight.detach()
    score = woodfisher(weight, evidence["fisher_inverse"]).reshape(-1)
    for q in range(6):
        assert score[q] == pytest.approx(_refit_error(weight.reshape(-1).double(), matrix, q), rel=1e-3)


@settings(max_examples=30, deadline=None)
@given(c=st.floats(0.01, 100), d=st.floats(0.01, 100))
def test_scale_laws(c, d):
    g = torch.Generator().manual_seed(1)
    weight = torch.randn(3, 4, generator=g, dtype=torch.float64)
    other = torch.rand(3, 4, generator=g, dtype=torch.float64) + 0.1
    torch.testing.assert_close(fisher(c * weight, d * other), c * c * d * fisher(weight, other))
    torch.testing.assert_close(obd(c * weight, d * other), c * c * d * obd(weight, other))
    torch.testing.assert_close(woodfisher(c * weight, d * other), c * c / d * woodfisher(weight, other))
    x = torch.randn(9, 4, generator=g)
    gram = x.t() @ x
    scaled = obs(c * weight, Curvature(d * gram))
    torch.testing.assert_close(scaled, c * c * d * obs(weight, Curvature(gram)), rtol=1e-3, atol=0)
