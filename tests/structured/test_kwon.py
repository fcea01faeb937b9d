"""The mask search of Kwon et al. against exhaustive search and the pseudo-code of the paper."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.nets import Call, noise
from torch import Tensor, nn

import secateur
from secateur import Recipe
from secateur.criteria.saliency import mask_fisher, rearranged
from secateur.select import select


def together(change_bu: Tensor, gone: list[int]) -> float:
    """What the loss changes when these go together: twice the quadratic form of the Fisher between them."""
    return float(change_bu[:, gone].sum(1).square().sum())


def exhaustive(change_bu: Tensor, count: int) -> float:
    units = change_bu.shape[1]
    return min(together(change_bu, list(gone)) for gone in combinations(range(units), units - count))


def as_written(change_bu: Tensor, count: int) -> list[int]:
    """The paper's greedy exchange with lists, each sum anew; the units that go."""
    order = change_bu.square().sum(0).argsort(stable=True).tolist()
    gone = order[: len(order) - count]
    for unit in order[len(order) - count :]:
        tried = [*gone, unit]
        costs = [together(change_bu, [u for u in tried if u != back]) for back in tried]
        gone = [u for k, u in enumerate(tried) if k != costs.index(min(costs))]
    return sorted(gone)


def diagonal(change_bu: Tensor, count: int) -> Tensor:
    return select(change_bu.square().sum(0)[None], count)[0]


@settings(max_examples=60, deadline=None)
@given(units=st.integers(2, 9), batches=st.integers(1, 12), share=st.floats(0.05, 0.95), seed=st.integers(0, 999))
def test_the_exchange_is_the_papers_and_never_worse_than_the_ranking(
    units: int, batches: int, share: float, seed: int
) -> None:
    change = torch.randn(batches, units, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    count = max(1, min(units - 1, round(share * units)))
    first = diagonal(change, count)
    kept = rearranged(change, first)
    gone = (~kept).nonzero()[:, 0].tolist()
    assert int(kept.sum()) == count
    assert gone == as_written(change, count)
    least, ranked = exhaustive(change, count), together(change, (~first).nonzero()[:, 0].tolist())
    assert least - 1e-9 <= together(change, gone) <= ranked + 1e-9
    assert torch.equal(rearranged(change, first, 0), first)


@settings(max_examples=30, deadline=None)
@given(units=st.integers(2, 8), count=st.integers(1, 7), seed=st.integers(0, 999))
def test_at_the_end_of_all_sweeps_no_exchange_of_two_helps(units: int, count: int, seed: int) -> None:
    count = min(count, units - 1)
    change = torch.randn(6, units, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    kept = rearranged(change, diagonal(change, count), 100)
    gone = (~kept).nonzero()[:, 0].tolist()
    for out in gone:
        for other in kept.nonzero()[:, 0].tolist():
            assert together(change, gone) <= together(change, [u for u in gone if u != out] + [other]) + 1e-9


def test_where_units_do_not_interact_it_is_the_ranking() -> None:
    sizes = torch.tensor([3.0, 1.0, 2.0, 5.0, 4.0])
    change = torch.diag(sizes).double()
    for count in range(6):
        kept = rearranged(change, diagonal(change, count), 5)
        assert kept.nonzero()[:, 0].tolist() == sorted(sizes.argsort(descending=True)[:count].tolist())


def test_units_that_cancel_go_together() -> None:
    change = torch.tensor([[3.0, -3.0, 1.0, 1.0], [2.0, -2.0, 0.5, 1.0]])
    assert diagonal(change, 2).tolist() == [True, True, False, False]
    assert rearranged(change, diagonal(change, 2), 2).tolist() == [False, False, True, True]
    assert together(change, [0, 1]) == exhaustive(change, 2) == 0.0


def branches() -> nn.Module:
    """Two branches on a residual width; the second is gone through twice, so its neurons cost twice as much."""
    torch.manual_seed(0)

    def forward(m: Any, x: Tensor) -> Tensor:
        x = x + m.a2(F.relu(m.a1(x)))
        for _ in range(2):
            x = x + m.b2(F.relu(m.b1(x)))
        return m.head(x)

    parts = {"a1": nn.Linear(6, 12), "a2": nn.Linear(12, 6), "b1": nn.Linear(6, 9), "b2": nn.Linear(9, 6)}
    return Call(forward, **parts, head=nn.Linear(6, 3)).eval()


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def batches(count: int = 10) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(4, 6, generator=g), torch.randint(0, 3, (4,), generator=g)) for _ in range(count)]


