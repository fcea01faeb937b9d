"""What a training run costs, against closed forms on a small network of linear layers."""

from __future__ import annotations

import pytest
import torch

import secateur
from tests.when.runs import attached, batch, mlp, run, sgd

X = batch(0)[0]
SIZES = (12 * 24, 24 * 16, 16 * 4)


def forward(densities: list[float]) -> float:
    """Operations of one forward pass: two for each example and weight."""
    return sum(2 * len(X) * d * n for d, n in zip(densities, SIZES, strict=True))


def densities(session: secateur.Session) -> list[float]:
    return [session.masks[x.name].double().mean().item() for x in session.layers]


def test_a_dense_step_is_three_forward_passes() -> None:
    model = mlp()
    session = secateur.attach(model, "gmp", sparsity=0.5, steps=100, knobs={"driver": {"begin": 0.9, "end": 1.0}})
    optimizer = sgd(model)
    for _ in run(model, optimizer, session, 0, 5):
        pass
    cost = session.flops(X)
    assert cost.total == cost.dense == pytest.approx(5 * 3 * forward([1, 1, 1])) and cost.ratio == 1


def test_rigl_pays_for_dense_gradients_at_its_exchanges_alone() -> None:
    """(3 f_S (t - 1) + 2 f_S + f_D) / t with an exchange every t steps, as in the appendix of RigL."""
    model = mlp()
    optimizer = sgd(model)
    session = attached(model, "rigl", optimizer, steps=100, knobs={"driver": {"every": 5}})
    for _ in run(model, optimizer, session, 0, 50):
        pass
    sparse, dense = forward(densities(session)), forward([1, 1, 1])
    assert session.flops(X).total == pytest.approx(10 * (3 * sparse * 4 + 2 * sparse + dense))
    static = attached(mlp(), "set", optimizer, steps=100, knobs={"driver": {"every": 5}})
    other = static.model
    stepper = sgd(other)
    for _ in run(other, stepper, static, 0, 50):
        pass
    assert static.flops(X).total == pytest.approx(50 * 3 * sparse)


def test_gmp_costs_what_its_schedule_leaves() -> None:
    model = mlp()
    optimizer = sgd(model)
    session = attached(model, "gmp", optimizer, knobs={"driver": {"every": 3}})
    expected = 0.0
    for _ in range(24):
        expected += 3 * forward(densities(session))
        next(run(model, optimizer, session, session.at, session.at + 1))
    assert session.flops(X).total == pytest.approx(expected)


@pytest.mark.parametrize("method, gradient", [("sr-ste", 1.0), ("top-kast", 0.5), ("movement", 1.0), ("snfs", 1.0)])
def test_gradients_that_a_method_reads_are_paid_for(method: str, gradient: float) -> None:
    model = mlp()
    optimizer = sgd(model)
    session = attached(model, method, optimizer)
    expected = 0.0
    for _ in range(24):
        here = densities(session)
        expected += 2 * forward(here) + forward([gradient] * 3)
        next(run(model, optimizer, session, session.at, session.at + 1))
    assert session.flops(X).total == pytest.approx(expected)


def test_soft_pruning_saves_nothing_until_it_is_hard() -> None:
    torch.manual_seed(0)
    model = mlp()
    optimizer = sgd(model)
    more = {"example": X, "target": "params 50%", "multiple": 1, "knobs": {"driver": {"every": 4, "until": 0.5}}}
    session = secateur.attach(model, "sfp", optimizer=optimizer, steps=24, **more)
    for k in run(model, optimizer, session):
        if k == 12:
            assert session.flops(X).ratio == 1
    sparse = forward(densities(session))
    assert session.flops(X).total == pytest.approx(12 * 3 * forward([1, 1, 1]) + 12 * 3 * sparse)
    assert sparse < 0.6 * forward([1, 1, 1])


def test_explored_is_the_share_that_has_been_there() -> None:
    """ITOP's R_s, against the union of the masks."""
    model = mlp()
    optimizer = sgd(model)
    session = attached(model, "rigl-itop", optimizer)
    ever = {x.name: session.masks[x.name] for x in session.layers}
    for _ in run(model, optimizer, session):
        ever = {n: m | session.masks[n] for n, m in ever.items()}
    seen = sum(int(m.sum()) for m in ever.values()) / sum(m.numel() for m in ever.values())
    assert session.explored == seen and 0.3 < seen < 1
