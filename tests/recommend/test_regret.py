"""The score of the recommender: honest leave-one-out, and regrets by hand."""

from __future__ import annotations

import random

import pytest

from secateur.recommend.cells import Cell, Outcome
from secateur.recommend.rank import Evidence
from secateur.recommend.regret import chosen, regret_of, score, situation_of
from secateur.recommend.subject import Subject
from tests.recommend.rows import METHODS, study, world


def by_kind(kind: str, method: str, draw: random.Random) -> float:
    """What is best for one kind is worst for the other."""
    order = METHODS if kind == "cnn" else METHODS[::-1]
    return 0.01 + 0.02 * order.index(method) + 0.005 * draw.random()


def test_it_halves_the_regret_where_kinds_tell() -> None:
    found = score(world(3, by_kind))
    assert found["verdict"][0]["halved"]
    assert found["policies"]["recommender"]["spreads"]["mean"] < found["policies"]["random"]["spreads"]["mean"] / 2
    assert found["intervals"]["held"] > 0.6
    assert found["policies"]["recommender"]["tasks"] == 6


def test_it_says_by_how_much_it_falls_short() -> None:
    runs = world(2, lambda kind, method, draw: 0.05 + 0.02 * draw.random())
    (verdict, *_) = score(runs, choose=lambda cell, _: max(cell.outcomes, key=lambda o: o.drop))["verdict"]
    assert verdict["halved"] is False
    assert verdict["short"] == pytest.approx(verdict["recommender"] - verdict["fixed"] / 2)
    assert f"falls short by {verdict['short']:.3f}" in verdict["text"]


def test_nothing_of_the_task_that_is_left_out_is_in_the_evidence() -> None:
    runs = world(2, by_kind)
    twice = [type(r)(r.row, "another study", r.subject) for r in runs if r.subject.name == "cnn-0"]

    def look(cell: Cell, evidence: Evidence) -> Outcome:
        assert evidence.cells
        assert all(c.subject.name != cell.subject.name for c in evidence.cells)
        assert situation_of(cell).model == ""
        return cell.outcomes[0]

    assert score(runs + twice, choose=look)["policies"]["recommender"]["tasks"] == 4


def test_the_choice_does_not_depend_on_the_scores_that_it_is_judged_by() -> None:
    evidence = Evidence.of(world(2, by_kind))
    cell = next(c for c in evidence.cells if c.subject.name == "cnn-0")
    rest = evidence.without("cnn-0")
    turned = study("study cnn 0", Subject("cnn-0", "cnn", 10**6), {m: 0.3 - 0.03 * k for k, m in enumerate(METHODS)})
    other = next(c for c in Evidence.of(turned).cells if c.target == cell.target)
    assert chosen(cell, rest).label == chosen(other, rest).label


def test_regrets_by_hand() -> None:
    drops = {"magnitude": 0.1, "wanda": 0.2, "random": 0.4}
    found = score(study("s", Subject("n", "cnn", 9), drops, targets=("0.5",), noise=0.0, dense=1.0))
    policies = found["policies"]
    assert policies["always magnitude"]["spreads"]["mean"] == 0.0
    assert policies["always wanda"]["spreads"]["mean"] == pytest.approx(1.0)
    assert policies["always random"]["spreads"]["mean"] == pytest.approx(3.0)
    assert policies["random"]["spreads"]["mean"] == pytest.approx(4 / 3)
    assert policies["default"] == policies["always wanda"]  # what `secateur prune` takes for a model
    assert policies["always random"]["raw"] == {"n": pytest.approx(0.3)}
    assert policies["always random"]["drop"] == {"mean": pytest.approx(0.3), "half": None}
    assert found["verdict"][0]["halved"] is None  # one task: the best fixed choice would be the best by definition


def test_a_contender_that_failed_has_the_regret_of_the_worst() -> None:
    (cell,) = Evidence.of(study("s", Subject("n", "cnn", 9), {"magnitude": 0.1, "random": 0.3}, targets=("0.5",))).cells
    worst = max(cell.outcomes, key=lambda o: o.drop)
    failed = Outcome("failed", worst.candidate, worst.drop, None, 2, 2)
    assert regret_of(cell, failed).raw == pytest.approx(regret_of(cell, worst).raw)


def test_no_runs_no_score() -> None:
    found = score([])
    assert (found["tasks"], found["policies"], found["verdict"]) == ([], {}, [])
