"""Verdicts in words, and the set of those that may be the best."""

from __future__ import annotations

import json
import math
from itertools import combinations

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.compare.cells import Measure
from secateur.compare.leaders import leaders
from secateur.compare.statistics import adjust, dunnett, tukey
from secateur.compare.verdicts import Comparison, Rules, against, all_pairs
from secateur.errors import DataError, UnknownName

from .made import row, rows

FAR = {"good": [0.90, 0.91, 0.92], "bad": [0.50, 0.52, 0.51], "same": [0.90, 0.92, 0.91]}


def by_label(found: list[Comparison]) -> dict[str, Comparison]:
    return {comparison.left: comparison for comparison in found}


def test_words() -> None:
    made = rows({**FAR, "ref": [0.70, 0.72, 0.71], "lone": [0.3], "gone": [None, None, None]})
    found = by_label(against(made, "ref"))
    assert {label: one.verdict for label, one in found.items()} == {
        "good": "better",
        "bad": "worse",
        "same": "better",
        "lone": "not enough seeds",
        "gone": "runs failed",
    }
    assert found["lone"].text == "not enough seeds (n = 1)"
    assert found["gone"].text == "runs failed: 3 of 3 runs of gone failed"
    assert found["good"].family == 3  # what cannot be tested is not corrected for
    none = by_label(against(made, "good"))["same"]
    assert none.text == "no difference shown at n = 3" and none.p == pytest.approx(1.0)
    assert json.loads(json.dumps(none.to_dict()))["estimate"]["n"] == 3
    for one in found.values():
        assert one.verdict not in ("better", "worse") or one.estimate.low is not None


def test_lower_may_be_better_and_perplexities_are_ratios() -> None:
    made = rows({"low": [10, 11, 12], "high": [20, 22.2, 24]}, metric="perplexity", up=False)
    (only,) = all_pairs(made)
    assert (only.left, only.right, only.verdict) == ("high", "low", "worse")
    assert only.estimate.value == pytest.approx(2.006, abs=0.01) and (only.estimate.low or 0) > 1


def test_what_failed_is_not_called_better_and_nothing_worse_than_it() -> None:
    made = rows({"risky": [0.9, 0.91, None], "safe": [0.5, 0.51, 0.52]})
    (only,) = all_pairs(made)
    assert only.verdict == "runs failed" and only.text == "runs failed: 1 of 3 runs of risky failed"
    (only,) = all_pairs(rows({"risky": [0.5, 0.51, None], "safe": [0.9, 0.91, 0.92]}))
    assert only.verdict == "worse" and only.text.endswith("1 of 3 runs of risky failed")


def test_the_baseline_stands_at_every_target() -> None:
    made = [*rows(FAR, "0.5"), *rows(FAR, "0.9"), *[row("dense", "", s, 0.93 + 0.01 * s) for s in range(3)]]
    found = against(made)
    assert [(one.target, one.left) for one in found] == [
        (t, m) for t in ("0.5", "0.9") for m in ("bad", "good", "same")
    ]
    assert {one.verdict for one in found if one.left == "bad"} == {"worse"}
    assert not any("dense" in (one.left, one.right) for one in all_pairs(made))
    with pytest.raises(DataError, match="labelled 'wanda': there are bad, dense, good, same"):
        against(made, "wanda")
    assert against([]) == []


def test_family_is_corrected_after_holm() -> None:
    generator = np.random.default_rng(0)
    scores = {f"m{i}": list(0.3 * i + generator.normal(size=4)) for i in range(5)}
    found = all_pairs(rows(scores))
    raw = [scipy.stats.ttest_rel(scores[a], scores[b]).pvalue for a, b in combinations(sorted(scores), 2)]
    assert [one.p for one in found] == pytest.approx(adjust(raw))
    assert all(one.family == 10 for one in found)
    strict = all_pairs(rows(scores), rules=Rules(correction="bonferroni"))
    assert [one.p for one in strict] == pytest.approx(adjust(raw, "bonferroni"))


def test_pooled_spread_is_dunnett_and_tukey() -> None:
    generator = np.random.default_rng(1)
    seeds = generator.normal(size=3)
    scores = {f"m{i}": list(i + seeds + 0.3 * generator.normal(size=3)) for i in range(4)}
    made = rows(scores)
    matrix = np.array([scores[f"m{i}"] for i in range(4)])
    rest = matrix - matrix.mean(1, keepdims=True) - matrix.mean(0) + matrix.mean()
    error = np.sqrt(2 * (rest**2).sum() / 6 / 3)
    for found, bound in (
        (against(made, "m0", rules=Rules(variance="pooled")), dunnett(0.95, 3, 6)),
        (all_pairs(made, rules=Rules(variance="pooled")), tukey(0.95, 4, 6)),
    ):
        for one in found:
            gap = np.mean(scores[one.left]) - np.mean(scores[one.right])
            assert (one.estimate.low, one.estimate.high) == pytest.approx((gap - bound * error, gap + bound * error))
            assert ((one.p or 0.0) <= 0.05) == bool(one.estimate.shown)
    lacking = by_label(against(rows({**scores, "m9": [1.0, 2.0]}), "m0", rules=Rules(variance="pooled")))
    assert lacking["m9"].text == "not enough seeds: it lacks seeds that others have"
    assert lacking["m3"].verdict == "better"
    with pytest.raises(DataError, match="its own correction"):
        all_pairs(made, rules=Rules(variance="pooled", how="bca"))


