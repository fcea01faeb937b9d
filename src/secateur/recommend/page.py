"""An answer as people read it: the answer first, then why, then what was left out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .candidate import Expected
from .predict import lost

if TYPE_CHECKING:
    from .answer import Answer, Entry

#: How many methods are shown unless all are asked for.
SHOWN = 5


def faster(found: Expected) -> str:
    """What speed is expected, as people say it."""
    if found.value is None:
        return f"not known ({found.source})" if found.source != "not known" else "not known"
    span = f" ({found.low:.2f} to {found.high:.2f})" if found.low is not None and found.high is not None else ""
    return f"{found.value:.2f} times as fast{span}; {found.source}"


def told(answer: Answer, shown: int = SHOWN, everything: bool = False) -> str:
    """The answer as text."""
    usable = answer.usable
    lines = [str(answer.situation), ""]
    lines += [f"* {text}" for text in answer.advice]
    if answer.advice:
        lines.append("")
    if answer.studies:
        lines += [f"measured evidence: {', '.join(answer.studies)}", ""]
    for number, entry in enumerate(usable if everything else usable[:shown], 1):
        lines += [*_entry(answer, entry, number), ""]
    if len(usable) > shown and not everything:
        rest = usable[shown:]
        lines += [f"also possible ({len(rest)}): {', '.join(e.name for e in rest)}", ""]
    gone = [e for e in answer.entries if e.status == "dropped"]
    if gone and everything:
        lines.append(f"dropped ({len(gone)})")
        lines += [f"  {e.name}: {'; '.join(e.reasons)}" for e in gone]
    elif gone:
        lines.append(f"dropped: {len(gone)} of {len(answer.entries)} methods (--all names each with its reasons)")
        lines += [f"  {count:3}  {_sample(answer, rule)}" for rule, count in answer.dropped.most_common()]
    return "\n".join(lines).rstrip() + "\n"


def _entry(answer: Answer, entry: Entry, number: int) -> list[str]:
    recipe = entry.candidate.recipe
    parts = [
        recipe.criterion or f"chosen by {recipe.gate if recipe.gate != 'none' else recipe.solver}",
        recipe.granularity,
    ]
    parts += [recipe.allocation, *(x for x in (recipe.solver, recipe.recovery) if x not in ("rank", "none"))]
    warning = "" if entry.holds is not False else "   more is lost than is allowed"
    return [
        f"{number}. {entry.name}  [{entry.status}]  {', '.join(parts)}, {entry.candidate.aim.text}{warning}",
        f"   {answer.command(entry)}",
        f"   lost      {lost(entry.loss, answer.situation.language)}",
        f"   speed     {faster(entry.speed)}",
        f"   takes     {entry.cost.time}; memory: {entry.cost.memory}; data: {entry.cost.data}",
        *(f"   {'why       ' if k == 0 else '          '}{text}" for k, text in enumerate(entry.reasons)),
    ]


def _sample(answer: Answer, rule: str) -> str:
    """What a rule said of the first method that it dropped, and which."""
    for entry in answer.entries:
        found = next((v for v in entry.verdicts if v.action == "drop"), None)
        if found is not None and found.rule == rule:
            return f"{rule.replace('-', ' ')}: e.g. {entry.name}: {found.reason}"
    return rule
