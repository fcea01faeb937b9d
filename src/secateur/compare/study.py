"""A study: what is compared, on what, at which targets, with which seeds and budget. One file says it all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from .. import documents
from ..data import EVALUATION
from ..errors import RecipeError, StudyError, UnknownName
from ..frozen import frozen
from ..granularity import parse
from ..registry import parts
from ..structured import Target
from .contender import Contender, contenders, several, written
from .targets import OWN, PATTERN, axes_of, of_weights, target_of

#: Why a cell is empty that the study never meant to fill.
NOT_ASKED = "the study does not ask for it"
Kind = Literal["task", "model"]
#: Calibration text of language models, where a study names none.
TEXT = "text:calibration"
_BUDGET = (
    "budget is a mapping with epochs or total_epochs, samples, windows, length, eval_windows, seconds, processes "
    "and device"
)


@dataclass(frozen=True)
class Subject:
    """What is pruned: a task, which is trained here, or a language model, which was trained before.

    Attributes:
        source: the name of a ready task, ``FILE.py:NAME``, or a model as ``secateur prune`` takes it.
        options: sizes of a ready task.
    """

    kind: Kind
    source: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """In tables and in rows: the source, with the sizes that are not the task's own."""
        sizes = ",".join(f"{k}={v}" for k, v in sorted(self.options.items()))
        return f"{self.source} ({sizes})" if sizes else self.source


@dataclass(frozen=True)
class Budget:
    """What every method may spend; one for all.

    Attributes:
        epochs: of one training run of a task: the dense one, and what a method's recovery is measured in.
        total_epochs: of all training that a method asks for, dense training and every round of recovery together; in
            place of ``epochs``. A method of two runs then has two short ones.
        samples: training batches that a method measures on, of a task.
        windows, length: of calibration text, for language models.
        eval_windows: of held-out text: the first third is for validation, the rest for the test.
        seconds: wall time of one run; one that takes longer is stopped, and fails.
        processes: that make one run together, each with its share of every batch, or of the calibration text.
        device: ``cpu`` or ``cuda``, where tasks train; with ``cuda`` every process has a GPU.
    """

    epochs: float | None = None
    total_epochs: float | None = None
    samples: int = 8
    windows: int = 32
    length: int = 512
    eval_windows: int = 36
    seconds: float | None = None
    processes: int = 1
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.epochs is not None and self.total_epochs is not None:
            raise StudyError("budget: epochs is of one run, total_epochs of all runs of a method: give one of them")
        for name, value in asdict(self).items():
            whole = name in ("samples", "windows", "length", "eval_windows", "processes")
            if value is None or name == "device":
                continue
            if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or value <= 0:
                raise StudyError(f"budget: {name} is a {'whole ' if whole else ''}number above 0, not {value!r}")
        if self.device not in ("cpu", "cuda"):
            raise StudyError(f"budget: device is cpu or cuda, not {self.device!r}")
        if self.eval_windows < 3:
            raise StudyError("budget: eval_windows is at least 3: a third is for validation, the rest for the test")


