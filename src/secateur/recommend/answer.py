"""The answer: every method kept, dropped or ranked with its reasons, what to use first, and what is not known."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..methods import load
from ..registry import parts
from . import predict
from .advice import advise
from .aim import fit, target_of
from .bits import held_together
from .candidate import Candidate, Expected
from .cost import Cost, cost_of
from .evidence import Run, gather
from .rank import Effect, Evidence, effect
from .situation import Situation
from .verdict import Verdict, ask, points

Status = Literal["ranked", "kept", "dropped"]


@dataclass(frozen=True)
class Entry:
    """One method in a situation.

    Attributes:
        candidate: the recipe as it would be used.
        status: ``ranked``: by runs of its own or of its kin; ``kept``: nothing rules it out, and nothing near was
            measured; ``dropped``: a rule takes it out.
        verdicts: what the rules say.
        effect: what runs say; None of what was dropped.
        loss, speed: what is expected.
        cost: what it takes.
        holds: False where the drop that is expected is more than is allowed, by its whole interval; None where nobody
            knows.
        place: the loss that it is ranked by (`predict.by_effect`); None where its expected place alone ranks it.
    """

    candidate: Candidate
    status: Status
    verdicts: tuple[Verdict, ...]
    effect: Effect | None
    loss: Expected
    speed: Expected
    cost: Cost
    holds: bool | None
    place: float | None = None

    @property
    def name(self) -> str:
        return self.candidate.name

    @property
    def reasons(self) -> list[str]:
        """Each reason as a sentence would have it; what rules a method out first."""
        ordered = sorted(self.verdicts, key=lambda v: v.action != "drop")
        told = [{"promote": "+ ", "demote": "- ", "drop": ""}[v.action] + v.reason for v in ordered]
        if self.effect is not None and self.status == "ranked":
            told.append(str(self.effect))
        return told or ["nothing speaks against it, and nothing near was measured"]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        found = None
        if self.effect is not None:
            e = self.effect
            found = {
                "place": e.value, "own": e.direct, "prior": e.prior, "tasks": e.tasks, "runs": e.runs,
                "studies": list(e.studies), "kin_runs": e.kin,
            }  # fmt: skip
        return {
            "method": self.name, "status": self.status, "reasons": self.reasons,
            "verdicts": [v.to_dict() for v in self.verdicts], "aim": self.candidate.aim.text, "effect": found,
            "drop": self.loss.to_dict(), "speed": self.speed.to_dict(), "cost": self.cost.to_dict(),
            "holds": self.holds,
        }  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """What is recommended.

    Attributes:
        situation: what was asked.
        entries: every method: those that may be used first, the best in front, then what was dropped.
        advice: what is true beyond methods: quantize instead, train longer, nothing is known.
        studies: names of the studies with cells that say something of this situation.
    """

    situation: Situation
    entries: tuple[Entry, ...]
    advice: tuple[str, ...]
    studies: tuple[str, ...]

    @property
    def usable(self) -> tuple[Entry, ...]:
        """What was not dropped, the best first."""
        return tuple(e for e in self.entries if e.status != "dropped")

    @property
    def first(self) -> Entry | None:
        """What to use; None where every method was dropped."""
        return next(iter(self.usable), None)

    @property
    def dropped(self) -> Counter[str]:
        """How many methods each rule took out; one that several take out counts for the first."""
        named = [next(v.rule for v in e.verdicts if v.action == "drop") for e in self.entries if e.status == "dropped"]
        return Counter(named)

    def recipe(self) -> str:
        """The first recipe as YAML, with the command that runs it."""
        from ..errors import RecipeError

        if self.first is None:
            raise RecipeError(f"no method fits, so there is no recipe to write: {' '.join(self.advice)}")
        return f"# {self.command(self.first, 'recipe.yaml')}\n{self.first.candidate.recipe.dump()}"

    def command(self, entry: Entry, recipe: str | None = None) -> str:
        """What one would type."""
        return command(entry.candidate, self.situation, recipe)

    def study(self) -> str:
        """The study that would tell, as YAML for ``secateur compare``."""
        from .studies import deciding

        return deciding(self)

    def to_dict(self, everything: bool = True) -> dict[str, Any]:
        """Plain JSON data."""
        shown = self.entries if everything else self.usable
        return {
            "situation": self.situation.to_dict(), "asked": str(self.situation), "advice": list(self.advice),
            "studies": list(self.studies), "dropped": dict(self.dropped),
            "methods": [
                {**e.to_dict(), "command": self.command(e), "recipe": e.candidate.recipe.to_dict()} for e in shown
            ],
        }  # fmt: skip

    def __str__(self) -> str:
        from .page import told

        return told(self)


def command(candidate: Candidate, situation: Situation, recipe: str | None = None) -> str:
    """What one would type to use a method in a situation; what only the user knows stands in capitals."""
    trained = candidate.trains
    # A ready model is pruned; what is part of a training run needs a task, which only the user can name.
    subject = (situation.model if not trained or situation.weights == "init" else "") or (
        "TASK.py:task" if trained else "MODEL"
    )
    words = ["secateur", "train" if trained else "prune", subject]
    words += ["--recipe", recipe] if recipe else ["--method", candidate.name]
    structured = candidate.structure == "units"
    if not recipe:
        if candidate.structure == "pattern":
            words += ["--granularity", candidate.recipe.granularity]
        elif not structured or trained:
            words += ["--sparsity", f"{candidate.recipe.sparsity:g}"]
    if structured and not trained:
        words += ["--target", f'"{target_of(candidate, situation)}"']
        if not situation.language and not situation.model.startswith("timm"):  # those say what they take
            words += ["--example", "SHAPE"]
    if not trained and (candidate.needs_inputs or candidate.recovery == "units"):
        words += ["--data", "text:FILE" if situation.language else "DATA.py:batches"]
    return " ".join([*words, "--out", "out/"])


def recommend(situation: Situation, studies: Iterable[str | Path] = (), *, runs: Sequence[Run] | None = None) -> Answer:
    """Ranked recipes for a situation, each with its reasons, what it is expected to lose and to bring, and its cost.

    Rules drop what cannot be, and say what speaks for and against the rest; measured runs rank it.

    Args:
        situation: what a person has, wants and allows.
        studies: directories that ``secateur compare`` wrote; they count before those that ship with the package.
        runs: the evidence in place of both.

    Raises:
        DataError: a study cannot be read.
    """
    load()
    found = gather(studies) if runs is None else list(runs)
    evidence = Evidence.of(found)
    candidates = [fit(Candidate.of(part), situation) for part in parts("method").values()]
    entries = arrange(situation, candidates, evidence)
    near = {c.study: None for e in entries if e.status == "ranked" for c, _ in evidence.near(situation, e.candidate)}
    return Answer(situation, tuple(entries), tuple(advise(situation, entries, held_together(found))), tuple(near))


def arrange(situation: Situation, candidates: Iterable[Candidate], evidence: Evidence) -> list[Entry]:
    """Every candidate with its reasons: the best first, then those that were dropped.

    Those of which something near is known come first, and of them those that may hold the drop that is allowed. Among
    methods that aim alike places decide, among others what their aims cost. Without runs the place is what the points
    of the rules make it. Of equal ones the one that takes fewer training runs and needs less.
    """
    entries = [_entry(situation, candidate, evidence) for candidate in candidates]
    return sorted(entries, key=_place)


def _entry(situation: Situation, candidate: Candidate, evidence: Evidence) -> Entry:
    verdicts = ask(situation, candidate)
    unknown = Expected(None)
    if any(v.action == "drop" for v in verdicts):
        return Entry(
            candidate, "dropped", verdicts, None, unknown, candidate.speed, cost_of(candidate, situation, unknown), None
        )
    found = effect(evidence, situation, candidate, points(verdicts))
    status: Status = "ranked" if found.runs or found.kin else "kept"
    loss = predict.loss(evidence, situation, candidate, found) if status == "ranked" else unknown
    holds = None
    if situation.max_drop is not None and loss.value is not None:
        holds = (loss.low if loss.low is not None else loss.value) <= situation.max_drop
    return Entry(
        candidate, status, verdicts, found, loss, predict.speed(evidence, situation, candidate),
        cost_of(candidate, situation, predict.seconds(evidence, situation, candidate)), holds,
        predict.by_effect(evidence, situation, candidate, found),
    )  # fmt: skip


def _place(entry: Entry) -> tuple[Any, ...]:
    if entry.effect is None:
        return (2, entry.name)
    made = entry.candidate
    expected = round(entry.effect.value, 9)
    place = expected if entry.place is None else round(entry.place, 9)
    return (
        entry.place is None,
        entry.holds is False,
        place,
        expected,
        made.runs,
        made.needs_loss,
        len(made.needs),
        entry.name,
    )