def gates(net: nn.Module, data: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Derivatives of the loss by masks on the neurons, ``(batches, units)``, through the masks themselves."""
    found: dict[str, list[Tensor]] = {"a2": [], "b2": []}
    masks = {n: torch.ones(net.get_submodule(n).in_features, requires_grad=True) for n in found}  # type: ignore[arg-type]
    hooks = [
        net.get_submodule(n).register_forward_pre_hook(lambda module, args, m=m: (args[0] * m,))
        for n, m in masks.items()
    ]
    for batch in data:
        for n, g in zip(found, torch.autograd.grad(loss(net, batch), list(masks.values())), strict=True):
            found[n].append(g)
    for hook in hooks:
        hook.remove()
    return {n: torch.stack(gs) for n, gs in found.items()}


@pytest.mark.parametrize("share", [25, 45, 60])
@pytest.mark.parametrize("sweeps", [0, 1])
def test_the_search_on_a_network(share: int, sweeps: int) -> None:
    net, data = branches(), batches()
    plan = secateur.plan(
        net, "kwon", target=f"flops {share}%", example=noise(1, 6), data=data, loss=loss, multiple=1, recovery="none",
        knobs={"criterion": {"sweeps": sweeps}},
    )  # fmt: skip
    assert plan.proof.proven
    change = gates(net, data)
    stays = {n: sorted(plan.kept.get(f"{n}.weight", {}).get(1, range(change[n].shape[1]))) for n in change}
    counts = {n: len(s) for n, s in stays.items()}
    for n, g in change.items():  # which ones: the ranking, or what the exchange makes of it
        wanted = rearranged(g.double(), diagonal(g, counts[n]), sweeps)
        assert stays[n] == wanted.nonzero()[:, 0].tolist()
    # How many: the most information within the FLOPs, as the paper enumerates, but for one unit.
    value = {n: g.double().square().sum(0).sort(descending=True).values for n, g in change.items()}
    cost = {"a2": 2.0, "b2": 4.0}  # a neuron's operations, in units that do not matter
    per = (plan.before["flops"] - plan.after["flops"]) / sum(
        cost[n] * (len(value[n]) - counts[n]) for n in value
    )  # fmt: skip
    room = (plan.target.remaining(plan.before["flops"]) - plan.before["flops"]) / per + sum(
        cost[n] * len(value[n]) for n in value
    )
    total = max(
        float(value["a2"][:a].sum() + value["b2"][:b].sum())
        for a in range(2, 13)
        for b in range(1, 10)
        if cost["a2"] * a + cost["b2"] * b <= room + 1e-6
    )
    ours = sum(float(v[: counts[n]].sum()) for n, v in value.items())
    dear = max(float(v[counts[n]]) for n, v in value.items() if counts[n] < len(v))
    assert total - dear - 1e-9 <= ours <= total + 1e-9


def test_the_score_is_information_for_a_flop() -> None:
    change, flops = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([1.0, 2.0, 4.0, 1.0])
    wanted = torch.stack([(change[:, u] ** 2).sum() / 5 / 2 / flops[u] for u in range(4)])
    torch.testing.assert_close(mask_fisher(change, flops), wanted)
    assert Recipe.of("kwon").needs_loss


def test_healed_by_least_squares_it_is_nearer_to_the_dense_model() -> None:
    net, data = branches(), batches(40)
    made = {}
    for recovery in ("none", "refit"):
        plan = secateur.plan(
            net, "kwon", target="flops 40%", example=noise(1, 6), data=data, loss=loss, multiple=1, recovery=recovery
        )
        x = noise(200, 6, seed=9)
        with torch.no_grad():
            made[recovery] = float((plan.shrink()(x) - net(x)).square().mean())
    assert made["refit"] < made["none"]
