"""Answers to contrasts: what is matched with what, and what is said beside a published statement."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from secateur.compare.answers import Side, Statement, answer, differing, match
from secateur.compare.cells import Measure
from secateur.compare.rows import Row
from secateur.errors import DataError

from .made import rows

ONE_SHOT = {"method": "m", "steps": 1}
ROUNDS = {"steps": 5, "schedule": "geometric"}


def study(gap: float = 0.05, subject: str = "net", **more: Any) -> list[Row]:
    """Each method once and in rounds, better by ``gap`` there, at two targets and three seeds."""
    generator = np.random.default_rng(len(subject))
    made: list[Row] = []
    for target in ("0.5", "0.9"):
        seeds = 0.01 * generator.normal(size=3)
        for criterion, worth in (("magnitude", 0.8), ("taylor", 0.7)):
            once = worth + seeds + 0.002 * generator.normal(size=3)
            recipe = {"criterion": criterion, **ONE_SHOT}
            made += rows({criterion: once}, target, subject=subject, recipe=recipe, **more)
            rounds = once + gap + 0.002 * generator.normal(size=3)
            made += rows({f"{criterion} x5": rounds}, target, subject=subject, recipe={**recipe, **ROUNDS}, **more)
    return made


SIDES = (
    Side("iterative", where=lambda row: (row.recipe or {}).get("steps", 1) > 1),
    Side("one-shot", ("magnitude", "taylor")),
)
CLAIM = Statement("iterative", "one-shot", "better")


def test_pairs_differ_in_as_little_as_the_study_has() -> None:
    found = answer(study(), SIDES, question="q", published="p", statements=[CLAIM])
    (part,) = found.parts
    assert [(one.left, one.right) for one in part.pairs] == [("magnitude x5", "magnitude"), ("taylor x5", "taylor")]
    assert part.pairs[0].axes == ("schedule", "steps")
    assert part.judged == ("agrees",) and part.judged_targets == ("agrees", "agrees")
    assert len(part.cells) == 4 and len(part.targets) == 2 and len(part.overall) == 1
    assert part.overall[0].estimate.value == pytest.approx(0.05, abs=0.004)
    assert part.overall[0].estimate.n == 3  # seeds are what varies, not pairs or targets
    each = [one.estimate.value or 0.0 for one in part.cells]
    assert part.overall[0].estimate.value == pytest.approx(np.mean(each))
    assert (part.overall[0].verdict, part.agreement, found.agreement) == ("better", "agrees", "agrees")
    assert found.text.startswith("Net: iterative against one-shot: better, accuracy by 0.0")
    assert found.text.endswith("(the published statement: agrees).")
    assert json.loads(json.dumps(found.to_dict()))["sides"]["one-shot"] == ["magnitude", "taylor"]


def test_the_other_way_and_nothing_shown() -> None:
    assert answer(study(-0.05), SIDES, statements=[CLAIM]).agreement == "does not agree"
    assert answer(study(0.0), SIDES, statements=[CLAIM]).agreement == "not shown"
    turned = answer(study(), SIDES, statements=[Statement("one-shot", "iterative", "worse")])
    assert turned.agreement == "agrees" and turned.parts[0].left == "one-shot"
    assert answer(study(), SIDES).agreement is None
    both = answer([*study(), *study(-0.05, "other")], SIDES, statements=[CLAIM])
    assert both.agreement == "agrees in part" and both.parts[0].judged == ("agrees", "does not agree")
    some = answer([*study(), *study(0.0, "other")], SIDES, statements=[CLAIM])
    assert some.agreement == "agrees" and some.parts[0].judged == ("agrees", "not shown")


def test_same_needs_a_margin_to_be_shown() -> None:
    plain = Statement("iterative", "one-shot", "same")
    assert answer(study(0.0), SIDES, statements=[plain]).agreement == "not shown"
    assert answer(study(), SIDES, statements=[plain]).agreement == "does not agree"
    near = Statement("iterative", "one-shot", "same", margin=0.02)
    assert answer(study(0.0), SIDES, statements=[near]).agreement == "agrees"
    assert answer(study(0.1), SIDES, statements=[near]).agreement == "does not agree"
    assert answer(study(0.02), SIDES, statements=[near]).agreement == "not shown"


def test_perplexities_other_figures_and_other_targets() -> None:
    made = rows({"a": [10.0, 11.0, 12.0]}, "0.5", metric="perplexity", up=False, latency={"seconds": 1.0})
    made += rows({"b": [20.2, 22.0, 23.8]}, "2:4", metric="perplexity", up=False, latency={"seconds": 0.5})
    sides = (Side("free", ("a",)), Side("2:4", ("b",)))
    assert answer(made, sides).text == "No runs of free and 2:4 that match."
    found = answer(made, sides, same={"2:4": "0.5"}, statements=[Statement("2:4", "free", "worse")])
    assert found.agreement == "agrees" and found.parts[0].overall[0].estimate.value == pytest.approx(2.0, abs=0.01)
    fast = Measure("seconds", ("latency", "seconds"))
    quick = answer(made, sides, same={"2:4": "0.5"}, measure=fast)
    assert quick.parts[0].overall[0].text == "worse, the same difference at every seed" and quick.metric == "seconds"


def test_three_sides_meet_in_pairs() -> None:
    made = rows({"free": [0.9, 0.91, 0.92], "semi": [0.8, 0.82, 0.81], "whole": [0.5, 0.52, 0.53]})
    sides = [Side(name, (name,)) for name in ("free", "semi", "whole")]
    claims = [Statement("free", "semi", "better"), Statement("semi", "whole", "better")]
    found = answer(made, sides, statements=claims)
    assert [(p.left, p.right, p.agreement) for p in found.parts] == [
        ("free", "semi", "agrees"),
        ("free", "whole", None),
        ("semi", "whole", "agrees"),
    ]
    assert found.agreement == "agrees"


def test_failures_and_single_seeds_show_nothing() -> None:
    made = rows({"a": [0.9, 0.91, None], "b": [0.5, 0.51, 0.52]})
    sides = (Side("left", ("a",)), Side("right", ("b",)))
    found = answer(made, sides, statements=[Statement("left", "right", "better")])
    assert found.agreement == "not shown" and dict(found.failures) == {"a": 1}
    assert found.parts[0].overall[0].verdict == "runs failed"
    lone = answer(rows({"a": [0.9], "b": [0.1]}), sides, statements=[Statement("left", "right", "better")])
    assert lone.agreement == "not shown" and lone.parts[0].overall[0].text == "not enough seeds (n = 1)"
    assert answer([], sides, statements=[Statement("left", "right", "better")]).agreement == "not shown"


def test_a_seed_at_which_one_of_several_failed_is_not_the_mean_of_the_others() -> None:
    made = [replace(row, status="failed") if row.label == "taylor x5" and row.seed == 2 else row for row in study()]
    (part,) = answer(made, SIDES, statements=[CLAIM]).parts
    (whole,) = part.overall
    assert (whole.estimate.n, whole.estimate.failures, whole.left_failures, whole.right_failures) == (2, 1, 1, 0)
    assert whole.verdict in ("runs failed", "no difference shown")
    assert part.agreement == "not shown"


def test_matching() -> None:
    recipes = {"a": {"criterion": "x", "steps": 1}, "b": {"criterion": "x", "steps": 9}, "c": {"criterion": "z"}}

    def matched(left: list[str], right: list[str]) -> list[tuple[str, str]]:
        return [(m.left, m.right) for m in match(left, right, lambda x, y: differing(recipes[x], recipes[y]))]

    assert matched(["b"], ["a", "c"]) == [("b", "a"), ("b", "c")]  # the side with more: each of it has a partner
    assert matched(["a", "c"], ["b"]) == [("a", "b"), ("c", "b")]
    assert matched(["a", "b"], ["c", "b"]) == [("a", "b"), ("b", "c")]
    assert matched(["a"], ["a"]) == [] and matched([], ["a"]) == []
    assert differing(None, {"criterion": "x"}) == ("criterion",)
    found = answer(study(), SIDES, pairs=[("magnitude", "taylor x5"), ("magnitude", "taylor")])
    assert [(m.left, m.right) for m in found.parts[0].pairs] == [("taylor x5", "magnitude")]
    assert set(found.parts[0].alone) == {"magnitude x5", "taylor"}


def test_a_target_that_changes_the_recipe_does_not_tell_contenders_apart() -> None:
    """Only the first has the target 2:4, which is another granularity; at the shared target they differ in one axis."""
    made = rows({"a": [0.9, 0.91]}, "0.5", recipe={"criterion": "x", "granularity": "element"})
    made += rows({"a": [0.8, 0.81]}, "2:4", recipe={"criterion": "x", "granularity": "2:4"})
    made += rows({"b": [0.5, 0.52]}, "0.5", recipe={"criterion": "y", "granularity": "element"})
    (part,) = answer(made, (Side("left", ("a",)), Side("right", ("b",)))).parts
    assert part.pairs[0].axes == ("criterion",) and len(part.targets) == 1


def test_what_makes_no_contrast_is_refused() -> None:
    with pytest.raises(DataError, match="two sides or more"):
        answer([], [SIDES[0]])
    with pytest.raises(DataError, match="'magnitude' stands on both sides, one-shot and again"):
        answer(study(), [SIDES[1], Side("again", ("magnitude",))])
    with pytest.raises(DataError, match="sides are iterative, one-shot"):
        answer(study(), SIDES, statements=[Statement("iterative", "dynamic", "better")])
    with pytest.raises(DataError, match="expects better, worse or same"):
        Statement("a", "b", "faster")
    with pytest.raises(DataError, match="positive difference"):
        Statement("a", "b", "same", margin=0.0)
