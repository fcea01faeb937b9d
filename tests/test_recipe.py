"""Recipes: data that round-trips, keeps its digest, and says before any work what cannot be."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from secateur import Recipe
from secateur.errors import RecipeError, UnknownName
from secateur.layers import find_layers
from secateur.recipe import Control
from secateur.registry import parts

GLOBS = st.lists(
    st.sampled_from(["*.q_proj", "layers.[0-3].*", "lm_head", "a: b", "- x", "ünï", "!y", "#z"]), max_size=3
)


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    whole = ["coupled", "filter", "channel", "depth"]
    granularity = draw(st.sampled_from(["element", "row", "1:2", "2:4", "4:8", "3:7", "block(2,8)", *whole]))
    fixed = [int(x) for x in granularity.split(":")] if ":" in granularity else None
    fits = {None} | ({"norm"} if granularity in whole[:3] else {"block"} if granularity == "depth" else set())
    criterion: str | None = draw(
        st.sampled_from([n for n, p in parts("criterion").items() if p.facts.get("of") in fits])
    )
    allocation = draw(st.sampled_from([*parts("allocation")]))
    integers = [n for n, p in parts("solver").items() if p.facts.get("quantizes")]
    solver = draw(st.sampled_from([n for n in parts("solver") if n not in integers or granularity not in whole]))
    if parts("solver")[solver].facts.get("chooses") and allocation not in (
        "global",
        "raw",
        "standardized",
        "isomorphic",
    ):
        criterion = None
    steps = draw(st.integers(1, 20)) if solver == "rank" else 1
    knobs: dict[str, dict[str, object]] = {}
    if criterion == "magnitude":
        knobs["criterion"] = {"p": draw(st.floats(0.1, 3))}
    if allocation == "owl":
        knobs["allocation"] = {"lam": draw(st.floats(0, 1)), "m": draw(st.integers(1, 10))}
    if allocation == "explicit":
        table = st.dictionaries(st.sampled_from(["*.q_proj", "a.0", "1:2", "yes"]), st.floats(0, 0.9), max_size=3)
        knobs["allocation"] = {"table": draw(table)}
    return Recipe(
        method=draw(st.sampled_from(["custom", "wanda", "2:4", "null", "my method"])),
        criterion=criterion,
        granularity=granularity,
        allocation=allocation,
        schedule=draw(st.sampled_from(["linear", "cubic", "geometric"])) if steps > 1 else "one-shot",
        steps=steps,
        nested=granularity in whole or draw(st.booleans()),
        control=draw(st.sampled_from(get_args(Control))) if solver == "rank" and granularity not in whole else "none",
        solver=solver,
        recovery=draw(
            st.sampled_from(
                [
                    n
                    for n, p in parts("recovery").items()
                    if (p.facts.get("data") != "units" or granularity in whole) and p.facts.get("trains") != "shared"
                ]
                if solver not in integers
                else ["none", "codebooks" if solver == "share" else "qat"]
            )
        ),
        sparsity=1 - fixed[0] / fixed[1] if fixed else draw(st.floats(0, 1, exclude_max=True)),
        propagate=draw(st.sampled_from(["layer", "block", "off"])),
        only=tuple(draw(GLOBS)),
        skip=tuple(draw(GLOBS)),
        knobs=knobs,
        seed=draw(st.integers(-(2**40), 2**40)),
    )


@given(recipes())
def test_load_of_dump_is_the_recipe(recipe: Recipe) -> None:
    again = Recipe.load(recipe.dump())
    assert again == recipe and hash(again) == hash(recipe) and again.digest == recipe.digest
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert copy.deepcopy(recipe) == recipe
    assert pickle.loads(pickle.dumps(recipe)) == recipe


def test_every_named_method_round_trips(tmp_path: Path) -> None:
    for name in parts("method"):
        recipe = Recipe.of(name)
        assert recipe.method == name and Recipe.load(recipe.dump()) == recipe
        path = tmp_path / f"{name}.yaml"
        path.write_text(recipe.dump(), encoding="utf-8")
        assert Recipe.load(path) == recipe


def test_yaml_does_not_read_a_pattern_as_a_number() -> None:
    recipe = Recipe.load("method: wanda\ngranularity: 2:4\n")
    assert recipe.granularity == "2:4" and recipe.sparsity == 0.5
    assert Recipe.load(Recipe.of("wanda", granularity="1:4").dump()).granularity == "1:4"
    assert Recipe.load("only: '*.a'\n").only == ("*.a",)


def test_a_short_recipe_starts_from_its_method() -> None:
    assert Recipe.load("method: sparsegpt\nsparsity: 0.7\n") == Recipe.of("sparsegpt", sparsity=0.7)
    assert Recipe.load("criterion: magnitude\n") == Recipe()


@pytest.mark.parametrize(
    "text,message",
    [
        ("- a\n- b\n", "mapping of fields, not list"),
        ("", "mapping of fields, not NoneType"),
        ("a: [", "not a YAML recipe"),
        ("sparsity: 0.5\nsparsity: 0.6\n", "not a YAML recipe"),
        ("sparsityy: 0.5\n", r"no field \['sparsityy'\]; its fields: allocation"),
        ("method: wanda\nsparsityy: 0.5\n", "no field"),
        ("method: wandda\n", "no method named 'wandda'; did you mean 'wanda'"),
        ("method: 3\n", "no method named '3'"),
        ("criterion: wandda\n", r"no criterion named 'wandda'; did you mean 'wanda'\? \(secateur methods\)"),
        ("sparsity: '0.5'\n", "must be a number"),
        ("sparsity: true\n", "must be a number"),
        ("sparsity: .nan\n", "fraction in"),
        ("knobs: [1]\n", "axis -> knob -> value"),
        ("knobs: {criterion: 3}\n", "axis -> knob -> value"),
        ("method: wanda\nknobs: {criterion: 3}\n", "axis -> knob -> value"),
        ("!!python/object:os.system {}\n", "not a YAML recipe"),
    ],
)
def test_a_bad_file_is_refused(text: str, message: str) -> None:
    with pytest.raises((RecipeError, UnknownName), match=message):
        Recipe.load(text)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"none\.yaml cannot be read"):
        Recipe.load(tmp_path / "none.yaml")


# -- digest -------------------------------------------------------------------------------------------------------

_PRINT = """
from secateur import Recipe
print(Recipe.of("owl-wanda", sparsity=0.7, skip=["b", "a"], knobs={"allocation": {"m": 7.0, "lam": 0.1}}).digest)
"""


def test_the_digest_is_the_same_in_every_process() -> None:
    environment = {**os.environ, "PYTHONHASHSEED": "1" if sys.flags.hash_randomization == 0 else "0"}
    done = subprocess.run([sys.executable, "-c", _PRINT], env=environment, capture_output=True, text=True, check=True)
    here = Recipe.of("owl-wanda", sparsity=0.7, skip=["b", "a"], knobs={"allocation": {"lam": 0.1, "m": 7.0}})
    assert done.stdout.strip() == here.digest and len(here.digest) == 16


def test_the_digest_ignores_only_the_label() -> None:
    recipe = Recipe.of("wanda")
    assert recipe.override(method="mine").digest == recipe.digest
    changes: list[dict[str, object]] = [
        {"criterion": "ria"},
        {"granularity": "element"},
        {"allocation": "owl"},
        {"steps": 3, "schedule": "cubic"},
        {"solver": "least-squares"},
        {"recovery": "blockwise"},
        {"sparsity": 0.6},
        {"propagate": "off"},
        {"only": ["a"]},
        {"skip": ["a"]},
        {"seed": 1},
    ]
    digests = {recipe.override(**change).digest for change in changes}  # type: ignore[arg-type]
    assert len(digests | {recipe.digest}) == len(changes) + 1


def test_a_knob_at_its_default_is_the_same_recipe() -> None:
    recipe = Recipe.of("sparsegpt")
    assert recipe.override(knobs={"solver": {"damp": 0.01}}).digest == recipe.digest
    assert recipe.override(knobs={"solver": {"damp": 0.02}}).digest != recipe.digest


# -- check --------------------------------------------------------------------------------------------------------


def test_missing_data_and_loss_are_named() -> None:
    with pytest.raises(RecipeError) as error:
        Recipe.of("wanda").check(data=False)
    assert str(error.value) == "criterion 'wanda' needs input_norm, which is measured on data: pass --data"
    with pytest.raises(RecipeError, match="solver 'sparsegpt' needs gram, which is measured on data"):
        Recipe.of("sparsegpt").check(data=False)
    with pytest.raises(RecipeError, match="criterion 'saliency' needs gradient, .* with a loss: pass loss="):
        Recipe.of("snip").check(loss=False)
    with pytest.raises(RecipeError, match="allocation 'owl' needs input_norm"):
        Recipe(allocation="owl").check(data=False)
    with pytest.raises(RecipeError, match="recovery 'blockwise' needs inputs"):
        Recipe(recovery="blockwise").check(data=False)
    for name in ("magnitude", "random", "lamp", "global-magnitude"):
        Recipe.of(name).check(data=False, loss=False)
    Recipe.of("wanda").check(loss=False)


def test_a_layer_that_does_not_divide_is_named() -> None:
    layers, _ = find_layers(nn.Sequential(nn.Linear(8, 8), nn.Linear(27, 8)))
    with pytest.raises(RecipeError, match=r"'2:4' needs an input size .* 1 has 27 \(skip it with --skip 1\)"):
        Recipe(granularity="2:4").check(layers)
    Recipe(granularity="2:4").check(layers[:1])


@pytest.mark.parametrize("sparsity", [1.0, 1.5, -0.1, float("nan"), float("inf"), True, False, "0.5", None, [0.5]])
def test_sparsity_is_a_fraction(sparsity: object) -> None:
    with pytest.raises(RecipeError, match="sparsity must be a"):
        Recipe(sparsity=sparsity)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "fields,message",
    [
        ({"criterion": "wandda"}, "no criterion named 'wandda'; did you mean 'wanda'"),
        ({"allocation": "owls"}, "no allocation named 'owls'; did you mean 'owl'"),
        ({"solver": "sparse-gpt"}, "no solver named 'sparse-gpt'; did you mean 'sparsegpt'"),
        ({"schedule": "cube"}, "no schedule named 'cube'"),
        ({"recovery": "block"}, "no recovery named 'block'"),
        ({"granularity": "2:4", "sparsity": 0.7}, "'2:4' fixes the sparsity at 0.5, but 0.7 was asked for"),
        ({"criterion": None}, "solver 'rank' ranks by a criterion"),
        (
            {"criterion": None, "solver": "sparsegpt", "allocation": "global"},
            "allocation 'global' ranks by a criterion",
        ),
        ({"steps": 0}, "steps must be a whole number"),
        ({"steps": 1.5}, "steps must be a whole number"),
        ({"steps": True}, "steps must be a whole number"),
        ({"steps": 3}, "one-shot schedule has one step"),
        ({"seed": "1"}, "seed must be a whole number"),
        ({"propagate": "on"}, "propagate must be layer, block or off"),
        ({"knobs": {"criterion": {"q": 2}}}, "criterion 'magnitude' has no knob 'q'; its knobs: p"),
        ({"knobs": {"color": {"p": 2}}}, r"knobs for \['color'\]"),
        ({"knobs": {"allocation": {"sparsity": 0.9}}}, "sparsity is a field of the recipe"),
        ({"criterion": None, "solver": "sparsegpt", "knobs": {"criterion": {"p": 2}}}, r"knobs for \['criterion'\]"),
    ],
)
def test_what_does_not_fit_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises((RecipeError, UnknownName), match=message):
        Recipe(**fields)  # type: ignore[arg-type]


def test_lamp_needs_no_criterion() -> None:
    """It ranks by its own score."""
    recipe = Recipe.of("sparsegpt", allocation="lamp")
    assert recipe.criterion is None and recipe.needs() == {"gram"}


def test_a_field_that_is_not_one_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"no field \['sparsityy'\]"):
        Recipe.of("wanda", sparsityy=0.5)


# -- override -----------------------------------------------------------------------------------------------------


def test_a_replaced_part_leaves_its_knobs() -> None:
    base = Recipe.of("owl-wanda", knobs={"allocation": {"lam": 0.2}})
    assert base.knobs_of("allocation")["lam"] == 0.2
    assert base.override(allocation="uniform").knobs == {}
    assert base.override(allocation="owl").knobs == base.knobs
    assert base.override(knobs={"allocation": {"m": 3.0}}).knobs["allocation"] == {"lam": 0.2, "m": 3.0}
    explicit = base.override(allocation="explicit", knobs={"allocation": {"table": {"a": 0.5}}})
    assert explicit.knobs_of("allocation")["table"] == {"a": 0.5} and set(explicit.knobs["allocation"]) == {"table"}


def test_a_pattern_sets_the_sparsity_and_keeps_what_was_chosen() -> None:
    mine = Recipe.of("wanda", sparsity=0.7, seed=5)
    assert mine.override(skip=["a"]).sparsity == 0.7
    assert mine.override(granularity="1:4") == Recipe.of("wanda", granularity="1:4", seed=5)
    assert mine.override(granularity="1:4").sparsity == 0.75
    assert mine.override(sparsity=None) == mine


def test_knobs_cannot_be_changed_afterwards() -> None:
    table = {"a": 0.5}
    recipe = Recipe(allocation="explicit", knobs={"allocation": {"table": table}})
    before = recipe.digest
    table["a"] = 0.9
    assert recipe.digest == before
    with pytest.raises(TypeError):
        recipe.knobs["allocation"]["table"]["a"] = 0.9


def test_cite_names_every_source_once() -> None:
    lines = Recipe.of("owl-wanda").cite()
    assert any("2306.11695" in x for x in lines) and any("2310.05175" in x for x in lines)
    assert len(lines) == len(set(lines))
    assert any("1989" in x for x in Recipe.of("obd").cite())
    assert any("1710.01878" in x for x in Recipe(schedule="cubic", steps=2).cite())


def test_a_criterion_that_nothing_reads_is_refused() -> None:
    with pytest.raises(RecipeError, match="criterion 'wanda' would do nothing"):
        Recipe.of("sparsegpt", criterion="wanda")
    assert Recipe.of("wanda", solver="sparsegpt").criterion is None
    assert Recipe.of("sparsegpt", criterion="wanda", allocation="global").criterion == "wanda"


def test_only_ranking_goes_in_steps() -> None:
    with pytest.raises(RecipeError, match="works in one step"):
        Recipe.of("sparsegpt", steps=3, schedule="cubic")


def test_equal_numbers_have_equal_digests() -> None:
    one, two = (Recipe.of("magnitude", knobs={"criterion": {"p": p}}) for p in (2, 2.0))
    assert one == two
    assert one.digest == two.digest
