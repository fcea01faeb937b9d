"""Ranks, predictions and what they rest on: by hand on small evidence, and their bounds on any."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur import Recipe
from secateur.recommend import Goal, Hardware, Situation, predict
from secateur.recommend.aim import fit
from secateur.recommend.candidate import Aim, Candidate
from secateur.recommend.distance import closeness, likeness, relevance, same
from secateur.recommend.rank import BELIEF, POINT, POOLED, Evidence, effect, shrinkage
from secateur.recommend.subject import Subject
from secateur.registry import get, parts
from tests.recommend.rows import study

CNN = Subject("net", "cnn", 1_000_000)
HERE = Situation("cnn", 1_000_000, "", goal=Goal.parse("sparsity 0.5"), data="unlabeled")


def candidate(name: str, situation: Situation = HERE) -> Candidate:
    return fit(Candidate.of(get("method", name)), situation)


def test_the_effect_of_one_study_by_hand() -> None:
    runs = study("s", CNN, {"magnitude": 0.1, "obc": 0.0, "random": 0.2}, targets=("0.5",), noise=0.0)
    evidence = Evidence.of(runs)
    found = effect(evidence, HERE, candidate("obc"), points=2.0)
    assert (found.direct, found.tasks, found.runs, found.studies) == (0.0, 1.0, 2, ("s",))
    kin = [likeness(candidate("obc").profile, candidate(m).profile) for m in ("magnitude", "random")]
    weights = [k**6 for k in kin if k >= 0.5]
    if not weights:
        assert found.prior == pytest.approx(1 - 2 * POINT)
    base = (0.0 + evidence.ratio * found.prior) / (1 + evidence.ratio)
    assert found.value == pytest.approx((1 * 0.0 + POOLED * base) / (1 + POOLED))
    plain = effect(evidence, HERE, candidate("magnitude"), points=0.0)
    assert plain.direct == pytest.approx(1.0)
    like = likeness(candidate("magnitude").profile, candidate("random").profile)
    to_obc = likeness(candidate("magnitude").profile, candidate("obc").profile)
    strength = like**6 + (to_obc**6 if to_obc >= 0.5 else 0)
    mean = (like**6 * 2.0 + (to_obc**6 * 0.0 if to_obc >= 0.5 else 0)) / strength
    assert plain.prior == pytest.approx((strength * mean + BELIEF * 1.0) / (strength + BELIEF))


def test_without_runs_the_rules_decide() -> None:
    found = effect(Evidence.of([]), HERE, candidate("magnitude"), points=3.0)
    assert (found.value, found.direct, found.runs, found.kin) == (pytest.approx(1 - 3 * POINT), None, 0, 0)
    assert "rules alone" in str(found)


def test_more_tasks_move_an_effect_further_from_its_prior() -> None:
    def value(tasks: int) -> float:
        runs = [
            run
            for k in range(tasks)
            for run in study(f"s{k}", Subject(f"net{k}", "cnn", 10**6), {"obc": 0.0, "magnitude": 0.2, "random": 0.3})
        ]
        return effect(replace(Evidence.of(runs), ratio=1.0), HERE, candidate("obc"), -2.0).value

    values = [value(k) for k in (1, 2, 4, 8)]
    assert values == sorted(values, reverse=True)


def test_shrinkage_is_strong_where_methods_do_not_differ() -> None:
    def ratio(spread: float, noise: float) -> float:
        draw = random.Random(1)
        runs = []
        for k in range(6):
            names = ("magnitude", "lamp", "wanda", "obc", "ria")
            drops = {m: 0.1 + spread * i + noise * draw.random() for i, m in enumerate(names)}
            runs += study(f"s{k}", Subject(f"net{k}", "cnn", 10**6), drops, targets=("0.5",), noise=0.0)
        return Evidence.of(runs).ratio

    assert ratio(0.05, 0.001) == 0.25
    assert ratio(0.0, 0.05) > 1
    assert shrinkage([]) == 1.0


def test_nearness() -> None:
    (cell,) = Evidence.of(study("s", CNN, {"magnitude": 0.1}, targets=("0.5",))).cells
    near = relevance(HERE, cell)
    assert near == 1.0
    assert relevance(replace(HERE, kind="vit"), cell) == pytest.approx(math.exp(-1))
    assert relevance(replace(HERE, parameters=10**7), cell) == pytest.approx(math.exp(-0.5))
    assert relevance(replace(HERE, kind="decoder"), replace(cell, own=True)) == pytest.approx(2 * math.exp(-1.5))
    assert relevance(replace(HERE, kind="decoder", parameters=9, model="net"), cell) == 1.0
    a = Aim("weights", "weights", 0.2)
    assert closeness(a, a) == 1.0
    assert closeness(a, Aim("weights", "weights", 0.1)) == closeness(a, Aim("weights", "weights", 0.4))
    assert closeness(a, Aim("units", "flops", 0.2)) == pytest.approx(math.exp(-1.5))


@given(st.sampled_from(sorted(parts("method"))), st.sampled_from(sorted(parts("method"))))
def test_likeness_is_symmetric_and_one_for_itself(one: str, other: str) -> None:
    a, b = (Candidate.of(get("method", n)) for n in (one, other))
    assert likeness(a.profile, a.profile) == 1.0
    assert likeness(a.profile, b.profile) == likeness(b.profile, a.profile)
    assert 0.0 <= likeness(a.profile, b.profile) <= 1.0
    assert same(a, a.fitted())


def test_a_recipe_of_ones_own_is_the_method_that_it_agrees_with() -> None:
    mine = replace(candidate("wanda"), recipe=Recipe(criterion="wanda", granularity="row", sparsity=0.9))
    assert same(mine, candidate("wanda"))
    assert not same(mine, candidate("ria"))


def test_a_prediction_says_what_it_rests_on() -> None:
    runs = [
        run for k, drop in enumerate((0.02, 0.04, 0.06))
        for run in study(f"study {k}", Subject(f"net{k}", "cnn", 10**6), {"obc": drop, "magnitude": 0.2}, noise=0.0)
    ]  # fmt: skip
    evidence = Evidence.of(runs)
    obc = candidate("obc")
    found = predict.loss(evidence, HERE, obc, effect(evidence, HERE, obc, 0.0))
    assert found.value == pytest.approx(0.04)
    half = 1.886 * 0.02 * math.sqrt(1 + 1 / 3)  # Student's t with two degrees of freedom
    assert (found.low, found.high) == (pytest.approx(0.04 - half), pytest.approx(0.04 + half))
    assert found.source.startswith("from 6 runs in 3 studies (net0, net1, net2)")
    other = candidate("admm")
    guess = predict.loss(evidence, HERE, other, effect(evidence, HERE, other, 0.0))
    assert "none of this method" in guess.source


def test_one_task_gives_no_interval_and_far_ones_no_prediction() -> None:
    evidence = Evidence.of(study("s", CNN, {"obc": 0.1, "magnitude": 0.2}, noise=0.0))
    obc = candidate("obc")
    found = predict.loss(evidence, HERE, obc, effect(evidence, HERE, obc, 0.0))
    assert (found.value, found.low) == (pytest.approx(0.1), None)
    far = replace(HERE, kind="decoder")
    assert predict.loss(evidence, far, obc, effect(evidence, far, obc, 0.0)).value is None
    apart = replace(obc, aim=Aim("weights", "weights", 0.01))
    assert predict.loss(evidence, HERE, apart, effect(evidence, HERE, apart, 0.0)).value is None


def test_speed_is_that_of_runs_on_such_hardware() -> None:
    runs = study("s", CNN, {"obc": 0.1, "magnitude": 0.2}, targets=("0.5",), noise=0.0)

    def timed(ratio: float, instructions: str) -> Evidence:
        measured = {"latency": {"ratio": ratio}, "environment": {"machine": {"instructions": instructions}}}
        return Evidence.of(replace(r, row=replace(r.row, result={**r.row.result, **measured})) for r in runs)

    here = replace(HERE, hardware=Hardware.parse("cpu avx2"))
    obc = candidate("obc", here)
    assert predict.speed(timed(3.0, "AVX2"), here, obc).value == pytest.approx(3.0)
    assert predict.speed(timed(3.0, "AVX512"), here, obc) == obc.speed
    assert predict.speed(timed(0.0, "AVX2"), here, obc) == obc.speed  # a time that is none
    assert predict.speed(timed(3.0, "AVX2"), replace(here, hardware=Hardware.parse("h100")), obc) == obc.speed