@dataclass(frozen=True)
class Study:
    """The protocol of a comparison; `load` reads it, `dump` writes it.

    Attributes:
        name: of the study.
        subjects: what is pruned.
        contenders: the methods.
        targets: ``0.9`` (sparsity), ``2:4``, ``flops 50%``, ``params 50%``, ``latency 50%``; ``own`` for compounds that
            say all amounts themselves.
        seeds: of training, and of what is drawn; each language model is calibrated on other text with each.
        budget: what each method may spend.
        data: calibration text of language models.
        evaluation: held-out text of language models.
        latency: whether the speed of each result is measured beside the dense model.
        contrast: the ready made contrast that it answers; None for none.
    """

    name: str
    subjects: tuple[Subject, ...]
    contenders: tuple[Contender, ...]
    targets: tuple[str, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    budget: Budget = Budget()
    data: str = TEXT
    evaluation: str = EVALUATION
    latency: bool = False
    contrast: str | None = None

    def __post_init__(self) -> None:
        for what, given in (("subject", self.subjects), ("method", self.contenders), ("target", self.targets)):
            if not given:
                raise StudyError(f"a study needs at least one {what}")
        if not self.seeds:
            raise StudyError("a study needs at least one seed")
        for what, names in (
            ("subject", [s.name for s in self.subjects]),
            ("label", [c.label for c in self.contenders]),
            ("target", list(self.targets)),
            ("seed", list(self.seeds)),
        ):
            twice = next((n for k, n in enumerate(names) if n in names[:k]), None)
            if twice is not None:
                raise StudyError(f"{what} {twice!r} is there twice: name each once")
        if wrong := [c.when for c in self.contenders if c.when not in (None, "before", "during", "after")]:
            raise StudyError(f"when is before, during or after, not {wrong[0]!r}")
        if any(c.label == "dense" for c in self.contenders):
            raise StudyError("'dense' is the baseline, which every study has: name no method so")
        if self.budget.device != "cpu" and (model := next((s for s in self.subjects if s.kind == "model"), None)):
            raise StudyError(
                f"budget: device {self.budget.device} is for tasks; {model.name} is pruned on the CPU here"
            )
        for text in self.targets:
            axes_of(text)
        for c in self.contenders:
            c.check()
            if strange := [t for t in c.targets or () if t not in self.targets]:
                raise StudyError(f"'{c.label}' has the target {strange[0]}, which is not one of the study's")

    def leaves_out(self, contender: Contender, subject: Subject, target: str) -> str | None:
        """Why a method is not tried at a target; None where it is.

        >>> study = Study.of({"tasks": ["digits"], "methods": ["magnitude"], "targets": ["flops 50%"]})
        >>> study.leaves_out(study.contenders[0], study.subjects[0], "flops 50%")
        'it takes single weights away (element), and flops 50% is for units of the whole model'
        """
        if contender.targets is not None and target not in contender.targets:
            return NOT_ASKED
        if contender.compound is not None:
            return contender.fits(target, subject.kind)
        if target == OWN:
            return (
                "it is a method, and takes what a target says: 'own' is for compounds that say all amounts themselves"
            )
        if contender.own:
            if subject.kind == "model":
                return "it trains on a task, and this is a model"
            known = contender.quantities
            if of_weights(target):
                return f"it takes a target in {' or '.join(known)}, and {target} is for weights"
            quantity = Target.parse(target).quantity
            return None if quantity in known else f"it takes a target in {' or '.join(known)}, not in {quantity}"
        try:
            own = contender.recipe()
            recipe = contender.recipe(**axes_of(target))
        except RecipeError as error:
            return str(error)
        pattern = parse(own.granularity)
        if not of_weights(target) and not pattern.coupled:
            return f"it takes single weights away ({own.granularity}), and {target} is for units of the whole model"
        if PATTERN.fullmatch(target):
            method = parts("method").get(contender.method)
            if pattern.coupled:
                return f"it takes units of the whole model away, and {target} is a pattern of single weights"
            if method is not None and "N:M" not in method.facts["granularities"]:
                return (
                    f"method '{contender.method}' works on {', '.join(method.facts['granularities'])}, not on {target}"
                )
        if subject.kind == "model" and (recipe.driver != "once" or recipe.learns):
            return "it works while the model trains, and this one was trained before"
        if subject.kind == "model" and parts("recovery")[recipe.recovery].facts.get("data") == "task":
            return "its recovery trains on a task, and this is a model"
        return None

    # -- as data ---------------------------------------------------------------------------------

    @staticmethod
    def of(data: Mapping[str, Any]) -> Study:
        """A study of plain data, as a file or a command line gives it.

        Raises:
            StudyError: something is unknown, missing or of another kind.
        """
        known = {
            "study", "task", "tasks", "model", "models", "options", "methods", "targets", "seeds", "budget", "data",
            "evaluation", "latency", "contrast",
        }  # fmt: skip
        if unknown := sorted(set(map(str, data)) - known):
            raise UnknownName("field of a study", unknown[0], known, ", ".join(sorted(known)))
        options = data.get("options") or {}
        if not isinstance(options, Mapping):
            raise StudyError("options are sizes of a ready task: write {images: 6000}")
        subjects = [
            *(_subject("task", x, options) for x in several(data, "task") + several(data, "tasks")),
            *(_subject("model", x, {}) for x in several(data, "model") + several(data, "models")),
        ]
        seeds = data.get("seeds", 3)
        budget = data.get("budget") or {}
        if not isinstance(budget, Mapping) or (wrong := set(budget) - set(Budget.__dataclass_fields__)):
            raise StudyError(_BUDGET + (f", not {sorted(wrong)[0]}" if isinstance(budget, Mapping) else ""))
        return Study(
            name=str(data.get("study", "study")),
            subjects=tuple(subjects),
            contenders=tuple(c for x in several(data, "methods") for c in contenders(x)),
            targets=tuple(target_of(x) for x in several(data, "targets")),
            seeds=tuple(range(seeds)) if isinstance(seeds, int) and not isinstance(seeds, bool) else _seeds(seeds),
            budget=Budget(**budget),
            data=str(data.get("data", TEXT)),
            evaluation=str(data.get("evaluation", EVALUATION)),
            latency=bool(data.get("latency", False)),
            contrast=None if data.get("contrast") is None else str(data["contrast"]),
        )

    @staticmethod
    def load(source: str | Path) -> Study:
        """Read YAML 1.2 text, or a file. A study is data: it names files of code only as tasks do.

        Raises:
            StudyError: it cannot be read, or is not understood.
        """
        data = documents.read(source, "study", StudyError)
        if not isinstance(data, dict):
            raise StudyError("a study is a mapping with tasks or models, methods and targets; see docs/compare.md")
        return Study.of(data)

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `of` reads back."""
        own = asdict(Budget())
        found: dict[str, Any] = {"study": self.name, **({"contrast": self.contrast} if self.contrast else {})}
        tasks = [s for s in self.subjects if s.kind == "task"]
        models = [s.source for s in self.subjects if s.kind == "model"]
        if tasks:
            found["tasks"] = [{"task": s.source, **({"options": dict(s.options)} if s.options else {})} for s in tasks]
        if models:
            found["models"] = models
        found |= {
            "methods": [written(c) for c in self.contenders if c.off is None],
            "targets": list(self.targets), "seeds": list(self.seeds),
            "budget": {k: v for k, v in asdict(self.budget).items() if v != own[k]},
        }  # fmt: skip
        if models:
            found |= {"data": self.data, "evaluation": self.evaluation}
        return {**found, **({"latency": True} if self.latency else {})}

    def dump(self) -> str:
        """YAML 1.2 text; `load` reads it back to an equal study."""
        return documents.written(self.to_dict(), short=True)


def _seeds(value: Any) -> tuple[int, ...]:
    if not isinstance(value, (list, tuple)) or not all(isinstance(x, int) and not isinstance(x, bool) for x in value):
        raise StudyError(f"seeds are how many, or a list of whole numbers, not {value!r}")
    return tuple(value)


def _subject(kind: Kind, value: Any, options: Mapping[str, Any]) -> Subject:
    if isinstance(value, str):
        return Subject(kind, value, frozen(dict(options)))
    if isinstance(value, Mapping) and isinstance(value.get(kind), str) and set(value) <= {kind, "options"}:
        return Subject(kind, value[kind], frozen({**options, **(value.get("options") or {})}))
    raise StudyError(f"a {kind} is a name, or {{{kind}: NAME, options: {{...}}}}, not {value!r}")
