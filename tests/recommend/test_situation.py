"""Situations are read from what people write, and what cannot be read is one clear sentence."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest

from secateur.errors import RecipeError
from secateur.recommend import Goal, Hardware, Retraining, Situation
from secateur.recommend.situation import count, fraction


@pytest.mark.parametrize(
    ("text", "quantity", "keep"),
    [
        ("latency 2x", "latency", 0.5), ("speed 4x", "latency", 0.25), ("size 50%", "size", 0.5),
        ("bytes 75%", "size", 0.25), ("flops to 30%", "flops", 0.3), ("Params 30%", "params", 0.7),
        ("sparsity 0.7", "sparsity", 0.3), ("memory 1.5x", "memory", 1 / 1.5),
    ],
)  # fmt: skip
def test_goals(text: str, quantity: str, keep: float) -> None:
    goal = Goal.parse(text)
    assert (goal.quantity, goal.assumed) == (quantity, False)
    assert goal.keep == pytest.approx(keep, abs=1e-6)


@pytest.mark.parametrize(
    ("text", "family", "generation", "nm"),
    [
        ("nvidia ampere", "nvidia", "ampere", True), ("NVIDIA A100", "nvidia", "ampere", True),
        ("h100", "nvidia", "hopper", True), ("rtx 4090", "nvidia", "ada", True), ("T4", "nvidia", "turing", False),
        ("nvidia", "nvidia", "", False), ("gpu", "nvidia", "", False), ("edge", "edge", "", False),
        ("cpu avx2", "cpu", "", False), ("any", "any", "", False),
    ],
)  # fmt: skip
def test_hardware(text: str, family: str, generation: str, nm: bool) -> None:
    found = Hardware.parse(text)
    assert (found.family, found.generation, found.two_in_four) == (family, generation, nm)


def test_this_machine_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    from secateur.recommend import hardware

    monkeypatch.setattr(hardware, "described", lambda: {"active": "avx2"})
    assert Hardware.parse("cpu") == Hardware("cpu", instructions="AVX2", kernels=True)
    monkeypatch.setattr(hardware, "described", lambda: {"active": None})
    assert Hardware.parse("cpu") == Hardware("cpu")


def test_times() -> None:
    assert Retraining.parse("no").none
    assert Retraining.parse("no").allowed == 0
    assert Retraining.parse("2h").allowed is None  # nobody knows how long an epoch takes
    assert Retraining.parse("2h", epoch="6m").allowed == 20
    assert Retraining.parse("20 epochs").allowed == 20
    assert math.isinf(Retraining.parse("any").allowed or 0)
    assert (count("1.5B"), fraction("1%"), fraction("0.02")) == (1_500_000_000, 0.01, 0.02)


@pytest.mark.parametrize(
    ("read", "way_out"),
    [
        (lambda: Goal.parse("faster"), "latency 2x"), (lambda: Goal.parse("latency 1x"), "leave something"),
        (lambda: Goal.parse("size 100%"), "leave something"), (lambda: Goal.parse("joy 2x"), "latency, size"),
        (lambda: Hardware.parse("abacus"), "nvidia ampere"), (lambda: Hardware.parse(""), "cpu"),
        (lambda: Hardware.parse("cpu ampere"), "name one"), (lambda: Hardware.parse("h100 turing"), "name one"),
        (lambda: Retraining.parse("soon"), "2h"), (lambda: Retraining.parse("2h", epoch="0m"), "30m"),
        (lambda: count("many"), "25M"), (lambda: fraction("150%"), "1%"),
        (lambda: Situation(kind="rnn"), "cnn"), (lambda: Situation(data="some"), "unlabeled"),
        (lambda: Situation(weights="old"), "pretrained"), (lambda: Situation(max_drop=2.0), "share"),
    ],
)  # fmt: skip
def test_mistakes_say_the_way_out(read: Callable[[], object], way_out: str) -> None:
    with pytest.raises(RecipeError, match=".") as caught:
        read()
    message = str(caught.value)
    assert way_out in message
    assert "\n" not in message


def test_language_models_have_a_loss_without_labels() -> None:
    assert Situation("decoder", data="unlabeled").has_loss
    assert not Situation("cnn", data="unlabeled").has_loss
    assert Situation("cnn", data="labels").has_loss
    assert not Situation("decoder", data="none").has_loss
    assert not Situation("cnn", data="labels").trains
    assert Situation("cnn", data="labels", retraining=Retraining.parse("1h")).trains


def test_plain_data() -> None:
    made = Situation("cnn", 10, retraining=Retraining.parse("any"), data="labels")
    assert json.loads(json.dumps(made.to_dict(), allow_nan=False))["retraining"]["seconds"] is None
    assert "assumed" in str(made)
    assert "assumed" not in str(Situation(goal=Goal.parse("size 50%")))
