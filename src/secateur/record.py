"""The record of a run: everything that is needed to trust it, repeat it or draw it."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

from .layers import Skipped
from .measure import machine, versions
from .recipe import Recipe
from .solve import LayerRecord


def run_record(
    *,
    recipe: Recipe,
    model: Mapping[str, Any],
    records: Sequence[LayerRecord],
    skipped: Sequence[Skipped],
    data: Mapping[str, Any] | None,
    timings: Mapping[str, float],
    peak_memory: int,
    command: str = "",
    before: Mapping[str, Any] | None = None,
    after: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """The content of ``run.json``; plain JSON data."""
    total = sum(r.parameters for r in records)
    gone = sum(r.parameters - r.kept for r in records)
    parameters = int(model.get("parameters") or 0)
    unseen = [r.name for r in records if any("left dense" in n for n in r.notes)]
    all_notes = list(notes)
    if unseen:
        all_notes.append(f"{len(unseen)} layers saw no calibration token and were left dense, e.g. {unseen[0]}")
    if ":" in recipe.granularity and recipe.allocation != "uniform" and len({r.sparsity for r in records}) == 1:
        all_notes.append(
            f"allocation '{recipe.allocation}' changed nothing: {recipe.granularity} holds only multiples of 1 in "
            f"{recipe.granularity.split(':')[1]}, and every layer came out at the same one"
        )
    damped = [r for r in records if any("Hessian" in n for n in r.notes)]
    if damped:
        all_notes.append(
            f"{len(damped)} layers needed more care with their Hessian, e.g. {damped[0].name}: {damped[0].notes[0]}"
        )
    return {
        "secateur": versions().get("secateur", "0"),
        "created": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "command": command,
        "recipe": recipe.to_dict(),
        "digest": recipe.digest,
        "cite": recipe.cite(),
        "model": dict(model),
        "data": dict(data) if data else None,
        "seed": recipe.seed,
        "versions": versions(),
        "machine": machine(),
        "layers": [r.to_dict() for r in records],
        "skipped": [{"name": s.name, "parameters": s.numel, "reason": s.reason} for s in skipped],
        "sparsity": {
            "pruned_layers": gone / total if total else 0.0,
            "model": gone / parameters if parameters else None,
        },
        "timings": {k: round(float(v), 3) for k, v in timings.items()},
        "peak_memory": int(peak_memory),
        "before": dict(before) if before else None,
        "after": dict(after) if after else None,
        "notes": all_notes,
    }


def dumps(record: Mapping[str, Any]) -> str:
    """JSON text of a record."""
    return json.dumps(record, indent=1, ensure_ascii=False) + "\n"
