"""Named methods: one line of data each, a recipe on the axes."""

from __future__ import annotations

from functools import cache

from .. import registry
from ..errors import UnknownName
from ..registry import Part

__all__ = ["all_methods", "explain", "load"]


@cache
def load() -> None:
    """Import everything that registers a part. Cheap, and safe to call again."""
    from .. import (  # noqa: F401
        allocation,
        criteria,
        families,
        fuse,
        granularity,
        recover,
        runtime,
        search,
        solvers,
        supernet,
        tasks,
    )
    from . import after, before, learned, oneshot, structured, training  # noqa: F401


def all_methods(
    *, needs: str | None = None, granularity: str | None = None, family: str | None = None, when: str | None = None
) -> list[Part]:
    """The named methods that fit: ``needs`` is a fact, ``inputs``, ``gradients``, ``training`` or ``nothing``."""
    from ..recipe import GRADIENTS, SHAPES, TRAINING

    load()
    chosen = []
    for part in registry.parts("method").values():
        recipe = part.facts["recipe"]
        facts = recipe.needs()
        kind = "nothing" if facts <= SHAPES else "gradients" if facts & GRADIENTS else "inputs"
        kind = "training" if facts & TRAINING else kind
        if needs is not None and needs != kind and needs not in facts:
            continue
        if (
            granularity is not None
            and granularity not in part.facts["granularities"]
            and granularity != recipe.granularity
        ):
            continue
        if family is not None and part.facts["family"] != family:
            continue
        if when is not None and part.facts["when"] != when:
            continue
        chosen.append(part)
    return chosen


def explain(name: str) -> list[Part]:
    """The parts that carry ``name``, on any axis; unknown names raise `UnknownName`."""
    load()
    found = [shelf[name] for kind in registry.kinds() if name in (shelf := registry.parts(kind))]
    if not found:
        raise UnknownName("method", name, [n for kind in registry.kinds() for n in registry.parts(kind)])
    return sorted(found, key=lambda p: p.kind != "method")
