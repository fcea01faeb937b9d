"""Every registered part keeps the contract of its kind."""

from __future__ import annotations

import pytest

from secateur import Recipe, registry, testing  # registers everything
from secateur.facts import of_source
from secateur.granularity import parse
from secateur.registry import Part, parts

PARTS = [part for kind in registry.kinds() for part in parts(kind).values()]


def _id(part: Part) -> str:
    return f"{part.kind}-{part.name}"


def test_every_axis_has_parts() -> None:
    assert {"criterion", "granularity", "allocation", "schedule", "solver", "recovery", "method"} <= set(
        registry.kinds()
    )


@pytest.mark.parametrize("part", PARTS, ids=_id)
def test_card(part: Part) -> None:
    testing.check_card(part)


@pytest.mark.parametrize("name", parts("criterion"))
def test_criterion(name: str) -> None:
    testing.check_criterion(name)


@pytest.mark.parametrize("name", parts("solver"))
def test_solver(name: str) -> None:
    testing.check_solver(name)


@pytest.mark.parametrize("name", parts("allocation"))
def test_allocation(name: str) -> None:
    testing.check_allocation(name)


@pytest.mark.parametrize("name", parts("gate"))
def test_gate(name: str) -> None:
    testing.check_gate(name)


@pytest.mark.parametrize("name", parts("penalty"))
def test_penalty(name: str) -> None:
    testing.check_penalty(name)


@pytest.mark.parametrize("name", [n for n in parts("granularity") if not parse(n).coupled])
def test_granularity(name: str) -> None:
    testing.check_granularity(name)


@pytest.mark.parametrize("name", parts("search"))
def test_search(name: str) -> None:
    if extra := parts("search")[name].facts.get("extra"):
        pytest.importorskip(extra)
    testing.check_search(name, {"updates": 2, "hidden": 64} if name == "amc" else None)


@pytest.mark.parametrize("name", parts("method"))
def test_method(name: str) -> None:
    """A method is a recipe under its own name, over parts that exist and facts that can be measured."""
    part = parts("method")[name]
    recipe = Recipe.of(name)
    assert recipe == part.facts["recipe"]
    assert recipe.method == name and recipe.cite() is not None
    whole = {"depth": "blocks", "experts": "experts"}.get(recipe.granularity)
    known = of_source(whole) if whole else of_source("inputs", "gradients", "unrolled", "shape", "maps", "training")
    assert recipe.needs() <= {*known, "inputs"}
    assert set(part.needs) == recipe.needs()
    recipe.check()
    for text in part.facts["granularities"]:
        concrete = {"N:M": "2:4", "block": "block(4,4)"}.get(text, text)
        assert Recipe.of(name, granularity=concrete).method == name
