"""One run from its description, wherever it runs: a subprocess here, or a machine of a cluster."""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..compound import Compound
from ..compound.recipe import restored
from ..errors import SecateurError, StudyError
from ..measure.size import give_back_memory
from ..models import load_tokenizer, resolve
from ..tasks import find
from .of_models import run_model, shares
from .of_tasks import run_task
from .outcome import Outcome
from .plan import code_digest
from .rows import trains_itself
from .shared import launch


def execute(digest: str, spec: Mapping[str, Any], work: Path) -> Outcome:
    """Make a run, by several processes where the study says so. What goes wrong in it is its outcome: one run does
    not stop a study."""
    count = processes_of(spec)
    if count == 1:
        return make(digest, spec, work)
    if (problem := _tried(digest, lambda: _readable(spec), begun=False)).status == "failed":
        return problem
    return launch(digest, spec, work, count)


def processes_of(spec: Mapping[str, Any]) -> int:
    """How many processes make a run: those of the budget where it trains, or calibrates in a way that can be shared."""
    asked = int(spec["budget"].get("processes", 1))
    if asked == 1 or trains_itself(spec["recipe"]):
        return asked
    recipe = None if spec["recipe"] is None else restored(spec["recipe"])
    if isinstance(recipe, Compound):
        return 1
    return asked if spec["kind"] == "task" or (recipe is not None and shares(recipe) is None) else 1


def make(digest: str, spec: Mapping[str, Any], work: Path) -> Outcome:
    """Make a run in this process, or the part of it that this one of several has."""
    begun = time.perf_counter()
    work.mkdir(parents=True, exist_ok=True)
    if (problem := _tried(digest, lambda: _readable(spec), begun=False)).status == "failed":
        return problem
    made = {"task": run_task, "model": run_model}[spec["kind"]]
    found: list[Any] = []
    before = give_back_memory()
    outcome = _tried(digest, lambda: found.extend(made(spec, work, digest)))
    seconds = time.perf_counter() - begun
    if outcome.status == "failed":
        return Outcome(digest, "failed", outcome.reason, seconds=seconds)
    result, record = found
    if "cost" in result:
        result["cost"]["memory_before"] = before
    return Outcome(digest, "done", None, finite(result), finite(record), seconds)


def _tried(digest: str, what: Callable[[], None], begun: bool = True) -> Outcome:
    try:
        what()
    except SecateurError as error:
        return Outcome(digest, "failed", str(error), begun=begun)
    except Exception as error:  # of the user's model or task, or a defect: recorded, with where it was
        at = traceback.extract_tb(error.__traceback__)[-1]
        text = str(error).strip().splitlines()
        reason = f"{type(error).__name__}: {text[0] if text else ''} ({Path(at.filename).name}, line {at.lineno})"
        return Outcome(digest, "failed", reason, begun=begun)
    return Outcome(digest, "done")


def _readable(spec: Mapping[str, Any]) -> None:
    """What every run on this subject reads is there."""
    _unchanged(spec)
    if spec["kind"] == "task":
        next(iter(find(spec["source"], **spec["options"]).batches("train", 0, 0)), None)
    else:
        load_tokenizer(resolve(spec["source"]))


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
