"""The projection onto the target, and strategies against optima that are known or enumerated."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.errors import NumericalError, RecipeError
from secateur.search import Node, Space, explore, known_optimum, project
from secateur.search.ddpg import Agent, Replay, soft_update, truncated_normal
from secateur.search.explore import best_of
from secateur.search.learning import GraphPolicy, Walk, clipped, log_density, normalized_adjacency
from secateur.search.space import bounded, highest


def linear(units: list[int], prices: list[float], share: float, steps: list[int], known: bool = True) -> Space:
    nodes = tuple(Node(f"n{i}", u, bounded(1, u, s)) for i, (u, s) in enumerate(zip(units, steps, strict=True)))

    def cost(counts: tuple[int, ...]) -> float:
        return 3.0 + sum(p * c for p, c in zip(prices, counts, strict=True))

    least = cost(tuple(n.sizes[0] for n in nodes))
    limit = least + share * (cost(tuple(units)) - least)
    return Space(nodes, cost, limit, tuple(prices) if known else None)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Space, list[float]]:
    n = draw(st.integers(1, 6))
    units = draw(st.lists(st.integers(1, 3000), min_size=n, max_size=n))
    prices = draw(st.lists(st.sampled_from([1.0, 2.0, 9.0, 784.0]), min_size=n, max_size=n))
    steps = draw(st.lists(st.sampled_from([1, 1, 8]), min_size=n, max_size=n))
    wanted = draw(st.lists(st.floats(0.0, 1.0, allow_subnormal=False), min_size=n, max_size=n))
    space = linear(units, prices, draw(st.floats(0.0, 1.0)), steps, draw(st.booleans()))
    return space, wanted


@given(cases())
@settings(max_examples=150, deadline=None)
def test_the_target_is_met_within_one_step(case: tuple[Space, list[float]]) -> None:
    space, wanted = case
    counts = project(space, wanted)
    assert space.cost(counts) <= space.limit
    for i, (node, count) in enumerate(zip(space.nodes, counts, strict=True)):
        assert count in node.sizes
        larger = [s for s in node.sizes if s > count]
        if larger:
            assert space.cost((*counts[:i], larger[0], *counts[i + 1 :])) > space.limit
    assert project(space, space.keeps(counts)) == counts  # what meets the target stays


@given(cases(), st.floats(0.1, 3.0))
@settings(max_examples=50, deadline=None)
def test_a_common_factor_changes_nothing_much(case: tuple[Space, list[float]], factor: float) -> None:
    space, wanted = case
    wanted = [w + 0.01 for w in wanted]
    one, two = project(space, wanted), project(space, [w * factor for w in wanted])
    most = max(n.sizes[-1] for n in space.nodes)
    assert all(abs(a - b) <= max(8, 1e-3 * most) for a, b in zip(one, two, strict=True)) or len(space) > 1
    assert abs(space.cost(one) - space.cost(two)) <= max(p * 8 for p in space.prices or (784.0,))


def test_single_weights_meet_it_exactly() -> None:
    space, _, _ = known_optimum()
    for seed in range(50):
        wanted = torch.rand(len(space), generator=torch.Generator().manual_seed(seed)).tolist()
        counts = project(space, wanted)
        assert sum(counts) == space.limit
        free = [i for i, (c, n) in enumerate(zip(counts, space.nodes, strict=True)) if 1 < c < n.units]
        ratios = [counts[i] / (wanted[i] * space.nodes[i].units) for i in free]
        assert max(ratios) - min(ratios) < 0.05 * max(ratios) + max(
            1 / (wanted[i] * space.nodes[i].units) for i in free
        )


def test_the_largest_size_is_found_by_bisection_as_in_closed_form() -> None:
    units, prices, steps = [40, 17, 100], [3.0, 5.0, 1.0], [8, 1, 1]
    for share in (0.1, 0.5, 0.9):
        a, b = (linear(units, prices, share, steps, known) for known in (True, False))
        for counts in itertools.product((8, 16), (1, 9), (1, 50)):
            for i in range(3):
                assert highest(a, counts, i) == highest(b, counts, i)


def test_what_cannot_be_met_is_refused() -> None:
    nodes = (Node("a", 10, range(5, 11)),)
    with pytest.raises(RecipeError, match="the bounds leave 5"):
        project(Space(nodes, lambda c: float(c[0]), 4.0, (1.0,)), [1.0])
    with pytest.raises(RecipeError, match="one finite number"):
        project(Space(nodes, lambda c: float(c[0]), 6.0, (1.0,)), [math.nan])


def grid() -> tuple[Space, dict[tuple[int, ...], float]]:
    """Three layers of four sizes, and the value of each allocation that is as large as the target lets it be."""
    nodes = tuple(Node(n, 4, range(1, 5), {"flops": float(k)}) for k, n in enumerate("abc"))
    space = Space(nodes, lambda c: float(4 * c[0] + 2 * c[1] + c[2]), 17.0, (4.0, 2.0, 1.0))
    values = {
        c: -3.0 / c[0] - 1.0 / c[1] - 6.0 / c[2]
        for c in itertools.product(range(1, 5), repeat=3)
        if space.cost(c) <= space.limit
    }
    return space, values


@pytest.mark.parametrize("strategy", ["random-search", "evolution", "bayesian", "amc", "graph"])
def test_strategies_find_the_best_of_a_grid(strategy: str) -> None:
    if strategy == "bayesian":
        pytest.importorskip("optuna")
    space, values = grid()
    knobs = {"updates": 1, "hidden": 32} if strategy == "amc" else {}
    trials = explore(space, strategy, values.__getitem__, budget=25, seed=3, knobs=knobs)
    assert len({t.counts for t in trials}) == len(trials)  # nothing is evaluated twice
    assert trials[0].origin == "uniform" and trials[0].value < max(values.values())
    best = max(values.values())
    second = sorted(values.values())[-2]
    assert best_of(trials).value >= (best if strategy != "amc" else second)


def test_a_search_ends_when_there_is_nothing_new() -> None:
    node = Node("a", 4, range(1, 5))
    trials = explore(Space((node,), lambda c: float(c[0]), 2.0, (1.0,)), "evolution", lambda c: 0.0, budget=50)
    assert [t.counts for t in trials] == [(2,)]


def test_values_and_records_are_checked() -> None:
    space, value, _ = known_optimum()
    with pytest.raises(NumericalError, match="evaluation 0 gave nan"):
        explore(space, "evolution", lambda c: math.nan, budget=3)
    with pytest.raises(RecipeError, match="no knob 'sigm'"):
        explore(space, "evolution", value, budget=3, knobs={"sigm": 1})
    with pytest.raises(RecipeError, match="at least 1, not 0"):
        explore(space, "evolution", value, budget=0)
    rows = [t.to_dict() for t in explore(space, "evolution", value, budget=6)]
    with pytest.raises(RecipeError, match="trial 1 of the history"):
        explore(space, "evolution", value, budget=6, seed=9, record=rows)


def test_soft_update_is_its_definition() -> None:
    torch.manual_seed(0)
    a, b = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    expected = [0.9 * x.detach() + 0.1 * y.detach() for x, y in zip(a.parameters(), b.parameters(), strict=True)]
    soft_update(a, b, 0.1)
    for x, y in zip(a.parameters(), expected, strict=True):
        torch.testing.assert_close(x.detach(), y)


def test_replay_forgets_the_oldest_and_draws_each_once() -> None:
    memory = Replay(2, 4)
    for k in range(6):
        memory.add(torch.full((2,), float(k)), 0.1 * k, float(k), torch.full((2,), k + 1.0), k % 2 == 0)
    assert len(memory) == 4
    states, actions, rewards, following, more = memory.sample(10, torch.Generator().manual_seed(0))
    assert sorted(rewards.flatten().tolist()) == [2.0, 3.0, 4.0, 5.0]
    torch.testing.assert_close(states[:, :1], rewards)
    torch.testing.assert_close(following[:, 1:], rewards + 1)
    torch.testing.assert_close(actions, 0.1 * rewards)
    assert more.flatten().tolist() == [float(r % 2 == 0) for r in rewards.flatten().tolist()]


def test_noise_is_a_normal_distribution_cut_off() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.tensor([truncated_normal(0.8, 0.5, generator) for _ in range(4000)], dtype=torch.float64)
    assert drawn.min() >= 0 and drawn.max() <= 1
    phi = lambda x: math.exp(-x * x / 2) / math.sqrt(2 * math.pi)  # noqa: E731
    cdf = lambda x: 0.5 * (1 + math.erf(x / math.sqrt(2)))  # noqa: E731
    low, high = (0 - 0.8) / 0.5, (1 - 0.8) / 0.5
    mean = 0.8 + 0.5 * (phi(low) - phi(high)) / (cdf(high) - cdf(low))
    assert abs(float(drawn.mean()) - mean) < 0.015


def test_one_step_of_the_agent_by_hand() -> None:
    """The critic's error falls, its target moves by tau, and the last step of an episode looks at nothing behind it."""
    agent = Agent(3, torch.Generator().manual_seed(0), hidden=8, batch=4, tau=0.5, rates=(0.0, 1e-2))
    for k in range(4):
        agent.memory.add(torch.rand(3), 0.5, float(k), torch.rand(3), False)
    states, actions, rewards, _, _ = agent.memory.sample(4, torch.Generator().manual_seed(1))

    @torch.no_grad()
    def error() -> float:
        return float((agent.critic(states, actions) - (rewards - rewards.mean())).square().mean())

    first, slow = error(), [p.detach().clone() for p in agent.slow_critic.parameters()]
    agent.learn()
    assert agent.baseline == pytest.approx(1.5)
    assert error() < first
    for old, now, fast in zip(slow, agent.slow_critic.parameters(), agent.critic.parameters(), strict=True):
        torch.testing.assert_close(now.detach(), 0.5 * old + 0.5 * fast.detach())


