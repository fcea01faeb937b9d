"""The conformance suite passes what is registered, and catches what breaks a promise."""

from __future__ import annotations

import pytest
import torch

import secateur.allocation
import secateur.criteria  # noqa: F401 - registers
from secateur import registry, testing
from secateur.granularity import parse
from secateur.registry import parts, register
from secateur.select import select
from secateur.solvers import rank, sparsegpt  # noqa: F401 - registers
from secateur.solvers.base import Solved

CARD = """A part.

    :: s = 1

    Choose it for nothing.

    Source: none.
    """


@pytest.fixture
def enter(monkeypatch):
    """Registers parts for one test only."""
    monkeypatch.setattr(registry, "_parts", {k: dict(v) for k, v in registry._parts.items()})

    def put(kind, function, doc=CARD, **facts):
        function.__doc__ = doc
        register(kind, "mine", **facts)(function)

    return put


@pytest.mark.parametrize("name", parts("criterion"))
def test_criteria(name):
    testing.check_criterion(name)


@pytest.mark.parametrize("name", parts("solver"))
def test_solvers(name):
    testing.check_solver(name)


@pytest.mark.parametrize("name", parts("allocation"))
def test_allocations(name):
    testing.check_allocation(name)


@pytest.mark.parametrize("text", ["element", "row", "1:2", "2:4", "4:8", "block(2,4)", "block(4,4)"])
def test_granularities(text):
    testing.check_granularity(text)


def _modifies(weight):
    return weight.abs_()


def _stateful(weight, *, calls=[]):  # noqa: B006 - the state is the point
    calls.append(1)
    return weight * len(calls)


BAD_CRITERIA = {
    "shape": (lambda weight: weight.sum(0), {}, "returns shape"),
    "integer": (lambda weight: weight.sign().int(), {}, "torch.int32"),
    "list": (lambda weight: weight.tolist(), {}, "not a tensor"),
    "nan": (lambda weight: weight / 0 * 0, {}, "not finite"),
    "zero over zero": (lambda weight: weight / weight.sum(), {}, "not finite where 'weight' is zero"),
    "modifies": (_modifies, {}, "modifies its input 'weight'"),
    "state": (_stateful, {}, "different scores for the same facts"),
    "global random": (lambda weight: torch.rand(weight.shape), {}, "different scores for the same facts"),
    "half": (lambda weight: weight.half(), {}, "torch.float16"),
    "scale": (lambda weight: weight.abs(), {"scales": {"weight": 2}}, "does not scale with degree 2"),
    "scale of nothing": (lambda weight: weight.abs(), {"scales": {"gradient": 1}}, "which it does not need"),
    "unknown fact": (lambda moonlight: moonlight, {}, "'moonlight', which is not a known fact"),
}


@pytest.mark.parametrize("case", BAD_CRITERIA)
def test_a_broken_criterion_is_caught(enter, case):
    function, facts, message = BAD_CRITERIA[case]
    enter("criterion", function, **facts)
    with pytest.raises(AssertionError, match=message):
        testing.check_criterion("mine")


def test_a_criterion_may_bring_its_own_facts(enter):
    enter("criterion", lambda moonlight: moonlight)
    testing.check_criterion("mine", {"moonlight": lambda s, g, d: torch.randn(s, generator=g, dtype=d)})


@pytest.mark.parametrize(
    "missing,message",
    [(":: s = 1", "no formula"), ("Choose it for nothing.", "no choose"), ("Source: none.", "no source")],
)
def test_an_incomplete_card_is_caught(enter, missing, message):
    enter("criterion", lambda weight: weight.abs(), CARD.replace(missing, ""))
    with pytest.raises(AssertionError, match=message):
        testing.check_criterion("mine")


def test_a_knob_without_a_default_is_caught(enter):
    def function(weight, *, power):
        return weight.abs() ** power

    enter("criterion", function)
    with pytest.raises(AssertionError, match="knob 'power' without a default"):
        testing.check_criterion("mine")


