"""One step of a compound, as data: what it does, what it says of how much, and what it needs."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import RecipeError, UnknownName
from ..formats import parse_integers
from ..formats.sharing import parse_shared
from ..frozen import frozen, thawed
from ..fuse.choose import asked
from ..granularity import parse
from ..prune import recipe_of
from ..recipe import Recipe
from ..registry import get, parts
from ..runtime import is_runtime
from ..runtime.knobs import check
from ..stream.storage import shares
from ..structured import Target

_FIELDS = {f.name for f in dataclasses.fields(Recipe)}
_PATTERN = re.compile(r"\d+:\d+")

#: What a step does to a model: single weights become zero, units leave, layers become factors, weights become
#: integers, weights are trained, tokens leave at run time.
Takes = frozenset[str]


@dataclass(frozen=True)
class Kind:
    """What one kind of step is.

    Attributes:
        summary: in a few words.
        check: refuses options that are not understood.
    """

    summary: str
    check: Callable[[Step], None]


@dataclass(frozen=True)
class Step:
    """One step, such as ``prune`` with ``{"method": "wanda", "sparsity": 0.5}``.

    Attributes:
        kind: ``prune``, ``decompose``, ``quantize``, ``recover`` or ``runtime``.
        options: as the user wrote them; ``method`` among them.
    """

    kind: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UnknownName("kind of step", self.kind, KINDS, ", ".join(KINDS))
        object.__setattr__(self, "options", frozen(self.options))
        if not isinstance(self.options.get("method"), str):
            raise RecipeError(f"step '{self.kind}' needs a method: write {{{self.kind}: {{method: NAME, ...}}}}")
        KINDS[self.kind].check(self)

    @staticmethod
    def of(data: Any) -> Step:
        """A step as a file says it: ``{prune: {method: wanda, sparsity: 0.5}}``, ``{quantize: int8}``.

        >>> str(Step.of({"quantize": "int8"})), str(Step.of({"decompose": {"method": "svd", "target": "params 10%"}}))
        ('quantize int8', 'decompose svd, params 10%')
        """
        if isinstance(data, Step):
            return data
        if not isinstance(data, Mapping) or len(data) != 1:
            raise RecipeError(
                f"a step is one of {', '.join(KINDS)} and what it takes, such as {{prune: {{method: wanda, sparsity: "
                f"0.5}}}}, not {data!r}"
            )
        ((kind, given),) = data.items()
        if isinstance(given, str):
            given = {"as": given} if kind == "quantize" else {"method": given}
        if not isinstance(given, Mapping):
            raise RecipeError(f"step '{kind}' takes a method, or a mapping with one, not {given!r}")
        options = {str(k): v for k, v in given.items()}
        if kind == "quantize":
            options = {"method": "round" if _shared(options) else "gptq", **options}
        return Step(str(kind), options)

    @property
    def method(self) -> str:
        """The named method, or the recovery."""
        return str(self.options["method"])

    @property
    def amount(self) -> str | None:
        """How much it takes, as the user said it; None where it does not."""
        for key in ("target", "sparsity"):
            if self.options.get(key) is not None:
                return f"{self.options[key]}"
        pattern = self.options.get("granularity")
        return str(pattern) if pattern is not None and _PATTERN.fullmatch(str(pattern)) else None

    @property
    def open(self) -> bool:
        """Whether how much it takes is left open, for a study's target to say."""
        if self.kind == "prune":
            return self.amount is None and self.recipe().sparsity > 0
        if self.kind == "runtime":
            return self.amount is None and not set(self.options) & {"r", "keep"}
        return self.kind == "decompose" and self.amount is None

    def at(self, target: str) -> Step:
        """This step, taking as much as a target of a study says: ``0.5``, ``2:4`` or ``params 30%``."""
        if _PATTERN.fullmatch(target):
            given: dict[str, Any] = {"granularity": target}
        else:
            try:
                given = {"sparsity": float(target)}
            except ValueError:
                given = {"target": target}
        return Step(self.kind, {**thawed(self.options), **given})

    def recipe(self, seed: int | None = None) -> Recipe:
        """The recipe of a step that prunes or quantizes."""
        options = thawed(self.options)
        if seed is not None:
            options.setdefault("seed", seed)
        method, target = options.pop("method"), options.pop("target", None)
        integers, _ = options.pop("as", options.pop("quantize", None)), options.pop("multiple", None)
        own = None
        if integers is not None and isinstance(options.get("knobs"), dict):
            knobs = dict(options["knobs"])  # those of the solver are of its form that rounds
            own, options["knobs"] = knobs.pop("solver", None), knobs
        if self.kind == "quantize":
            options["sparsity"] = 0.0
            if method == "round":
                method = "magnitude"
        recipe = Recipe.of(method, **options)
        if recipe.driver == "once" and recipe.gate == "none":
            recipe = recipe_of(method, options, target, None)
        return recipe if integers is None else recipe.quantized(integers, own)

    @property
    def takes(self) -> Takes:
        """What it does to a model, in the words of `Takes`."""
        if self.kind == "decompose":
            return frozenset({"factors", "weights"} if "sparse" in self.method else {"factors"})
        if self.kind == "recover":
            trained = get("recovery", self.method).facts.get("trains")
            return frozenset({"training"} if trained is None else {"training", "integers", str(trained)})
        if self.kind == "runtime":
            return frozenset({"tokens"})
        recipe = self.recipe()
        found = {"units" if parse(recipe.granularity).coupled else "weights"} if recipe.sparsity > 0 else set()
        if get("solver", recipe.solver).facts.get("quantizes"):
            found |= {"integers", "shared"} if shares(recipe) else {"integers"}
        if trains(recipe):
            found.add("training")
        return frozenset(found)

    def needs(self) -> set[str]:
        """What must be given: ``data``, ``loss``, ``example``, ``task``."""
        if self.kind == "runtime":
            return {"example"}
        if self.kind == "recover":
            return {"data", "loss"}
        if self.kind == "decompose":
            part = get("transform", self.method)
            return set() if set(part.needs) <= {"weight", "stored", "budget", "mask_size"} else {"data"}
        recipe = self.recipe()
        found = {"data"} if recipe.needs_data and not recipe.needs_shape else set()
        found |= {"loss"} if recipe.needs_loss else set()
        found |= {"example"} if parse(recipe.granularity).coupled or recipe.needs_shape else set()
        return found | ({"task"} if "training" in self.takes else set())

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `of` reads back."""
        return {self.kind: thawed(self.options)}

    def __str__(self) -> str:
        if self.kind == "quantize":
            usual = self.method == "gptq" or _shared(self.options)
            return f"quantize {self.options['as']}" + ("" if usual else f" by {self.method}")
        more = ", ".join(str(x) for x in (self.amount, self.options.get("quantize")) if x is not None)
        return f"{self.kind} {self.method}" + (f", {more}" if more else "")


def trains(recipe: Recipe) -> bool:
    """Whether a recipe asks for a training run: masks that change in it, something learned, a recovery that trains."""
    healed = get("recovery", recipe.recovery).facts.get("data") == "task"
    return recipe.driver != "once" or recipe.learns or healed


# -- what each kind understands --------------------------------------------------------------------


def _known(step: Step, known: set[str]) -> None:
    if unknown := sorted(set(step.options) - known):
        raise UnknownName(f"option of step '{step.kind}'", unknown[0], known, ", ".join(sorted(known)))


def _check_prune(step: Step) -> None:
    if step.method in parts("transform"):
        other = "runtime" if is_runtime(step.method) else "decompose"
        raise RecipeError(f"'{step.method}' is no method of pruning: write {{{other}: {{method: {step.method}, ...}}}}")
    _known(step, {*_FIELDS, "target", "quantize", "multiple"})
    recipe = step.recipe()
    if recipe.embeddings != "none":
        raise RecipeError("a compound has no form on disk for embeddings: prune what it wrote, with --storage smallest")
    if step.options.get("quantize") is not None and parse(recipe.granularity).coupled:
        raise RecipeError(
            "quantize goes with single weights: after units of the whole model, make it a step of its own"
        )


def _check_decompose(step: Step) -> None:
    rest = {"target", "sparsity", "allocation", "only", "skip", "method"}
    asked(step.method, step.options.get("allocation"), {k: v for k, v in step.options.items() if k not in rest})
    if step.options.get("granularity") is not None:
        raise RecipeError(f"decompose '{step.method}' takes a target or a sparsity, not a pattern of single weights")
    if step.options.get("target") is not None:
        Target.parse(str(step.options["target"]))


def _shared(options: Mapping[str, Any]) -> bool:
    """Whether a quantization is to values that survivors share."""
    return str(options.get("as", "")).startswith("shared")


def _check_quantize(step: Step) -> None:
    _known(step, {"as", "method", "only", "skip", "knobs", "propagate"})
    if step.options.get("as") is None:
        raise RecipeError("step 'quantize' says which integers: write {quantize: int8}, int4, int4:128, or shared:5")
    if _shared(step.options):
        parse_shared(str(step.options["as"]))
        if step.method != "round":
            raise RecipeError("values that survivors share are found without data: leave the method out")
    else:
        parse_integers(str(step.options["as"]))
    if step.method not in ("gptq", "round"):
        raise UnknownName("method of quantization", step.method, ("gptq", "round"), "gptq, or round without data")
    step.recipe()


def _check_recover(step: Step) -> None:
    part = get("recovery", step.method)
    if part.facts.get("data") != "task" or "keeps" in part.facts or step.method == "scratch":
        good = [
            n for n, p in parts("recovery").items()
            if p.facts.get("data") == "task" and "keeps" not in p.facts and n != "scratch"
        ]  # fmt: skip
        raise RecipeError(
            f"recovery '{step.method}' belongs to a step that prunes; by itself there is {', '.join(good)}"
        )
    rest = {k: v for k, v in step.options.items() if k not in ("method", "epochs", "file")}
    if step.options.get("file") is not None and not step.options.get("top"):
        raise RecipeError("step 'recover': file keeps what the dense model says, and needs top: 32, say")
    part.knobs_with(rest)
    epochs = step.options.get("epochs", 1)
    if isinstance(epochs, bool) or not isinstance(epochs, (int, float)) or epochs <= 0:
        raise RecipeError(f"step 'recover': epochs is a number above 0, not {epochs!r}")


def _check_runtime(step: Step) -> None:
    if not is_runtime(step.method):
        known = [n for n in parts("transform") if is_runtime(n)]
        raise UnknownName("method of run time", step.method, known, ", ".join(known))
    check(get("transform", step.method), {k: v for k, v in step.options.items() if k != "method"})


KINDS: dict[str, Kind] = {
    "prune": Kind("weights or units go", _check_prune),
    "decompose": Kind("layers become products of smaller ones", _check_decompose),
    "quantize": Kind("weights become integers; zeros stay zero", _check_quantize),
    "recover": Kind("what is left is trained", _check_recover),
    "runtime": Kind("work is left out for each input", _check_runtime),
}
