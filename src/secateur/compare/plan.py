"""From a study to its runs: each one small dictionary of plain data, named by a digest of what decides its outcome."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..compound import Compound
from ..data import read_text
from ..errors import StudyError
from ..frozen import plain, thawed
from ..recipe import Recipe
from ..registry import parts
from ..when.train import rounds_of
from .contender import Contender
from .rows import Row
from .study import NOT_ASKED, TEXT, Budget, Study, Subject
from .targets import axes_of, structured

#: Counts up when the same description would give other figures than before.
PROTOCOL = 1
#: Bytes at both ends of a file of weights that its digest is of.
_ENDS = 1 << 20


@dataclass(frozen=True)
class Run:
    """One run of a study, not yet made.

    Attributes:
        digest: of what decides the outcome: runs of two studies with one digest are the same run.
        spec: what a worker needs to know.
        subject, label, target, seed, role: as in `Row`. Two entries of a study may share a run: a method that takes
            neither data nor chance does the same with each seed.
        after: the digest of the run that has to end before this one begins; None for none.
        older: what earlier versions called the same run.
    """

    digest: str
    spec: Mapping[str, Any]
    subject: str
    label: str
    target: str
    seed: int
    role: str
    after: str | None = None
    older: str | None = None

    def row(self, status: str, reason: str | None, result: Mapping[str, Any]) -> Row:
        """The row of what became of it."""
        spec = self.spec
        return Row(
            self.digest, self.subject, spec["kind"], self.label, spec["recipe"], self.target, self.seed, self.role,
            status, reason, result,
        )  # fmt: skip


@dataclass(frozen=True)
class Left:
    """A method that is not tried at a target, and why."""

    subject: str
    label: str
    target: str
    reason: str


def runs_of(study: Study, chosen: Mapping[tuple[str, str, str], Mapping[str, Any]] | None = None) -> list[Run]:
    """The entries of a study: dense ones first, then seed by seed, so that one that is stopped early has all methods.

    Args:
        chosen: the knobs that tuning found, by subject, label and target. A method that has knobs to tune has no final
            run at a target before they are there.
    """
    made: list[Run] = []
    facts = _Facts()
    for subject in study.subjects:
        made += [facts.run(study, subject, None, "", seed) for seed in study.seeds]
    first = {(r.subject, r.seed): r.digest for r in made}
    for contender, target, subject in itertools.product(study.contenders, study.targets, study.subjects):
        if contender.tune and study.leaves_out(contender, subject, target) is None:
            for knobs in grid(contender.tune):
                made.append(facts.run(study, subject, contender, target, study.seeds[0], knobs, role="tune"))
    for k, contender, target, subject in itertools.product(
        range(len(study.seeds)), study.contenders, study.targets, study.subjects
    ):
        if study.leaves_out(contender, subject, target) is not None:
            continue
        cell = (subject.name, contender.label, target)
        if not contender.tune:
            made.append(facts.run(study, subject, contender, target, study.seeds[k]))
        elif chosen is not None and cell in chosen:
            made.append(facts.run(study, subject, contender, target, study.seeds[k], chosen[cell]))
    return [_after(run, first) for run in made]


def left_out(study: Study) -> list[Left]:
    """What the study does not try."""
    found = []
    for subject, contender, target in itertools.product(study.subjects, study.contenders, study.targets):
        reason = study.leaves_out(contender, subject, target)
        if reason is not None and reason != NOT_ASKED:
            found.append(Left(subject.name, contender.label, target, reason))
    return found


def chosen_knobs(study: Study, rows: Iterable[Row]) -> dict[tuple[str, str, str], dict[str, Any]]:
    """What tuning found, for the cells whose trials are all over: the knobs with the best score on validation data."""
    trials: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if row.role == "tune":
            trials.setdefault((row.subject, row.label, row.target), []).append(row)
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    labels = {c.label: c for c in study.contenders}
    for cell, tried in trials.items():
        if cell[1] not in labels or len(tried) < len(list(grid(labels[cell[1]].tune))):
            continue
        good = [r for r in tried if r.done and r.figure("valid") is not None]
        if not good:
            found[cell] = {}  # all of them failed: the final runs take the method's own knobs, and will say why
            continue
        sign = 1.0 if good[0].higher_is_better else -1.0
        best = max(good, key=lambda r: sign * (r.figure("valid") or 0.0))
        recipe = best.recipe or {}
        names = labels[cell[1]].tune
        found[cell] = nested({n: recipe["knobs"][n.partition(".")[0]][n.partition(".")[2]] for n in names})
    return found


def grid(tune: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """All combinations of knobs, as a recipe takes them.

    >>> list(grid({"solver.damp": (0.01, 0.1)}))
    [{'solver': {'damp': 0.01}}, {'solver': {'damp': 0.1}}]
    """
    for values in itertools.product(*tune.values()):
        yield nested(dict(zip(tune, values, strict=True)))


def nested(knobs: Mapping[str, Any]) -> dict[str, Any]:
    """``axis.knob`` -> value, as axis -> knob -> value."""
    found: dict[str, dict[str, Any]] = {}
    for name, value in knobs.items():
        axis, _, knob = name.partition(".")
        found.setdefault(axis, {})[knob] = value
    return found


def _seed_matters(subject: Subject, recipe: Recipe | Compound | None) -> bool:
    """Whether another seed can give another outcome: not of a given model that is pruned without data and chance."""
    if subject.kind == "task":
        return True
    if recipe is None:
        return False
    if isinstance(recipe, Compound):
        own = [s.recipe() for s in recipe.steps if s.kind in ("prune", "quantize")]
        return bool(recipe.needs() & {"data"}) or any(_seed_matters(subject, r) for r in own)
    random = "random" in (recipe.criterion or "") or recipe.control != "none"
    return recipe.needs_data or random or recipe.recovery != "none"


def _after(run: Run, first: Mapping[tuple[str, int], str]) -> Run:
    if run.spec["recipe"] is None or run.spec["kind"] != "task":
        return run
    return replace(run, after=first.get((run.subject, run.seed)))


def code_digest(source: str) -> str | None:
    """Of the file of a task, ``FILE.py:NAME``; None where it is in no file."""
    path, colon, _ = source.rpartition(":")
    if not (colon and path.endswith(".py") and Path(path).is_file()):
        return None
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


class _Facts:
    """Digests of files, each read once."""

    def __init__(self) -> None:
        self.known: dict[str, str] = {}

    def code(self, source: str) -> str | None:
        if ".py:" not in source:
            return None
        if source not in self.known:
            self.known[source] = code_digest(source) or ""
        return self.known[source] or None

    def weights(self, source: str) -> str | None:
        """Of a model directory: sizes, beginnings and ends of its files; None of a name that stands for one model."""
        folder = Path(source)
        if not folder.is_dir():
            return None
        if f"weights {source}" not in self.known:
            total = hashlib.sha256()
            for file in sorted(folder.glob("*.safetensors")):
                with file.open("rb") as stream:
                    size = stream.seek(0, 2)
                    stream.seek(0)
                    total.update(f"{file.name} {size}".encode() + stream.read(_ENDS))
                    stream.seek(max(0, size - _ENDS))
                    total.update(stream.read(_ENDS))
            self.known[f"weights {source}"] = total.hexdigest()[:16]
        return self.known[f"weights {source}"]

    def text(self, source: str) -> dict[str, str]:
        if source not in self.known:
            self.known[source] = hashlib.sha256(read_text(source).encode()).hexdigest()[:16]
        return {"source": source, "sha256": self.known[source]}

    def run(
        self, study: Study, subject: Subject, contender: Contender | None, target: str, seed: int,
        knobs: Mapping[str, Any] | None = None, role: str = "final",
    ) -> Run:  # fmt: skip
        recipe: Recipe | Compound | None = None
        own_way = None  # what stands in place of a recipe
        if contender is not None and contender.compound is not None:
            recipe = contender.at(target)
        elif contender is not None and contender.own:
            when = parts("transform")[contender.method].facts["when"]
            own_way = {"method": contender.method, "when": when, "seed": seed, **contender.options()}
        elif contender is not None:
            own = {**axes_of(target), **({"knobs": dict(knobs)} if knobs else {})}
            recipe = method = contender.recipe(**own)
            if subject.kind == "task" and "steps" not in contender.axes:  # a fifth a round: so many as the target takes
                recipe = method.override(steps=rounds_of(Recipe.of(contender.method), method))
        matters = _seed_matters(subject, recipe)
        drawn = seed if matters else 0
        if isinstance(recipe, Compound):
            recipe = replace(recipe, seed=drawn)
        elif recipe is not None:
            recipe = recipe.override(seed=drawn)
        compound = isinstance(recipe, Compound)
        budget = study.budget
        spent: dict[str, Any] = {"seconds": budget.seconds}
        if subject.kind == "task":
            spent |= {"epochs": budget.epochs, "total_epochs": budget.total_epochs, "samples": budget.samples}
        else:
            spent |= {"windows": budget.windows, "length": budget.length, "eval_windows": budget.eval_windows}
        if budget.processes != 1:
            spent["processes"] = budget.processes
        if budget.device != "cpu":
            spent["device"] = budget.device
        masks = thawed(contender.masks) if contender is not None and contender.masks else None
        spec: dict[str, Any] = {
            "protocol": PROTOCOL, "kind": subject.kind, "source": subject.source, "options": dict(subject.options),
            "code": self.code(subject.source), "recipe": own_way if recipe is None else recipe.to_dict(), "seed": drawn,
            "target": structured(target) if target and not compound else None, "role": role, "latency": study.latency,
            "when": contender.when if contender is not None else None, "masks": masks, "budget": spent,
        }  # fmt: skip
        if masks is not None and (code := self.code(masks["task"])) is not None:
            spec["masks_code"] = code
        if subject.kind == "model" and (weights := self.weights(subject.source)) is not None:
            spec["weights"] = weights
        if subject.kind == "model":
            spec |= {"data": self.text(study.data), "evaluation": self.text(study.evaluation)}
            measured = _measures(recipe)
            if measured and spec["data"]["sha256"] == spec["evaluation"]["sha256"]:
                both = f"{study.data} and {study.evaluation}"
                raise StudyError(f"the calibration text and the held-out text are the same ({both}): give two texts")
        older, digest = _digest(recipe, spec), _digest(recipe, self._deciding(spec, recipe))
        label = "dense" if contender is None else contender.label
        return Run(digest, spec, subject.name, label, target, seed, role, older=None if older == digest else older)

    def _deciding(self, spec: Mapping[str, Any], recipe: Recipe | Compound | None) -> dict[str, Any]:
        """The description without what does not decide: the time that a run may take; and of one that measures on no
        data, which text it would have. Those stand as they are by default, which keeps the names of older runs."""
        found, own = dict(spec), Budget()
        budget = {**spec["budget"], "seconds": own.seconds}
        if spec["kind"] == "model" and not _measures(recipe):
            budget["windows"] = own.windows
            budget.pop("processes", None)
            found["data"] = self.text(TEXT)
        return {**found, "budget": budget}


def _measures(recipe: Recipe | Compound | None) -> bool:
    """Whether calibration text is read."""
    return "data" in recipe.needs() if isinstance(recipe, Compound) else recipe is not None and recipe.needs_data


def _digest(recipe: Recipe | Compound | None, decides: Mapping[str, Any]) -> str:
    """The name of a run; what has no recipe is in the description as it is."""
    steps = recipe.steps if isinstance(recipe, Recipe) else None
    named = {**decides, "recipe": decides["recipe"] if recipe is None else recipe.digest, "steps": steps}
    text = json.dumps(plain(named), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:20]