def _ranked(weight, keep, granularity):
    mask = granularity.unpool(select(granularity.pool(weight.abs()), keep), weight.shape)
    return Solved(weight * mask, mask)


def _keeps_all(weight, keep, granularity):
    return Solved(weight, torch.ones_like(weight, dtype=torch.bool))


def _forgets_to_zero(weight, keep, granularity):
    return Solved(weight.clone(), _ranked(weight, keep, granularity).mask)


def _in_place(weight, keep, granularity):
    solved = _ranked(weight, keep, granularity)
    return Solved(weight.mul_(solved.mask), solved.mask)


def _ignores_granularity(weight, keep, granularity):
    mask = select(weight.abs().reshape(1, -1), keep).reshape(weight.shape)
    return Solved(weight * mask, mask)


@pytest.mark.parametrize(
    "function,message",
    [
        (_keeps_all, "keeps 128 weights, not 32"),
        (_forgets_to_zero, "leaves weights outside its mask"),
        (_in_place, "modifies its input 'weight'"),
        (_ignores_granularity, "does not keep the same number|breaks a unit"),
        (lambda weight, keep, granularity: weight, "not Solved"),
    ],
)
def test_a_broken_solver_is_caught(enter, function, message):
    enter("solver", function)
    with pytest.raises(AssertionError, match=message):
        testing.check_solver("mine")


def test_a_sound_solver_passes(enter):
    enter("solver", lambda weight, keep, granularity: _ranked(weight, keep, granularity))
    testing.check_solver("mine")


def _first_comes_first(layers, *, sparsity):
    budget, keeps = (1 - sparsity) * sum(x.numel for x in layers.values()), {}
    for name, x in layers.items():
        keeps[name] = min(1.0, budget / x.numel)
        budget -= keeps[name] * x.numel
    return keeps


@pytest.mark.parametrize(
    "function,message",
    [
        (lambda layers, *, sparsity: dict.fromkeys(layers, sparsity), "not"),
        (lambda layers, *, sparsity: dict.fromkeys(list(layers)[1:], 1 - sparsity), "exactly the layers"),
        (lambda layers, *, sparsity: dict.fromkeys(layers, 1.5), "keeps a fraction 1.5"),
        (_first_comes_first, "depends on the order"),
    ],
)
def test_a_broken_allocation_is_caught(enter, function, message):
    enter("allocation", function)
    with pytest.raises(AssertionError, match=message):
        testing.check_allocation("mine")


def test_an_allocation_that_measures_gets_a_sketch_of_each_layer(enter):
    seen = []

    def looks(layers, *, sparsity):
        seen.extend(x.sketch for x in layers.values())
        return dict.fromkeys(layers, 1 - sparsity)

    enter("allocation", looks, measure=lambda weight, input_norm: weight.abs() * input_norm)
    testing.check_allocation("mine")
    assert seen and all(s is not None for s in seen) and len({s.total for s in seen}) > 3


@pytest.mark.parametrize(
    "change,message",
    [
        ({"split": lambda m: parse("block(2,4)").split(m).flip(1)}, "join what it split"),
        ({"pool_shape": lambda o, i: (2, o * i // 16, 8)}, "not as pool_shape says"),
        (
            {"split": lambda m: parse("block(2,4)").split(m)[:, :1].expand(1, 16, 8)},
            "each element into one unit",
        ),
        ({"unpool": lambda mask, shape: torch.ones(shape, dtype=torch.bool)}, "keeps another number"),
        ({"run": 3}, "runs of 3 columns"),
    ],
)
def test_a_broken_granularity_is_caught(monkeypatch, change, message):
    broken = parse("block(2,4)")
    for name, value in change.items():
        object.__setattr__(broken, name, value)  # frozen, but this is sabotage
    monkeypatch.setattr(testing, "parse", lambda text: broken)
    with pytest.raises(AssertionError, match=message):
        testing.check_granularity("mine")
