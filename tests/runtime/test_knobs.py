"""Options of methods of run time: the type of each is that of the signature, whatever the method."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
from typer.testing import CliRunner

import secateur
from secateur.cli import app
from secateur.compound import Compound
from secateur.errors import RecipeError
from secateur.registry import Card, Part, parts
from secateur.runtime import is_runtime
from secateur.runtime.knobs import check

from .cnns import pictures, plain
from .models import vit

METHODS = [name for name in parts("transform") if is_runtime(name)]
#: For each annotation, what it must not take.
WRONG: dict[str, list[Any]] = {
    "int": [8.5, "a", True, [1]], "float": ["a", True, float("nan"), float("inf"), [0.5]],
    "bool": [1, "yes", 0.0], "str": [0.5, True, 3], "tuple": ["a", True, [0.5], 1.5],
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_every_knob_of_every_method_has_a_type(method: str) -> None:
    part = parts("transform")[method]
    hints = get_type_hints(part.function)
    for name, default in part.knobs.items():
        check(part, {name: default})
        kind = str(hints[name]).removeprefix("<class '").removesuffix("'>").split(" |")[0].split("[")[0]
        for value in WRONG[kind]:
            with pytest.raises(RecipeError, match=f"^{method}: {name} is "):
                check(part, {name: value})
        if "None" not in str(hints[name]):
            with pytest.raises(RecipeError, match=f"^{method}: {name} is None"):
                check(part, {name: None})


def test_what_is_said() -> None:
    said = {
        ("h2o", "budget", 8.5): "h2o: budget is 8.5: it is a whole number",
        ("fbs", "density", "a"): "fbs: density is 'a': it is a number",
        ("fbs", "target", 0.5): "fbs: target is 0.5: it is a text, such as 'flops 50%'",
        ("evit", "fuse", 1): "evit: fuse is 1: it is true or false",
        ("tome", "at", "x"): r"tome: at is 'x': it is whole numbers, such as \[0,1\]",
    }
    for (method, name, value), sentence in said.items():
        with pytest.raises(RecipeError, match=f"^{sentence}$"):
            check(parts("transform")[method], {name: value})
    check(parts("transform")["fbs"], {"density": 1, "lasso": 0, "target": None})  # a whole number is a number
    check(parts("transform")["tome"], {"at": 2, "r": 3, "keep": None})
    check(parts("transform")["tome"], {"at": [0, 1]})


def test_an_annotation_of_another_kind_takes_anything() -> None:
    def own(model: Any, *, any_of: Any = None, words: list[str] | None = None, number: int | None = None) -> None: ...

    knobs = {"any_of": None, "words": None, "number": None, "untold": 1}
    part = Part("transform", "own", own, ("model",), knobs, Card(""))
    check(part, {"any_of": object(), "words": ["a"], "number": 3, "untold": "x"})
    with pytest.raises(RecipeError, match="^own: number is 'x'"):
        check(part, {"number": "x"})


def test_all_doors_ask() -> None:
    with pytest.raises(RecipeError, match="^tome: r is 2.5"):
        secateur.prune(vit(), "tome", example=pictures(1, size=28), r=2.5)
    with pytest.raises(RecipeError, match="^fbs: density is 'a'"):
        secateur.train("digits", "fbs", knobs={"fbs": {"density": "a"}})
    with pytest.raises(RecipeError, match="^fbs: length is 'a'"):
        secateur.train("digits", "fbs", target="flops 50%", knobs={"fbs": {"length": "a"}})
    with pytest.raises(RecipeError, match="^fbs: rate is 0: it is a number above 0"):
        secateur.train("digits", "fbs", target="flops 50%", rate=0)
    with pytest.raises(RecipeError, match="^score is valid or test, not 'train'"):
        secateur.train("digits", "fbs", target="flops 50%", score="train")
    with pytest.raises(RecipeError, match="^tome: keep is 'a'"):
        Compound.of([{"runtime": {"method": "tome", "keep": "a"}}])


@pytest.mark.parametrize(
    ("method", "knobs"),
    [
        ("fbs", {"density": -0.5}), ("fbs", {"density": 0.5, "lasso": -1}), ("ftwt", {"mass": -1}),
        ("ftwt", {"mass": 0.5, "pace": -1}), ("manidp", {"density": -1}), ("manidp", {"density": 0.5, "squeeze": -1}),
        ("cgnet", {"parts": -1}), ("cgnet", {"pull": -1}), ("cgnet", {"slope": -1}),
    ],
)  # fmt: skip
def test_negative_numbers_get_a_sentence(method: str, knobs: dict[str, Any]) -> None:
    x = pictures(2)
    with pytest.raises(RecipeError, match=f"^{method}: "), torch.no_grad():
        secateur.runtime.made(plain(), method, x, [x], **knobs)


def test_the_command_says_it_before_the_model_is_loaded(tmp_path: Path) -> None:
    words = ["prune", "nowhere.py:net", "--method", "tome", "--example", "1x1x28x28", "--out", str(tmp_path / "out")]
    for more, match in (
        (["--set", "tome.r=2.5"], "tome: r is 2.5: it is a whole number"),
        (["--set", "tome.example=1"], "no knob 'example'"),
        (["--target", "flops 40%", "--set", "tome.target=flops 30%"], "has one target"),
    ):
        with pytest.raises(RecipeError, match=match):
            CliRunner().invoke(app, [*words, *more], catch_exceptions=False)
