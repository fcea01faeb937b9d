"""Curves, fronts, spread over seeds, lost groups: against brute force and small cases worked out by hand."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.compare.analysis import analyze, curves, nondominated, pareto, sensitivity
from secateur.compare.capability import capabilities
from secateur.compare.rows import Row
from secateur.compare.sketch import pack
from secateur.errors import DataError

from .made import row, rows


@given(st.lists(st.lists(st.integers(0, 4), min_size=2, max_size=3).map(lambda x: (x * 2)[:3]), min_size=1, max_size=9))
@settings(max_examples=80, deadline=None)
def test_front_is_that_of_brute_force(points: list[list[int]]) -> None:
    found = nondominated(np.array(points, float))
    for i, mine in enumerate(points):
        beaten = False
        for theirs in points:
            no_worse = all(t >= m for t, m in zip(theirs, mine, strict=True))
            beaten = beaten or (no_worse and any(t > m for t, m in zip(theirs, mine, strict=True)))
        assert bool(found[i]) is not beaten


def study() -> list[Row]:
    """Two subjects, three contenders, two targets, three seeds; one run of one contender failed."""
    generator = np.random.default_rng(0)
    made: list[Row] = []
    for subject, metric, up in (("net", "accuracy", True), ("text", "perplexity", False)):
        for label, loss in (("dense", 0.0), ("good", 0.05), ("bad", 0.2), ("risky", 0.05)):
            for target in ("",) if label == "dense" else ("0.5", "0.9"):
                for seed in range(3):
                    sparsity = float(target or 0)
                    score = 0.9 - loss * (1 + sparsity) + 0.002 * generator.normal()
                    score = score if up else 10 / score
                    mask = generator.random(64) > sparsity
                    made.append(
                        row(
                            label,
                            target,
                            seed,
                            score,
                            subject=subject,
                            metric=metric,
                            up=up,
                            failed=label == "risky" and target == "0.9" and seed == 2,
                            sparsity=sparsity,
                            effective_flops=1000 * (1 - sparsity),
                            bytes=4096,
                            groups={"shirt": score * 0.9, "bag": score},
                            cost={"seconds": 1.0 + seed, "epochs": 2.0},
                            layers=[
                                {"name": "a", "parameters": 50, "kept": 0 if target == "0.9" else 25},
                                {"name": "b", "parameters": 50, "kept": 10},
                            ],
                            sketch=pack([mask[:32], mask[32:]]),
                        )
                    )
    return made


def test_curves_hold_scores_and_every_axis_that_was_measured() -> None:
    found = {(curve.subject, curve.label): curve for curve in curves(study())}
    good = found["net", "good"]
    assert [point.target for point in good.points] == ["0.5", "0.9"]
    assert set(good.points[0].at) == {"sparsity", "effective_flops", "bytes", "seconds", "epochs"}
    assert (good.points[0].at["seconds"], good.points[0].low["seconds"], good.points[0].high["seconds"]) == (2, 1, 3)
    assert good.points[0].score.n == 3 and (good.points[0].score.low or 0) < (good.points[0].score.value or 0)
    assert found["net", "risky"].points[1].score.failures == 1
    assert found["net", "dense"].points[0].target == ""
    assert found["text", "good"].points[0].score.scale == "ratio"


def test_pareto_says_what_is_off_the_front_and_what_is_shown_to_be() -> None:
    net, text = pareto(study(), "effective_flops")
    assert (net.subject, text.subject, text.higher_is_better) == ("net", "text", False)
    for front in (net, text):
        points = {(point.label, point.target): point for point in front.points}
        assert ("risky", "0.9") not in points  # one of its runs failed
        assert points["dense", ""].front and points["good", "0.9"].front
        bad = points["bad", "0.5"]
        assert not bad.front and bad.shown and bad.beaten_by in {("good", "0.5"), ("risky", "0.5")}
        # Of two whose true means are the same one lies off the front, and is not shown to.
        loser = points["good", "0.5"] if points["risky", "0.5"].front else points["risky", "0.5"]
        assert not loser.front and not loser.shown
    assert pareto(study(), "latency") == []
    with pytest.raises(DataError, match="no axis 'speed'"):
        pareto(study(), "speed")


def test_sensitivity_takes_variance_apart() -> None:
    made = rows({"a": [1.0, 2.0, 3.0], "b": [2.0, 3.0, 4.5], "lone": [9.0]})
    (found,) = sensitivity(made)
    variances = [np.var([1, 2, 3], ddof=1), np.var([2, 3, 4.5], ddof=1)]
    assert dict(found.within) == pytest.approx({"a": 1.0, "b": math.sqrt(variances[1])})
    assert found.seed == pytest.approx(math.sqrt(np.mean(variances)))
    between = np.var([2.0, 9.5 / 3], ddof=1) - np.mean(variances) / 3
    assert found.between == pytest.approx(math.sqrt(between))
    assert found.share == pytest.approx(between / (between + np.mean(variances)))
    assert found.paired == pytest.approx(math.sqrt(np.var([1, 1, 1.5], ddof=1) / 2))
    assert found.flips == 0.0
    (flipped,) = sensitivity(rows({"a": [1.0, 2.0, 3.0], "b": [2.0, 3.0, 1.9]}))
    assert flipped.flips == pytest.approx(1 / 3)
    # With many seeds the share is what it was made of: 4 / (4 + 1).
    generator = np.random.default_rng(0)
    many = {f"m{i}": 2 * generator.normal() + generator.normal(size=20) for i in range(100)}
    assert sensitivity(rows(many))[0].share == pytest.approx(0.8, abs=0.08)


def test_lost_groups_come_first_and_are_corrected() -> None:
    made: list[Row] = []
    for seed in range(4):
        jitter = 0.003 * math.sin(seed)
        even = {"bag": 0.9 + jitter, "shirt": 0.8, "shoe": 0.9}
        made.append(row("dense", "", seed, 0.87, groups=even))
        lost = {"bag": 0.9, "shirt": 0.5 + jitter, "shoe": 0.86 + 2 * jitter}
        made.append(row("x", "0.9", seed, 0.76 + jitter, groups=lost))
    (found,) = capabilities(made)
    assert [change.group for change in found.groups] == ["shirt", "shoe", "bag"]
    shirt, shoe, bag = found.groups
    assert (shirt.change.verdict, shirt.beyond.verdict) == ("worse", "worse")
    assert shirt.change.estimate.value == pytest.approx(-0.3, abs=0.01)
    assert shirt.beyond.estimate.value == pytest.approx(-0.3 + 0.11, abs=0.01)
    assert (shoe.change.verdict, shoe.beyond.verdict) == ("worse", "better")  # it lost less than the whole
    assert bag.change.verdict == "no difference shown" and bag.change.family == 3
    assert found.text == "shown to be worse than dense: shirt, shoe; by more than the whole: shirt"
    assert capabilities([one for one in made if not one.dense]) == []


def test_lost_kinds_of_tokens_are_ratios() -> None:
    made = [
        row("dense", "", s, 10.0 + s, metric="perplexity", up=False, groups={"digits": 5.0 + s, "words": 12.0})
        for s in range(3)
    ]
    made += [
        row(
            "x",
            "2:4",
            s,
            2 * (10.0 + s),
            metric="perplexity",
            up=False,
            groups={"digits": 4 * (5.0 + s), "words": 18.0},
        )
        for s in range(3)
    ]
    (found,) = capabilities(made)
    digits, words = found.groups
    assert (digits.group, digits.change.estimate.value) == ("digits", pytest.approx(4.0))
    assert digits.beyond.estimate.value == pytest.approx(2.0) and digits.beyond.verdict == "worse"
    assert words.beyond.estimate.value == pytest.approx(0.75) and words.change.verdict == "worse"


def test_everything_at_once_is_plain_data() -> None:
    found = analyze(study())
    plain: dict[str, Any] = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert plain["subjects"] == ["net", "text"] and plain["labels"] == ["bad", "good", "risky"]
    assert {one["verdict"] for one in plain["against_dense"] if one["left"] == "bad"} == {"worse"}
    assert [one["reason"] for one in plain["failures"]] == ["out of memory"] * 2
    assert plain["collapses"][0]["first"] == "0.9"
    assert all("good" in one["members"] for one in plain["leaders"])
    assert len(plain["overlaps"]) == 2 * 2 * (3 + 3)


@pytest.mark.parametrize("keep", [0, 1, 3])
def test_everything_copes_with_little(keep: int) -> None:
    """No rows, the baseline alone, one seed, nothing measured but a score, a score that is not finite, all failed."""
    assert analyze(study()[:keep]).to_dict()["pairs"] == []
    lone = analyze(rows({"dense": [0.9], "a": [0.5], "b": [math.nan]})).to_dict()
    assert [one["verdict"] for one in lone["pairs"]] == ["runs failed"]
    assert {one["verdict"] for one in lone["against_dense"]} == {"not enough seeds", "runs failed"}
    assert lone["failures"][0]["reason"] == "its score is not finite"
    gone = analyze(rows({"dense": [None], "a": [None, None], "b": [None, None]})).to_dict()
    json.dumps(gone, allow_nan=False)
    assert gone["leaders"][0]["members"] == []
