"""A recipe: one point in the product of the axes, as data."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from . import drivers, holds, learned  # noqa: F401  registers them
from . import granularity as granularity_module
from .consistency import check_parts, heals_units, measure_needs, ranks
from .documents import read, written
from .errors import RecipeError, UnknownName
from .facts import FACTS, of_source
from .formats import parse_integers
from .formats.sharing import parse_shared
from .frozen import frozen, plain, thawed
from .registry import Part, get

_PUBLISHED = re.compile(r"arXiv|\b(19|20)\d\d\b")  # a source with a number or a year can be cited

Propagate = Literal["layer", "block", "off"]
Control = Literal["none", "shuffle", "reinitialize", "invert"]

#: Facts that the engine makes itself; every other fact that a part names is evidence from data.
DERIVED = frozenset(of_source("engine"))
#: Evidence of single weights that needs a loss and labels, or targets.
GRADIENTS = frozenset(of_source("gradients", "unrolled"))
#: Evidence for which an input of the right shape is enough: no data.
SHAPES = frozenset(of_source("shape"))
#: Evidence that only a training run shows.
TRAINING = frozenset(of_source("training"))
_LOSS = frozenset(n for n, fact in FACTS.items() if fact.loss)


#: Axes that a recipe does not use: they are no part of what it is.
_UNUSED = (("gate", "none"), ("penalty", "none"), ("embeddings", "none"))


@dataclass(frozen=True)
class Recipe:
    """What to remove, how it is chosen, and what happens to the rest.

    Attributes:
        method: the name that the recipe started from; says nothing to the engine.
        criterion: what a weight is worth; None where the solver chooses by itself.
        granularity: ``element``, ``row``, ``N:M`` or ``block(r,c)``.
        allocation: how the sparsity is spread over layers.
        schedule: share of the target reached after each of ``steps`` rounds.
        steps: rounds of score and cut.
        nested: a weight that an earlier round took stays away; False lets it come back, with the value that it had.
        control: what a mask before training is checked against: ``shuffle`` it within each layer, ``reinitialize`` the
            weights that stay, or ``invert`` the scores (arXiv 2009.08576).
        driver: when the mask changes: ``once``, or while the model trains.
        hold: what becomes of weights that are gone, while the model trains.
        solver: whether and how the survivors move.
        recovery: what heals the model afterwards.
        gate: what is learned beside the weights and says which stay; then there is no criterion.
        penalty: what is added to the loss while the model trains.
        embeddings: integers that embedding tables and the output head become, such as ``int8``; none leaves them.
        sparsity: fraction of the weights in the pruned layers that goes, in [0, 1).
        propagate: what later layers are calibrated on. ``layer``: the output of pruned layers, also
            within a block; ``block``: of pruned blocks; ``off``: of the dense model.
        only, skip: globs over layer names.
        knobs: axis -> knob -> value.
        seed: of every random draw.
    """

    method: str = "custom"
    criterion: str | None = "magnitude"
    granularity: str = "element"
    allocation: str = "uniform"
    schedule: str = "one-shot"
    steps: int = 1
    nested: bool = True
    control: Control = "none"
    driver: str = "once"
    hold: str = "zero"
    solver: str = "rank"
    recovery: str = "none"
    gate: str = "none"
    penalty: str = "none"
    embeddings: str = "none"
    sparsity: float = 0.5
    propagate: Propagate = "layer"
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    knobs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "only", _globs(self.only))
        object.__setattr__(self, "skip", _globs(self.skip))
        if not _is_knobs(self.knobs):
            raise RecipeError("knobs must be written axis -> knob -> value, e.g. {criterion: {p: 2}}")
        object.__setattr__(self, "knobs", frozen(self.knobs))
        if isinstance(self.sparsity, bool) or not isinstance(self.sparsity, (int, float)):
            raise RecipeError(f"sparsity must be a number in [0, 1), not {self.sparsity!r}")
        if not 0.0 <= self.sparsity < 1.0:
            raise RecipeError(f"sparsity must be a fraction in [0, 1), not {self.sparsity:g} (0.5 removes half)")
        object.__setattr__(self, "sparsity", float(self.sparsity))
        if self.propagate not in ("layer", "block", "off"):
            raise RecipeError(f"propagate must be layer, block or off, not '{self.propagate}'")
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise RecipeError(f"steps must be a whole number of at least 1, not {self.steps!r}")
        if not isinstance(self.nested, bool):
            raise RecipeError(f"nested is true or false, not {self.nested!r}")
        if self.control not in (known := get_args(Control)):
            raise UnknownName("control", self.control, known, ", ".join(known))
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise RecipeError(f"seed must be a whole number, not {self.seed!r}")
        pattern = granularity_module.parse(self.granularity)
        object.__setattr__(self, "granularity", pattern.name)
        check_parts(self, pattern)

    @staticmethod
    def of(method: str, **overrides: Any) -> Recipe:
        """The recipe of a named method, with any field overridden.

        A granularity ``N:M`` sets the sparsity.

        >>> Recipe.of("wanda", granularity="2:4").sparsity
        0.5
        """
        from .methods import load  # registered lazily: the named methods are made of recipes

        load()
        base: Recipe = get("method", method).facts["recipe"]
        return base.override(**overrides)

    def override(self, **overrides: Any) -> Recipe:
        """This recipe with any field overridden; None leaves a field as it is.

        A granularity ``N:M`` sets the sparsity, knobs are merged, and a replaced part leaves its knobs behind.
        """
        base = self
        given = {k: v for k, v in overrides.items() if v is not None}
        names = {f.name for f in dataclasses.fields(Recipe)}
        if unknown := set(given) - names:
            raise RecipeError(f"a recipe has no field {sorted(unknown)}; its fields: {', '.join(sorted(names))}")
        pattern = granularity_module.parse(given.get("granularity", base.granularity))
        if pattern.keep is not None and "sparsity" not in given:
            given["sparsity"] = 1.0 - pattern.keep
        if not pattern.coupled and "recovery" not in given and heals_units(base.recovery):
            given["recovery"] = "none"  # there is no smaller model to heal
        new = given.get("knobs", {})
        if _is_knobs(new):
            kept = {a: k for a, k in base.knobs.items() if given.get(a, getattr(base, a)) == getattr(base, a)}
            knobs = {a: {**kept.get(a, {}), **new.get(a, {})} for a in sorted({*kept, *new})}
            given["knobs"] = {a: k for a, k in knobs.items() if k}
        if "criterion" not in given and {"solver", "allocation", "gate"} & set(given):
            # What chooses by itself has no use for the criterion that the method came with.
            solver, allocation = given.get("solver", base.solver), given.get("allocation", base.allocation)
            if given.get("gate", base.gate) != "none" or not ranks(solver, allocation):
                given["criterion"] = None
                given["knobs"] = {a: k for a, k in given.get("knobs", base.knobs).items() if a != "criterion"}
        return dataclasses.replace(base, **given)

    def quantized(self, integers: str, knobs: Mapping[str, Any] | None = None) -> Recipe:
        """This recipe with survivors rounded to integers, by the form of its solver that does so.

        Args:
            integers: ``int4``, ``int8``, or with a group of inputs ``int4:128``; or ``shared:5`` for ``2^5`` values
                that the survivors of a layer share.
            knobs: more of that form's, such as ``{"symmetric": False}``.

        >>> Recipe.of("sparsegpt").quantized("int4").solver
        'sparsegpt-gptq'
        """
        part = get("solver", self.solver)
        own: dict[str, Any]
        if integers.startswith("shared"):
            name, own = part.facts.get("shares"), {"bits": parse_shared(integers)}
            way = "choose rank, or prune first and then share what it wrote (--solver share --criterion magnitude)"
        else:
            bits, group = parse_integers(integers)
            name, own = part.facts.get("integers"), {"bits": bits, "group": group}
            way = (
                "choose sparsegpt or rank, or prune first and then quantize what it wrote (--solver gptq --criterion "
                "magnitude)"
            )
        if name is None:
            raise RecipeError(f"solver '{self.solver}' has no form for '{integers}': {way}")
        known = get("solver", name).knobs
        held = {k: v for k, v in thawed(self.knobs.get("solver", {})).items() if k in known}
        return self.override(solver=name, knobs={"solver": {**held, **(knobs or {}), **own}})

    def parts(self) -> dict[str, Part]:
        """The registered part on each axis."""
        found = {
            "allocation": get("allocation", self.allocation),
            "schedule": get("schedule", self.schedule),
            "driver": get("driver", self.driver),
            "hold": get("hold", self.hold),
            "solver": get("solver", self.solver),
            "recovery": get("recovery", self.recovery),
        }
        if self.criterion is not None:
            found = {"criterion": get("criterion", self.criterion), **found}
        trained = {"gate": self.gate, "penalty": self.penalty}
        return {**found, **{axis: get(axis, name) for axis, name in trained.items() if name != "none"}}

    def knobs_of(self, axis: str) -> dict[str, Any]:
        """All knobs of the part on an axis, with this recipe's values."""
        return self.parts()[axis].knobs_with(thawed(self.knobs.get(axis, {})))

    @property
    def learns(self) -> bool:
        """Whether something is learned beside the weights, or added to the loss, while the model trains."""
        return self.gate != "none" or self.penalty != "none"

    @property
    def uses_score(self) -> bool:
        """Whether the criterion is evaluated at all."""
        names = {*get("solver", self.solver).needs, *measure_needs(self.allocation)}
        return self.criterion is not None and "score" in names

    def needs(self) -> frozenset[str]:
        """Evidence that data must supply: the facts that the parts name, less what the engine makes."""
        names = set(get("solver", self.solver).needs) | set(measure_needs(self.allocation))
        if self.uses_score and self.criterion is not None:
            names |= set(get("criterion", self.criterion).needs)
        if "curvature" in names:
            names.add("gram")
        needs = names - DERIVED
        if get("recovery", self.recovery).facts.get("data") == "block":
            needs.add("inputs")
        return frozenset(needs)

    @property
    def needs_data(self) -> bool:
        return bool(self.needs())

    @property
    def needs_shape(self) -> bool:
        """Whether an input of the right shape is all that it needs."""
        return bool(self.needs()) and self.needs() <= SHAPES

    @property
    def needs_whole(self) -> bool:
        """Whether the whole model must be at hand at once, for what is measured or done with it."""
        return self.needs_loss or self.steps > 1 or bool(self.needs() & SHAPES) or self.control != "none"

    @property
    def needs_loss(self) -> bool:
        return bool(self.needs() & _LOSS)

    def check(self, layers: Iterable[Any] = (), *, data: bool = True, loss: bool = True) -> None:
        """Say before any work what is missing and what cannot be.

        Args:
            layers: the `Layer` objects that would be pruned.
            data: whether calibration data is given.
            loss: whether a loss is given.

        Raises:
            RecipeError: with one sentence that says what to do.
        """
        needs = sorted(self.needs())
        if needs and not data:
            part = self._who_needs(needs[0])
            how = "on data: pass --data"
            if needs[0] in SHAPES:
                how = "on the shape of an input: pass example= (--example 1x3x32x32), or data"
            raise RecipeError(f"{part} needs {needs[0]}, which is measured {how}")
        if self.needs_loss and not loss:
            name = sorted(self.needs() & _LOSS)[0]
            raise RecipeError(f"{self._who_needs(name)} needs {name}, which is measured with a loss: pass loss=")
        pattern = granularity_module.parse(self.granularity)
        fits = get("solver", self.solver).facts.get("check")
        for layer in layers:
            pattern.check(layer.shape, layer.name)
            if fits is not None:
                fits(layer.shape, layer.name, pattern, self.knobs_of("solver"))

    def _who_needs(self, fact: str) -> str:
        for axis, part in self.parts().items():
            names = {*part.needs, *(measure_needs(part.name) if axis == "allocation" else ())}
            if fact in names or (fact == "gram" and "curvature" in names) or (fact == "inputs" and axis == "recovery"):
                return f"{axis} '{part.name}'"
        return f"method '{self.method}'"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {f.name: thawed(getattr(self, f.name)) for f in dataclasses.fields(self)}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Recipe:
        """The inverse of `to_dict`; unknown fields are refused."""
        names = {f.name for f in dataclasses.fields(Recipe)}
        if unknown := set(data) - names:
            raise RecipeError(f"a recipe has no field {sorted(unknown)}; its fields: {', '.join(sorted(names))}")
        return Recipe(**dict(data))

    def dump(self) -> str:
        """YAML 1.2 text; `load` reads it back to an equal recipe."""
        return written(self.to_dict())

    @staticmethod
    def load(source: str | Path) -> Recipe:
        """Read YAML text, or a file. A recipe is data: it never names code to import."""
        data = read(source)
        if not isinstance(data, dict):
            where = f" in {source}" if isinstance(source, Path) else ""
            raise RecipeError(f"a recipe{where} is a mapping of fields, not {type(data).__name__}")
        if data.get("method", "custom") != "custom" and set(data) != {f.name for f in dataclasses.fields(Recipe)}:
            data = dict(data)
            return Recipe.of(data.pop("method"), **data)
        return Recipe.from_dict(data)

    @property
    def digest(self) -> str:
        """First 16 hex digits of the SHA-256 of the recipe, the same in every process.

        Knobs count with their values, set or left at their defaults; ``method`` is only a label.
        """
        content = {k: v for k, v in self.to_dict().items() if k != "method" and (k, v) not in _UNUSED}
        content["knobs"] = {
            axis: {k: v for k, v in self.knobs_of(axis).items() if v is not inspect.Parameter.empty}  # sparsity
            for axis in self.parts()
        }
        text = json.dumps(plain(content), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def __hash__(self) -> int:
        return int(self.digest, 16)

    def __reduce__(self) -> tuple[Any, ...]:
        return Recipe.from_dict, (self.to_dict(),)  # a read-only mapping cannot be pickled or copied

    def cite(self) -> list[str]:
        """The sources of the parts in use, each once."""
        parts = [get("granularity", _granularity_part(self.granularity)), *self.parts().values()]
        lines: dict[str, None] = {}
        for part in parts:
            if part.facts.get("paper") or _PUBLISHED.search(part.card.source):
                lines.setdefault(part.card.source)
        return list(lines)


def _granularity_part(text: str) -> str:
    return "nm" if ":" in text else text.split("(")[0]


def _is_knobs(value: Any) -> bool:
    return value is None or (isinstance(value, Mapping) and all(isinstance(k, Mapping) for k in value.values()))


def _globs(value: str | Sequence[str] | None) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value or ())
