"""Peak memory of a model in a process of its own, where no other model's memory is counted.

``python -m secateur.peak`` is that process; it reads what to do from standard input.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from .errors import SecateurError
from .measure.size import forget_high_water, high_water, resident_bytes
from .measure.speed import run_once
from .models import blank
from .sources import Source, workloads


@dataclass(frozen=True)
class PeakMemory:
    """Bytes at the most while a model was loaded and did every workload once.

    Attributes:
        host: resident memory beyond what Python and its libraries take; None where it was not measured.
        gpu: what torch allocated on the GPU; None where none was in use.
        reason: why there is no figure.
    """

    host: int | None = None
    gpu: int | None = None
    reason: str = ""


def peak(source: Source, example: str | None, tokens: Sequence[int], timeout: float | None = None) -> PeakMemory:
    """Measure in a fresh process of the same interpreter, with the same number of threads.

    Args:
        example, tokens: as for `sources.workloads`.
        timeout: seconds after which the process is given up.
    """
    asked = {"source": asdict(source), "example": example, "tokens": list(tokens), "threads": torch.get_num_threads()}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "secateur.peak"],
            input=json.dumps(asked), capture_output=True, text=True, timeout=timeout, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return PeakMemory(reason=f"the process that measures memory did not end well: {error}")
    with suppress(ValueError, IndexError, TypeError):  # a model may print as well, and before
        return PeakMemory(**json.loads(done.stdout.splitlines()[-1]))
    told = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
    if done.returncode < 0:
        told = f"it was ended by signal {-done.returncode}"
    return PeakMemory(reason=f"the process that measures memory failed: {told}")


def measure_here(asked: dict[str, Any]) -> PeakMemory:
    """What the process of its own does."""
    torch.set_num_threads(asked["threads"])
    source = Source(**asked["source"])
    where = source.directory
    if where is not None and (where / "config.json").exists():
        blank(where)  # on the meta device: the code of the model is loaded, its weights are not
    nn.Linear(64, 64)(torch.zeros(64, 64))  # and what torch loads at the first product
    forget_high_water()
    before = resident_bytes()
    model = source.load()
    for workload in workloads([model], asked["example"], asked["tokens"], source.example):
        run_once(workload, model, source.name)
    gpu = torch.cuda.max_memory_allocated() if source.device == "cuda" else None
    return PeakMemory(max(0, high_water() - before), gpu)


def main() -> None:
    """Read the question, print the answer."""
    try:
        found = measure_here(json.load(sys.stdin))
    except SecateurError as error:
        sys.exit(str(error))
    print(json.dumps(asdict(found)))


if __name__ == "__main__":
    main()
