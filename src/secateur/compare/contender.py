"""What competes in a study: a method with what it changes, or a compound of several steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..compound import Compound
from ..errors import RecipeError, StudyError
from ..frozen import frozen, thawed
from ..fuse import methods as decompositions
from ..granularity import parse
from ..methods import load
from ..recipe import Recipe
from ..registry import parts
from ..runtime import is_runtime
from ..when.own import own_options
from ..when.train import runner_of
from .targets import OWN, PATTERN, of_weights, target_of


@dataclass(frozen=True)
class Contender:
    """A method in the study.

    Attributes:
        label: its name in tables.
        method: the named method.
        axes: fields of the recipe that it changes; of a method that trains in a way of its own ``knobs``, ``length``
            and ``rate``.
        tune: ``axis.knob`` -> values that are tried on validation data, with the study's first seed.
        when: ``before``, ``during`` or ``after`` training, where that is not the method's own.
        targets: those of the study's that it is tried at; None for all.
        compound: the steps, in place of a method.
        ablate: also try it with each step switched off.
        off: the step that is, counted from 1.
        masks: take the masks that this contender finds on another task: ``{"task": NAME, ...options}``.
    """

    label: str
    method: str
    axes: Mapping[str, Any] = field(default_factory=dict)
    tune: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    when: str | None = None
    targets: tuple[str, ...] | None = None
    masks: Mapping[str, Any] | None = None
    compound: Compound | None = None
    ablate: bool = False
    off: int | None = None

    def check(self) -> None:
        """Refuse a method that is not understood.

        Raises:
            RecipeError, StudyError: it is not.
        """
        if self.own and (self.tune or self.masks or self.when):
            raise StudyError(f"method '{self.method}' trains in a way of its own: leave out tune, masks and when")
        if self.own:
            self.options()
        elif self.compound is None:
            self.recipe()

    @property
    def own(self) -> bool:
        """Whether it trains in a way of its own, as gates of run time and supernets do: it has no recipe then."""
        return self.compound is None and runner_of(self.method) is not None

    @property
    def quantities(self) -> tuple[str, ...]:
        """Of such a method: what its targets may be in."""
        found: tuple[str, ...] = parts("transform")[self.method].facts.get("quantities", ("flops",))
        return found

    def options(self) -> dict[str, Any]:
        """Of such a method: what `train` takes beside the target.

        Raises:
            RecipeError: it has no such option.
        """
        return own_options(self.method, thawed(self.axes))

    @property
    def without(self) -> str:
        """The step that is switched off, in words; empty where none is."""
        return "" if self.compound is None or self.off is None else str(self.compound.steps[self.off - 1])

    def at(self, target: str) -> Compound:
        """The compound, taking what a target says, less the step that is switched off."""
        assert self.compound is not None
        made = self.compound if target == OWN else self.compound.at(target)
        return made if self.off is None else made.without(self.off)

    def fits(self, target: str, kind: str) -> str | None:
        """Why a compound is not tried at a target, on a task or a model; None where it is."""
        assert self.compound is not None
        free = [s for s in self.compound.steps if s.open]
        if target == OWN and free:
            return f"it leaves open how much '{free[0]}' takes: give it a target, or an amount to the step"
        if target != OWN and not free:
            return f"it says all amounts itself: its target is '{OWN}'"
        for step in free:
            single = step.kind == "prune" and not parse(step.recipe().granularity).coupled
            if single and not of_weights(target):
                return f"'{step}' takes single weights away, and {target} is for units of the whole model"
            if PATTERN.fullmatch(target) and not single:
                return f"'{step}' takes no single weights away, and {target} is a pattern of these"
            if step.kind == "runtime" and of_weights(target):
                return f"'{step}' takes no weights away, and {target} is about these"
        try:
            made = self.at(target)
        except RecipeError as error:
            return str(error)
        if kind == "model" and "task" in made.needs():
            return "a step of it trains on a task, and this is a model"
        return None

    def recipe(self, **more: Any) -> Recipe:
        """The method with its axes, and more of them."""
        axes = {**thawed(self.axes), **more}
        knobs: dict[str, dict[str, Any]] = {}
        for given in (thawed(self.axes).get("knobs", {}), more.get("knobs", {})):
            for axis, own in given.items():
                knobs[axis] = {**knobs.get(axis, {}), **own}
        return Recipe.of(self.method, **({**axes, "knobs": knobs} if knobs else axes))


def written(contender: Contender) -> Any:
    """A contender as a file says it."""
    c = contender
    if c.compound is not None:
        rest = {"ablate": True} if c.ablate else {}
        targets = {} if c.targets is None else {"targets": list(c.targets)}
        if c.method != "compound":  # a transform by name, which `_transform` made a compound of
            label = {"label": c.label} if c.label != c.method else {}
            return {**thawed(c.compound.steps[0].options), **targets, **label}
        return {"compound": c.compound.to_dict(), **rest, **targets, "label": c.label}
    more: dict[str, Any] = {
        **thawed(c.axes), **({"tune": {k: list(v) for k, v in c.tune.items()}} if c.tune else {}),
        **({"when": c.when} if c.when else {}), **({"masks": dict(c.masks)} if c.masks else {}),
        **({"targets": list(c.targets)} if c.targets is not None else {}),
        **({"label": c.label} if c.label != c.method else {}),
    }  # fmt: skip
    return {"method": c.method, **more} if more else c.method


def contenders(value: Any) -> Iterator[Contender]:
    """The contenders that an entry of a study stands for: one, and with ``ablate`` one more for each step."""
    made = _contender(value)
    yield made
    if made.ablate and made.compound is not None:
        for k, step in enumerate(made.compound.steps, 1):
            yield replace(made, label=f"{made.label} without {k} ({step})", off=k)


def _contender(value: Any) -> Contender:
    load()
    if isinstance(value, Mapping) and "compound" in value:
        return _compound(value)
    name = value if isinstance(value, str) else value.get("method") if isinstance(value, Mapping) else None
    if isinstance(name, str) and (name in decompositions() or is_runtime(name, trained=False)):
        return _transform(name, {} if isinstance(value, str) else value)
    if isinstance(value, str):
        return Contender(value, value)
    if not isinstance(value, Mapping) or not isinstance(value.get("method"), str):
        raise StudyError(f"a method is a name, or {{method: NAME, allocation: owl, label: ...}}, not {value!r}")
    rest = {k: v for k, v in value.items() if k not in ("method", "label", "tune", "when", "targets", "masks")}
    if taken := {"sparsity", "seed"} & set(rest):
        raise StudyError(f"method '{value['method']}': {sorted(taken)[0]} is the study's to say (targets, seeds)")
    tune = value.get("tune") or {}
    if not isinstance(tune, Mapping) or not all(
        "." in str(k) and isinstance(v, (list, tuple)) and v for k, v in tune.items()
    ):
        raise StudyError(
            f"method '{value['method']}': tune is axis.knob -> values, such as {{solver.damp: [0.01, 0.1]}}"
        )
    masks = value.get("masks")
    if masks is not None and not (isinstance(masks, Mapping) and isinstance(masks.get("task"), str)):
        raise StudyError(f"method '{value['method']}': masks says on which task they are found: {{task: NAME}}")
    return Contender(
        str(value.get("label", value["method"])), value["method"], frozen(rest),
        frozen({str(k): list(v) for k, v in tune.items()}), value.get("when"),
        None if value.get("targets") is None else tuple(target_of(x) for x in several(value, "targets")),
        None if masks is None else frozen(dict(masks)),
    )  # fmt: skip


def _compound(value: Mapping[str, Any]) -> Contender:
    """``{compound: FILE, or steps, label: ..., ablate: true, targets: [...]}``."""
    if unknown := sorted(set(map(str, value)) - {"compound", "label", "ablate", "targets"}):
        raise StudyError(f"a compound has label, ablate and targets beside its steps, and no '{unknown[0]}'")
    given = value["compound"]
    made = Compound.load(Path(given)) if isinstance(given, str) else Compound.of(given)
    ablate = value.get("ablate", False)
    if not isinstance(ablate, bool):
        raise StudyError(f"ablate is true or false, not {ablate!r}")
    label = str(value.get("label", made.name))
    if ablate and len(made.steps) == 1:
        raise StudyError(f"'{label}' has one step: there is nothing to switch off beside it")
    targets = None if value.get("targets") is None else tuple(target_of(x) for x in several(value, "targets"))
    return Contender(label, "compound", targets=targets, compound=made, ablate=ablate)


def _transform(name: str, value: Mapping[str, Any]) -> Contender:
    """A decomposition, or a method of run time: a compound of one step."""
    options = {str(k): v for k, v in value.items() if k not in ("label", "targets")}
    kind = "runtime" if is_runtime(name) else "decompose"
    made = Compound.of({"steps": [{kind: {**options, "method": name}}], "name": name})
    targets = None if value.get("targets") is None else tuple(target_of(x) for x in several(value, "targets"))
    return Contender(str(value.get("label", name)), name, targets=targets, compound=made)


def several(data: Mapping[str, Any], key: str) -> list[Any]:
    """What is one, or a list, as a list."""
    found = data.get(key)
    if found is None:
        return []
    return list(found) if isinstance(found, (list, tuple)) else [found]
