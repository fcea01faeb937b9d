"""The study that would tell: the first choices against magnitude, at the target that was asked for and beside it."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING, Any

from ruamel.yaml import YAML
from ruamel.yaml.scalarstring import DoubleQuotedScalarString

from ..recipe import Recipe
from ..registry import parts
from .candidate import Candidate
from .situation import Situation

if TYPE_CHECKING:
    from .answer import Answer

#: How many of the first choices are compared.
CHOICES = 4


def contenders(answer: Answer) -> list[Candidate]:
    """The first choices that can be asked for the same, and what costs nothing to try: magnitude."""
    usable = [e.candidate for e in answer.usable]
    if not usable:
        return []
    chosen = [c for c in usable if c.aim == usable[0].aim][:CHOICES]
    plain = "magnitude" if usable[0].structure != "units" else "group-norm"
    chosen += [c for c in usable if c.name == plain and c.aim == usable[0].aim and c not in chosen]
    return chosen


def deciding(answer: Answer) -> str:
    """That study as YAML, for ``secateur compare``."""
    situation = answer.situation
    chosen = contenders(answer)
    first = chosen[0].aim if chosen else None
    targets: list[str] = []
    if first is not None and first.quantity == "weights" and first.structure != "pattern":
        around = [1 - 2 * first.keep, 1 - first.keep, 1 - first.keep / 2]
        targets = [f"{x:.4g}" for x in around if 0 < x < 1]
    elif first is not None:
        targets = [chosen[0].recipe.granularity if first.structure == "pattern" else first.text]
    data: dict[str, Any] = {
        "study": "decide-" + (re.sub(r"[^a-z0-9]+", "-", situation.model.lower()).strip("-") or situation.kind),
        **_subject(situation),
        "methods": [_said(c) for c in chosen],
        "targets": [DoubleQuotedScalarString(t) for t in targets],  # 2:4 is a number to some readers
        "seeds": 3,
    }
    stream = io.StringIO()
    yaml = YAML()
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.dump(data, stream)
    return f"# {situation}\n# secateur compare study.yaml\n{stream.getvalue()}"


def _subject(situation: Situation) -> dict[str, Any]:
    """A language model that was trained before is a model; all else is a task, which its own study trains."""
    if situation.language and not situation.trains:
        return {"models": [situation.model or "MODEL"]}
    return {"tasks": [situation.model if situation.model in parts("task") else "TASK.py:task"]}


def _said(candidate: Candidate) -> Any:
    """A method by its name, with what differs from it; the target says how much goes."""
    base = Recipe.of(candidate.name).to_dict()
    own = candidate.recipe.to_dict()
    left_out = ("sparsity", "granularity") if candidate.structure == "pattern" else ("sparsity",)
    more = {k: v for k, v in own.items() if v != base[k] and k not in left_out}
    return {"method": candidate.name, **more} if more else candidate.name
