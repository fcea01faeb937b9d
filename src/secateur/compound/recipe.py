"""A compound: steps in the order in which they are done, as data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ..documents import read as document
from ..documents import written
from ..errors import RecipeError, UnknownName
from ..frozen import plain, thawed
from ..recipe import Recipe
from ..registry import get
from .order import check_order
from .steps import Step

if TYPE_CHECKING:
    from .plan import CompoundPlan
    from .run import Compounded


@dataclass(frozen=True)
class Compound:
    """Pruning, decomposition, quantization and training in the order in which they are written.

    Attributes:
        steps: what is done, first to last.
        name: what it is called; says nothing to the engine.
        seed: of every random draw of steps that name no seed of their own.

    >>> made = Compound.of([{"prune": {"method": "wanda", "sparsity": 0.5}}, {"quantize": "int8"}])
    >>> print(made)
    compound: prune wanda, 0.5 > quantize int8
    >>> str(made.without(1))
    'compound: quantize int8'

    Raises:
        RecipeError: a step is not understood, or cannot come where it stands.
    """

    steps: tuple[Step, ...]
    name: str = "compound"
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", tuple(Step.of(s) for s in self.steps))
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise RecipeError(f"seed must be a whole number, not {self.seed!r}")
        check_order(self.steps)

    # -- as data -----------------------------------------------------------------------------------

    @staticmethod
    def of(data: Any) -> Compound:
        """A compound of plain data: a list of steps, or a mapping with ``steps`` and perhaps ``name`` and ``seed``."""
        if isinstance(data, Compound):
            return data
        given = dict(data) if isinstance(data, Mapping) else {"steps": data}
        if unknown := sorted(set(map(str, given)) - {"steps", "name", "seed"}):
            raise UnknownName("field of a compound", unknown[0], ("steps", "name", "seed"), "steps, name, seed")
        steps = given.get("steps")
        if not isinstance(steps, (list, tuple)):
            raise RecipeError(f"a compound is a list of steps, not {steps!r}: see docs/compound.md")
        return Compound(tuple(Step.of(s) for s in steps), str(given.get("name", "compound")), given.get("seed", 0))

    @staticmethod
    def load(source: str | Path) -> Compound:
        """Read YAML 1.2 text, or a file.

        Raises:
            RecipeError: it cannot be read, or is not understood.
        """
        return Compound.of(document(source))

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `of` reads back."""
        return {"name": self.name, "seed": self.seed, "steps": [s.to_dict() for s in self.steps]}

    def dump(self) -> str:
        """YAML 1.2 text; `load` reads it back to an equal compound."""
        return written(self.to_dict(), short=True)

    @property
    def digest(self) -> str:
        """First 16 hex digits of the SHA-256 of what it does, the same in every process; the name is only a label.

        Steps that prune count with all of their recipe, so that a knob at its default and one that is set to it agree.
        """
        content = [self.seed, *(self._content(s) for s in self.steps)]
        text = json.dumps(plain(content), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def _content(self, step: Step) -> dict[str, Any]:
        if step.kind in ("prune", "quantize"):
            more = {k: v for k, v in thawed(step.options).items() if k in ("target", "multiple")}
            return {"kind": "prune", "recipe": step.recipe(self.seed).digest, **more}
        return {"kind": step.kind, **{k: v for k, v in thawed(step.options).items() if k != "file"}}

    def __hash__(self) -> int:
        return int(self.digest, 16)

    # -- what it asks for --------------------------------------------------------------------------

    def needs(self) -> set[str]:
        """What must be given: ``data``, ``loss``, ``example``, ``task``."""
        return set[str]().union(*(s.needs() for s in self.steps))

    @property
    def teaches(self) -> bool:
        """Whether the dense model is needed until the end."""
        return bool(self.lessons())

    @property
    def shares(self) -> bool:
        """Whether survivors share values, which no stock layout holds."""
        return any("shared" in s.takes for s in self.steps)

    def lessons(self) -> list[Step]:
        """The steps that learn from the dense model."""
        return [s for s in self.steps if s.kind == "recover" and get("recovery", s.method).facts.get("teacher")]

    def cite(self) -> list[str]:
        """The sources of the parts in use, each once."""
        lines: dict[str, None] = {}
        for step in self.steps:
            if step.kind in ("prune", "quantize"):
                lines |= dict.fromkeys(step.recipe().cite())
            else:
                kind = "recovery" if step.kind == "recover" else "transform"
                lines[get(kind, step.method).card.source] = None
        return list(lines)

    # -- variants ----------------------------------------------------------------------------------

    @property
    def open(self) -> bool:
        """Whether a step leaves open how much it takes."""
        return any(s.open for s in self.steps)

    def at(self, target: str) -> Compound:
        """This compound with a target for its steps that leave open how much they take."""
        return replace(self, steps=tuple(s.at(target) if s.open else s for s in self.steps))

    def without(self, number: int) -> Compound:
        """This compound without one of its steps, counted from 1.

        Raises:
            RecipeError: there is no such step, or it is the only one.
        """
        if not 1 <= number <= len(self.steps) or len(self.steps) == 1:
            raise RecipeError(f"{self.name} has {len(self.steps)} steps: step {number} cannot be switched off")
        return replace(self, steps=self.steps[: number - 1] + self.steps[number:])

    # -- what it does ------------------------------------------------------------------------------

    def carry_out(self, model: nn.Module, **given: Any) -> Compounded:
        """What `secateur.prune` does with a compound."""
        from .run import carry_out

        return carry_out(model, self, **given)

    def preview(self, model: nn.Module, **given: Any) -> CompoundPlan:
        """What `secateur.plan` does with a compound."""
        from .plan import preview

        return preview(model, self, **given)

    def __str__(self) -> str:
        return f"{self.name}: {' > '.join(map(str, self.steps))}"


def restored(data: Mapping[str, Any]) -> Recipe | Compound:
    """The recipe, or the compound, of plain data that `to_dict` gave."""
    return Compound.of(data) if isinstance(data.get("steps"), (list, tuple)) else Recipe.from_dict(dict(data))


def is_compound(source: str | Path) -> bool:
    """Whether a recipe, as text or file, is a list of steps."""
    data = document(source)
    return isinstance(data, list) or (isinstance(data, dict) and isinstance(data.get("steps"), list))


def read(source: str | Path) -> Recipe | Compound:
    """The recipe, or the compound, of YAML text or a file."""
    return Compound.load(source) if is_compound(source) else Recipe.load(source)
