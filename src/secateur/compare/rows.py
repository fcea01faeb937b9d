"""A row: one run of a study, as it is stored, exported, analysed and shown. Plain JSON data."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import DataError


@dataclass(frozen=True)
class Row:
    """One run.

    Attributes:
        digest: of everything that decides what the run does; two rows with one digest are the same run.
        subject: what was pruned: the name of a task, or of a model.
        kind: ``task`` (trained here) or ``model`` (a language model that was trained before).
        label: the contender's name in tables: a method, or what the study calls it; ``dense`` for the baseline.
        recipe: the recipe as plain data, or method, moment and options of one that has none, see `trains_itself`; None
            for the dense baseline.
        target: what was asked for, as a user writes it: ``0.9``, ``2:4``, ``flops 50%``; empty for the dense baseline.
        seed: of every random draw; of a language model also which calibration text is seen.
        role: ``final``, or ``tune`` for one that chose a knob and never saw the test data.
        status: ``done`` or ``failed``.
        reason: why it failed, in one sentence.
        result: what was measured; see docs/compare.md.
    """

    digest: str
    subject: str
    kind: str
    label: str
    recipe: Mapping[str, Any] | None
    target: str
    seed: int
    role: str = "final"
    status: str = "done"
    reason: str | None = None
    result: Mapping[str, Any] = field(default_factory=dict)

    @property
    def done(self) -> bool:
        return self.status == "done"

    @property
    def dense(self) -> bool:
        """Whether this is the baseline."""
        return self.recipe is None

    @property
    def metric(self) -> str:
        """What the score is: ``accuracy``, ``perplexity``, ..."""
        return str(self.result.get("metric", ""))

    @property
    def higher_is_better(self) -> bool:
        return bool(self.result.get("higher_is_better", True))

    @property
    def score(self) -> float | None:
        """The metric on the test data; None of a run that failed, or chose a knob, or where it is not finite."""
        found = self.result.get("test")
        return float(found) if isinstance(found, (int, float)) and math.isfinite(found) else None

    def figure(self, *path: str) -> float | None:
        """A number of the result, by its path; None where it was not measured.

        >>> Row("d", "s", "task", "x", None, "", 0, result={"cost": {"seconds": 2}}).figure("cost", "seconds")
        2.0
        """
        found: Any = self.result
        for key in path:
            found = found.get(key) if isinstance(found, Mapping) else None
        plain = isinstance(found, (int, float)) and not isinstance(found, bool) and math.isfinite(found)
        return float(found) if plain else None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Row:
        """A row of plain data.

        Raises:
            DataError: it lacks something.
        """
        try:
            return cls(**data)
        except TypeError as error:
            raise DataError(f"this is not a run of a study: {error}") from None


def trains_itself(recipe: Mapping[str, Any] | None) -> bool:
    """Whether what stands in place of a recipe is of a method that trains in a way of its own: it says when.

    >>> trains_itself({"method": "fbs", "when": "runtime"}), trains_itself({"method": "snip"})
    (True, False)
    """
    return recipe is not None and "when" in recipe


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """One line of JSON a row, in an order that does not depend on when runs ended; beside first, then in place."""
    ordered = sorted(rows, key=lambda r: (r.subject, r.label != "dense", r.label, r.target, r.seed, r.role, r.digest))
    part = path.with_name(f"{path.name}.{os.getpid()}.partial")  # two engines may end at once
    text = "".join(json.dumps(row.to_dict(), ensure_ascii=False, sort_keys=True) + "\n" for row in ordered)
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def read_rows(path: Path) -> list[Row]:
    """The rows of a file that `write_rows` wrote.

    Raises:
        DataError: a line is not a row.
    """
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append(Row.from_dict(json.loads(line)))
        except (ValueError, TypeError, DataError):
            raise DataError(f"{path}, line {number} is not a run of a study") from None
    return rows
