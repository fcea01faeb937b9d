"""Whether the options of a method of run time are what its signature says."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, get_args, get_origin, get_type_hints

from ..errors import RecipeError
from ..registry import Part

_WORDS: dict[Any, str] = {
    int: "a whole number", float: "a number", bool: "true or false", str: "a text",
    tuple: "whole numbers, such as [0,1]",
}  # fmt: skip


def check(part: Part, given: Mapping[str, Any]) -> None:
    """Refuse a knob that the part does not have, and a value of another type than its annotation's.

    A whole number is a number as well; one may stand for several. None says that an option is left out. An annotation
    of another kind, or none, takes anything.

    Raises:
        RecipeError: with the first that is wrong.
    """
    part.knobs_with(given)
    hints = get_type_hints(part.function)
    for name, value in given.items():
        if name not in hints:
            continue
        kinds = get_args(hints[name]) if type(None) in get_args(hints[name]) else (hints[name],)
        wanted = [get_origin(kind) or kind for kind in kinds if kind is not type(None)]
        if value is None and len(wanted) < len(kinds):
            continue
        if not any(_is(value, kind) for kind in wanted):
            like = ", such as 'flops 50%'" if name == "target" else ""
            raise RecipeError(f"{part.name}: {name} is {value!r}: it is {_said(wanted)}{like}")


def _said(kinds: list[Any]) -> str:
    return " or ".join(_WORDS[kind] for kind in kinds)


def _is(value: Any, kind: Any) -> bool:
    if kind not in _WORDS:
        return True
    if kind is tuple:
        return all(_is(x, int) for x in (value if isinstance(value, (tuple, list)) else (value,)))
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
