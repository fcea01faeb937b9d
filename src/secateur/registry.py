"""Parts (criteria, allocations, solvers, ...) and their cards.

A part is a plain function. Its positional parameters name the facts it needs, its keyword-only
parameters are its knobs, and its docstring is its card; the decorator adds only what cannot be
derived. Everything that lists, checks or documents parts reads them from here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from .errors import RecipeError, UnknownName

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Card:
    """What a reader should know of a part, parsed from its docstring."""

    summary: str
    formula: str = ""
    choose: str = ""
    beware: str = ""
    source: str = ""

    @staticmethod
    def parse(doc: str | None) -> Card:
        """Read the paragraphs of a docstring; ``Choose it``, ``Beware:`` and ``Source:`` open theirs."""
        found = {"summary": "", "formula": "", "choose": "", "beware": "", "source": ""}
        for paragraph in inspect.cleandoc(doc or "").split("\n\n"):
            text = " ".join(line.strip() for line in paragraph.splitlines()).strip()
            if not text or text.startswith(">>>"):
                continue
            if text.startswith("Choose it"):
                found["choose"] = text
            elif text.startswith("Beware:"):
                found["beware"] = text.removeprefix("Beware:").strip()
            elif text.startswith("Source:"):
                found["source"] = text.removeprefix("Source:").strip()
            elif text.startswith("::"):
                found["formula"] = text.removeprefix("::").strip()
            elif not found["summary"]:
                found["summary"] = text
        return Card(**found)


@dataclass(frozen=True)
class Part:
    """A registered function: its name, what it needs, its knobs and its card."""

    kind: str
    name: str
    function: Callable[..., Any]
    needs: tuple[str, ...]
    knobs: Mapping[str, Any]
    card: Card
    facts: Mapping[str, Any] = field(default_factory=dict)

    def knobs_with(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The knobs, overridden by ``given``; an unknown knob is an error that lists the known ones."""
        for name in given:
            if name not in self.knobs:
                known = ", ".join(sorted(self.knobs)) or "none"
                raise RecipeError(f"{self.kind} '{self.name}' has no knob '{name}'; its knobs: {known}")
        return {**self.knobs, **given}

    def __call__(self, facts: Mapping[str, Any], **knobs: Any) -> Any:
        """Call the function with the facts it names."""
        return self.function(*[facts[name] for name in self.needs], **knobs)


_parts: dict[str, dict[str, Part]] = {}


def register(kind: str, name: str | None = None, **facts: Any) -> Callable[[F], F]:
    """Decorator that registers a function as a part of ``kind`` and returns it unchanged.

    ``facts`` are what the signature and the docstring cannot say: ``paper`` (arXiv id), ``family``, ...
    """

    def enter(function: F) -> F:
        needs, knobs = [], {}
        for parameter in inspect.signature(function).parameters.values():
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
                knobs[parameter.name] = parameter.default
            elif parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD:
                needs.append(parameter.name)
        label = name or getattr(function, "__name__", "").replace("_", "-")
        card = Card.parse(function.__doc__)
        shelf = _parts.setdefault(kind, {})
        if label in shelf:
            raise RecipeError(f"{kind} '{label}' is registered twice")
        shelf[label] = Part(kind, label, function, tuple(needs), knobs, card, facts)
        return function

    return enter


def parts(kind: str) -> dict[str, Part]:
    """All parts of a kind, by name, in the order in which they were registered."""
    return dict(_parts.get(kind, {}))


def kinds() -> list[str]:
    """The kinds that have parts."""
    return list(_parts)


def get(kind: str, name: str) -> Part:
    """The part of that name; an unknown name raises `UnknownName` with the nearest match."""
    shelf = _parts.get(kind, {})
    if name not in shelf:
        raise UnknownName(kind, name, shelf)
    return shelf[name]