@given(st.lists(st.floats(0, 1), min_size=6, max_size=6))
@settings(max_examples=50, deadline=None)
def test_clipped_actions_always_leave_enough(keeps: list[float]) -> None:
    space, _, _ = known_optimum()
    walk, chosen = Walk(space), []
    for i, keep in enumerate(keeps):
        chosen.append(walk.clip(i, chosen, keep))
        assert chosen[-1] <= max(1, keep * space.nodes[i].units + 1e-6)
    assert space.cost(tuple(chosen)) <= space.limit
    assert walk.keep(0.5) == pytest.approx(0.25) and walk.action(walk.keep(0.3)) == pytest.approx(0.3)
    state = walk.state(3, chosen[:3])
    saved = sum(space.nodes[i].units - chosen[i] for i in range(3))
    assert state[-3] == pytest.approx(saved / 4000) and state[-1] == pytest.approx((chosen[2] / 100) ** 0.5)
    assert state[-2] == pytest.approx((399 + 599) / 4000)


def test_graph_convolutions_read_neighbors_only() -> None:
    adjacency = normalized_adjacency(4, [(0, 1), (1, 2)])
    degree = [2, 3, 2, 1]
    for i in range(4):
        for j in range(4):
            linked = i == j or {i, j} in ({0, 1}, {1, 2})
            assert float(adjacency[i, j]) == pytest.approx(linked / math.sqrt(degree[i] * degree[j]), abs=1e-6)
    torch.manual_seed(0)
    policy = GraphPolicy(2, 5, adjacency, 2.0)
    x = torch.rand(4, 2, requires_grad=True)
    policy(x)[0].backward()
    assert x.grad is not None
    assert [bool(g.any()) for g in x.grad] == [True, True, True, False]  # two hops, and no path to the last


def test_the_surrogate_is_the_policy_gradient_where_the_policy_has_not_moved() -> None:
    mean = torch.zeros(3, requires_grad=True)
    action, advantage = torch.tensor([[0.3, -1.0, 0.5]]), torch.tensor([2.0])
    before = log_density(action, mean.detach(), 0.7)
    clipped((log_density(action, mean, 0.7) - before).exp(), advantage, 0.2).sum().backward()
    torch.testing.assert_close(mean.grad, 2.0 * action[0] / 0.49)
    whole = torch.distributions.Normal(0.0, 0.7).log_prob(action).sum(-1)
    torch.testing.assert_close(before, whole)
