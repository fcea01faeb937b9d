"""Targets of a study, as a user writes them: a sparsity, a pattern of single weights, a share of a whole quantity."""

from __future__ import annotations

import re
from typing import Any

from ..errors import RecipeError, StudyError
from ..granularity import parse
from ..structured import Target

PATTERN = re.compile(r"\d+:\d+")
#: The target of what says all amounts itself.
OWN = "own"


def axes_of(target: str) -> dict[str, Any]:
    """What a target says on the axes of a recipe.

    >>> axes_of("2:4"), axes_of("0.9"), axes_of("flops 50%")
    ({'granularity': '2:4', 'sparsity': 0.5}, {'sparsity': 0.9}, {})

    Raises:
        StudyError: it is none.
    """
    if target == OWN:
        return {}
    if PATTERN.fullmatch(target):
        try:
            parse(target)
        except RecipeError as error:
            raise StudyError(str(error)) from None
        n, m = (int(x) for x in target.split(":"))
        return {"granularity": target, "sparsity": 1 - n / m}
    if of_weights(target):
        value = float(target)
        if not 0 < value < 1:
            raise StudyError(f"target {target} is a sparsity, and must lie between 0 and 1 (0.5 removes half)")
        return {"sparsity": value}
    try:
        Target.parse(target)
    except RecipeError as error:
        raise StudyError(f"{error}; or a sparsity such as 0.9, or a pattern such as 2:4") from None
    return {}


def structured(target: str) -> str | None:
    """The target as `prune` takes it for units of the whole model; None for a sparsity or a pattern."""
    return None if of_weights(target) or target == OWN else target


def of_weights(target: str) -> bool:
    """Whether it is about single weights: a sparsity or a pattern."""
    if PATTERN.fullmatch(target):
        return True
    try:
        float(target)
    except ValueError:
        return False
    return True


def target_of(value: Any) -> str:
    """A target as it is written in a file, in one spelling."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise StudyError(f"a target is written 0.9, 2:4 or 'flops 50%', not {value!r}")
    text = value.strip() if isinstance(value, str) else f"{value:g}"
    try:
        return f"{float(text):g}"  # 0.50 is 0.5
    except ValueError:
        return text
