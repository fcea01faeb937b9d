"""What a rule says of a method in a situation, and how rules are registered and asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ..registry import parts
from .candidate import Candidate
from .situation import Situation

Action = Literal["drop", "demote", "promote"]


@dataclass(frozen=True)
class Verdict:
    """One rule's word.

    Attributes:
        action: ``drop``, ``demote`` or ``promote``.
        reason: one clause that a person can check.
        points: how far; a point is worth a fifth of what lies between the best and the middle of a study.
        rule: who says it; filled in by `ask`.
    """

    action: Action
    reason: str
    points: float = 1.0
    rule: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {"rule": self.rule, "action": self.action, "reason": self.reason, "points": self.points}


def drop(reason: str) -> Verdict:
    """The method cannot be used, or cannot reach what is wanted."""
    return Verdict("drop", reason, 0.0)


def demote(reason: str, points: float = 1.0) -> Verdict:
    """There is a reason against the method."""
    return Verdict("demote", reason, points)


def promote(reason: str, points: float = 1.0) -> Verdict:
    """There is a reason for the method."""
    return Verdict("promote", reason, points)


def ask(situation: Situation, candidate: Candidate) -> tuple[Verdict, ...]:
    """What all rules say, in the order in which they were registered."""
    from . import rules_can, rules_pay  # noqa: F401  registers them

    said = []
    for part in parts("rule").values():
        verdict = part.function(situation, candidate)
        if verdict is not None:
            said.append(Verdict(verdict.action, verdict.reason, verdict.points, part.name))
    return tuple(said)


def points(verdicts: tuple[Verdict, ...]) -> float:
    """What speaks for a method, less what speaks against it."""
    return sum(v.points if v.action == "promote" else -v.points for v in verdicts if v.action != "drop")
