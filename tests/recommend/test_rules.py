"""Each rule says what it should where it should, and nothing elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from secateur.recommend import Goal, Hardware, Retraining, Situation
from secateur.recommend.aim import fit
from secateur.recommend.candidate import Candidate
from secateur.registry import get, parts

AMPERE, AVX2, EDGE = Hardware.parse("nvidia ampere"), Hardware.parse("cpu avx2"), Hardware.parse("edge")
TRAINED: dict[str, Any] = {"data": "training", "retraining": Retraining.parse("any")}
TEXT: dict[str, Any] = {"kind": "decoder", "data": "unlabeled"}


def sparse(gone: float) -> Goal:
    return Goal.parse(f"sparsity {gone}")


@dataclass
class Case:
    """A rule, a method and a situation in which it speaks; one in which it does not, and a method that it spares."""

    rule: str
    method: str
    action: str
    speaks: Situation
    silent: Situation
    other: str = ""

    def __str__(self) -> str:
        return f"{self.rule}-{self.method}"


CASES = [
    Case("blocks-are-there", "reap", "drop", Situation("decoder"), Situation("moe")),
    Case("blocks-are-there", "shortgpt", "drop", Situation("cnn"), Situation("encoder")),
    Case("criterion-sees-its-units", "hrank", "drop", Situation("decoder"), Situation("cnn")),
    Case("criterion-sees-its-units", "network-slimming", "drop", Situation("vit"), Situation("cnn")),
    Case("criterion-sees-its-units", "slimming", "drop", Situation("encoder"), Situation("cnn"), "group-lasso"),
    Case("data-is-there", "wanda", "drop", Situation("cnn"), Situation("cnn", data="unlabeled"), "magnitude"),
    Case("loss-is-there", "fisher", "drop", Situation("cnn", data="unlabeled"), Situation("cnn", data="labels"),
         "wanda"),
    Case("loss-is-there", "gmp", "drop", Situation("cnn"), Situation("decoder", data="unlabeled"), "magnitude"),
    Case("time-is-there", "gmp", "drop", Situation(data="training"), Situation(**TRAINED), "wanda"),
    Case("epochs-suffice", "lth", "demote", Situation(data="training", retraining=Retraining.parse("2h")),
         Situation(**TRAINED), "gmp"),
    Case("epochs-suffice", "gmp", "drop", Situation(data="training", retraining=Retraining.parse("5m", "10m")),
         Situation(data="training", retraining=Retraining.parse("20 epochs"))),
    Case("epochs-suffice", "gmp", "demote", Situation(data="training", retraining=Retraining.parse("2 epochs")),
         Situation(data="training", retraining=Retraining.parse("no"))),
    Case("scratch-throws-weights-away", "rigl", "drop", Situation(data="labels"), Situation(weights="init"), "gmp"),
    Case("scratch-throws-weights-away", "snip", "demote", Situation(**TRAINED), Situation(weights="init", **TRAINED)),
    Case("weights-say-something", "magnitude", "drop", Situation(weights="init"), Situation(weights="init", **TRAINED)),
    Case("goal-is-within-reach", "magnitude", "drop", Situation(hardware=EDGE, goal=Goal.parse("latency 2x")),
         Situation("encoder", hardware=AVX2, goal=Goal.parse("latency 2x")), "l1-norm"),
    Case("solver-is-quick-enough", "obc", "drop", Situation(parameters=10**9), Situation(parameters=10**6),
         "sparsegpt"),
    Case("baselines-are-to-be-beaten", "random", "demote", Situation(), Situation(), "magnitude"),
    Case("zeros-pay-from", "magnitude", "demote", Situation("cnn", hardware=AVX2, goal=sparse(0.3)),
         Situation("cnn", hardware=AVX2, goal=sparse(0.8)), "l1-norm"),
    Case("zeros-pay-from", "magnitude", "demote", Situation(hardware=EDGE), Situation(goal=Goal.parse("size 50%"))),
    Case("two-of-four-pay-on-ampere", "maskllm", "promote", Situation(hardware=AMPERE), Situation(), "l1-norm"),
    Case("two-of-four-pay-on-ampere", "maskllm", "demote", Situation(hardware=AVX2), Situation(), "magnitude"),
    Case("smaller-models-pay-anywhere", "l1-norm", "promote", Situation(hardware=EDGE, goal=Goal.parse("latency 2x")),
         Situation(hardware=EDGE, goal=Goal.parse("size 50%")), "magnitude"),
    Case("language-models-without-training", "sparsegpt", "demote", Situation(goal=sparse(0.7), **TEXT),
         Situation(goal=sparse(0.5), **TEXT)),
    Case("units-of-language-models", "flap", "demote", Situation(goal=sparse(0.5), **TEXT),
         Situation(goal=sparse(0.1), **TEXT), "sparsegpt"),
    Case("magnitude-fails-in-language-models", "magnitude", "demote", Situation(**TEXT), Situation("cnn"), "wanda"),
    Case("survivors-that-move", "sparsegpt", "promote", Situation(**TEXT), Situation(**TEXT), "wanda"),
    Case("healing-is-worth-it", "l1-norm", "promote", Situation(data="unlabeled"), Situation(), "magnitude"),
    Case("healing-is-worth-it", "l1-norm", "demote", Situation(data="none"), Situation(), "magnitude"),
    Case("collapse-of-layers", "global-magnitude", "demote", Situation(goal=sparse(0.98)), Situation(goal=sparse(0.8)),
         "lamp"),
    Case("layers-differ", "magnitude", "demote", Situation(goal=sparse(0.9)), Situation(goal=sparse(0.5)), "lamp"),
    Case("rounds-at-high-sparsity", "gmp", "promote", Situation(goal=sparse(0.9), **TRAINED),
         Situation(goal=sparse(0.5), **TRAINED), "rigl"),
    Case("rounds-at-high-sparsity", "magnitude-finetune", "demote", Situation(goal=sparse(0.9), **TRAINED),
         Situation(goal=sparse(0.5), **TRAINED)),
    Case("training-heals", "wanda", "demote", Situation(**TRAINED), Situation(data="training"), "gmp"),
    Case("training-heals", "magnitude-distill", "promote", Situation(**TRAINED), Situation(), "magnitude-finetune"),
    Case("shown-on-other-models", "wanda", "demote", Situation("cnn"), Situation("decoder"), "magnitude"),
    Case("shown-on-other-models", "early-bird", "demote", Situation("vit"), Situation("cnn")),
    Case("rewinding-beats-fine-tuning", "lr-rewind", "promote", Situation(**TRAINED), Situation(),
         "iterative-magnitude"),
    Case("learned-masks-need-long-runs", "str", "demote", Situation(), Situation(), "gmp"),
    Case("weights-that-are-trained", "edge-popup", "demote", Situation(), Situation(), "maskllm"),
]  # fmt: skip


def word(rule: str, method: str, situation: Situation) -> str | None:
    candidate = fit(Candidate.of(get("method", method)), situation)
    verdict = get("rule", rule).function(situation, candidate)
    return None if verdict is None else verdict.action


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rule(case: Case) -> None:
    assert word(case.rule, case.method, case.speaks) == case.action
    if case.other:
        assert word(case.rule, case.other, case.speaks) != case.action


@pytest.mark.parametrize("case", [c for c in CASES if c.silent != c.speaks and c.silent != Situation()], ids=str)
def test_rule_is_silent_elsewhere(case: Case) -> None:
    assert word(case.rule, case.method, case.silent) != case.action


def test_every_rule_has_a_test() -> None:
    assert {case.rule for case in CASES} == set(parts("rule"))


def test_every_rule_says_where_it_is_from() -> None:
    for kind in ("rule", "advice"):
        for part in parts(kind).values():
            assert part.card.summary.endswith("."), part.name
            assert part.card.source, part.name


def test_rules_read_recipes_and_not_names() -> None:
    import inspect

    from secateur.recommend import rules_can, rules_pay

    for module in (rules_can, rules_pay):
        lines = inspect.getsource(module)
        code = lines.split('"""')[::2]  # outside of docstrings
        names = [n for n in parts("method") if any(f'"{n}"' in text for text in code)]
        assert names == []