def test_bootstrap_verdicts_need_many_seeds() -> None:
    generator = np.random.default_rng(2)
    made = rows({"a": generator.normal(size=9) + 3, "b": generator.normal(size=9)})
    (only,) = all_pairs(made, rules=Rules(how="bca"))
    assert only.verdict == "better" and only.p is None and only.estimate.how == "bca"
    with pytest.raises(DataError, match="needs 6 seeds or more, not 3"):
        all_pairs(rows(FAR), rules=Rules(how="bca", correction="none"))


def test_no_spread_is_said() -> None:
    (only,) = all_pairs(rows({"a": [0.5, 0.5, 0.5], "b": [0.4, 0.4, 0.4]}))
    assert only.text == "better, the same difference at every seed"


def test_other_figures() -> None:
    made = [row("a", "0.5", s, 0.5, cost={"seconds": 1.0 + s / 9}) for s in range(3)]
    made += [row("b", "0.5", s, 0.5, cost={"seconds": 2.1 + s / 4}) for s in range(3)]
    (only,) = all_pairs(made, measure=Measure("seconds", ("cost", "seconds")))
    assert (only.verdict, only.metric) == ("better", "seconds") and (only.estimate.value or 1) < 0.6


def test_leaders_are_those_that_no_other_is_shown_to_beat() -> None:
    generator = np.random.default_rng(3)
    for _ in range(20):
        k, n = int(generator.integers(2, 6)), int(generator.integers(2, 5))
        scores = generator.normal(size=(k, 1)) + 0.1 * generator.normal(size=(k, n))
        (found,) = leaders(rows({f"m{i}": scores[i] for i in range(k)}))
        expected = {
            f"m{i}"
            for i in range(k)
            if all(
                scipy.stats.ttest_rel(scores[j], scores[i], alternative="greater").pvalue > 0.05 / (k - 1)
                for j in range(k)
                if j != i
            )
        }
        assert set(found.members) == expected
        assert found.leader == f"m{scores.mean(1).argmax()}"
        assert set(found.members) | {one.label for one in found.beaten} == {f"m{i}" for i in range(k)}


def test_leaders_say_of_whom_nothing_can_be_said() -> None:
    (found,) = leaders(rows({**FAR, "lone": [0.99], "risky": [0.99, None, 0.98], "lost": [0.1, None, 0.11]}))
    assert found.members == ("good", "same")
    assert dict(found.open) == {"lone": "not enough seeds (n = 1)", "risky": "1 of 3 runs failed"}
    assert {one.label for one in found.beaten} == {"bad", "lost"}
    assert found.text == ("good has the best mean; not shown to be worse at n = 3: same; of 2 nothing can be said")
    (lower,) = leaders(rows({"a": [9, 9.1, 9.2], "b": [19, 19.3, 19.1]}, metric="perplexity", up=False))
    assert lower.members == ("a",) and lower.text == "a alone is not shown to be worse than another at n = 3"
    assert lower.beaten[0].estimate.scale == "ratio"
    (nobody,) = leaders(rows({"a": [0.5], "b": [None]}))
    assert nobody.leader is None and nobody.text == "no contender can be named; of 2 nothing can be said"
    json.dumps(found.to_dict())


@given(
    st.lists(st.lists(st.floats(-50, 50).map(lambda x: round(x, 2)), min_size=3, max_size=3), min_size=2, max_size=4),
    st.floats(0.1, 10),
    st.floats(-5, 5),
)
@settings(max_examples=30, deadline=None)
def test_verdicts_turn_with_the_sides_and_not_with_units(scores: list[list[float]], scale: float, shift: float) -> None:
    plain = {f"m{i}": of for i, of in enumerate(scores)}
    found = all_pairs(rows(plain))
    turned = all_pairs(rows({f"m{9 - i}": of for i, of in enumerate(scores)}))
    names = {(f"m{9 - int(one.right[1])}", f"m{9 - int(one.left[1])}"): one for one in turned}
    for one in found:
        other = names[one.left, one.right]
        assert {one.verdict, other.verdict} in ({"better", "worse"}, {"no difference shown"})
        assert (one.estimate.low, one.estimate.high) == pytest.approx(
            (-(other.estimate.high or 0), -(other.estimate.low or 0))
        )
    exact = [2.0 ** round(math.log2(scale)) * (np.array(of) + round(shift)) for of in scores]
    for one, moved in zip(found, all_pairs(rows({f"m{i}": list(of) for i, of in enumerate(exact)})), strict=True):
        if one.p is not None and abs(one.p - 0.05) > 1e-6 and one.estimate.spread and one.estimate.spread > 1e-6:
            assert one.verdict == moved.verdict


def test_rules_are_checked() -> None:
    with pytest.raises(UnknownName, match="no correction named 'holms'; did you mean 'holm'"):
        Rules(correction="holms")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="a level is a probability"):
        Rules(level=95)
    assert Rules().to_dict() == {"level": 0.95, "correction": "holm", "variance": "own", "how": "t"}


def test_what_failed_beats_nobody_out_of_the_leaders() -> None:
    (found,) = leaders(rows({"risky": [0.99, 0.98, None], "safe": [0.5, 0.51, 0.52]}))
    assert found.members == ("safe",) and not found.beaten and set(found.open) == {"risky"}
