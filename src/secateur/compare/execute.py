"""One run from its description, wherever it runs: a subprocess here, or a machine of a cluster."""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import SecateurError, StudyError
from .of_models import run_model
from .of_tasks import run_task
from .plan import code_digest


@dataclass(frozen=True)
class Outcome:
    """What became of a run; plain data."""

    digest: str
    status: str
    reason: str | None = None
    result: dict[str, Any] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


def execute(digest: str, spec: Mapping[str, Any], work: Path) -> Outcome:
    """Make a run. What goes wrong in it is its outcome: one run does not stop a study."""
    begun = time.perf_counter()
    work.mkdir(parents=True, exist_ok=True)
    try:
        _unchanged(spec)
        made = {"task": run_task, "model": run_model}[spec["kind"]]
        result, record = made(spec, work, digest)
    except SecateurError as error:
        return Outcome(digest, "failed", str(error), seconds=time.perf_counter() - begun)
    except Exception as error:  # of the user's model or task, or a defect: recorded, with where it was
        at = traceback.extract_tb(error.__traceback__)[-1]
        text = str(error).strip().splitlines()
        reason = f"{type(error).__name__}: {text[0] if text else ''} ({Path(at.filename).name}, line {at.lineno})"
        return Outcome(digest, "failed", reason, seconds=time.perf_counter() - begun)
    seconds = time.perf_counter() - begun
    return Outcome(digest, "done", None, finite(result), finite(record), seconds)


def _unchanged(spec: Mapping[str, Any]) -> None:
    """Refuse files of code that are not those which the run is named by: edited since, or others on this machine."""
    masks = spec["masks"] or {}
    for source, code in ((spec["source"], spec["code"]), (masks.get("task", ""), spec.get("masks_code"))):
        if code is not None and code_digest(source) != code:
            raise StudyError(f"{source.rpartition(':')[0]} is not what it was when the study began: start it again")


def finite(value: Any) -> Any:
    """Plain JSON data: what is infinite or not a number becomes text, which JSON can say."""
    if isinstance(value, Mapping):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
