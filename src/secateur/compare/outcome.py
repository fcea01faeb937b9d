"""What became of a run."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

_LIMIT = re.compile(r"it took longer than its budget of ([\d.e+-]+) s")


@dataclass(frozen=True)
class Outcome:
    """What became of a run; plain data.

    Attributes:
        begun: False where it failed before anything of it was done: its process did not start, or what it reads is
            not there. Runs after it are likely to fail in the same way.
    """

    digest: str
    status: str
    reason: str | None = None
    result: dict[str, Any] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    begun: bool = True


def over_time(limit: float) -> str:
    """Why a run was stopped that took longer than it may."""
    return f"it took longer than its budget of {limit:g} s"


def limit_of(reason: str | None) -> float | None:
    """The seconds that a run had which was stopped for its time; None where it was not.

    >>> limit_of(over_time(2.5)), limit_of("a mistake")
    (2.5, None)
    """
    found = _LIMIT.match(reason or "")
    return float(found[1]) if found else None
