"""A run that several processes make together: they are started by ``torchrun``, and the first one tells the outcome.

``python -m secateur.compare.shared FOLDER`` is one of them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..processes import joined
from .outcome import Outcome

#: Seconds that the others have to end after the first one has told the outcome.
GRACE = 15.0


def launch(digest: str, spec: Mapping[str, Any], work: Path, count: int) -> Outcome:
    """Make a run with so many processes, which share this one's threads."""
    begun = time.perf_counter()
    folder = work / f"{digest}.shared"
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    threads = max(1, torch.get_num_threads() // count)
    job = {"digest": digest, "spec": dict(spec), "work": str(work.absolute()), "threads": threads}
    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
    started = subprocess.Popen(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count), "-m",
            "secateur.compare.shared", str(folder.absolute()),
        ],
        stdin=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": str(threads)},
    )  # fmt: skip
    assert started.stdin is not None
    told = None
    while started.poll() is None:
        if (folder / "0.json").exists():
            told = told or time.perf_counter()
            if time.perf_counter() - told > GRACE:
                started.terminate()  # it ends the others
        time.sleep(0.05)
    started.stdin.close()
    said = _said(folder)
    for old in folder.iterdir():
        old.unlink()
    folder.rmdir()
    seconds = time.perf_counter() - begun
    if said is not None:
        return said
    reason = f"one of its {count} processes ended before it could tell why (status {started.returncode})"
    return Outcome(digest, "failed", reason, seconds=seconds)


def _said(folder: Path) -> Outcome | None:
    """What the first process found; else why the first to fail did: the others fail because of it."""
    files = sorted((f for f in folder.glob("*.json") if f.stem.isdigit()), key=lambda f: f.stat().st_mtime_ns)
    found = {f.stem: Outcome(**json.loads(f.read_text(encoding="utf-8"))) for f in files}
    if "0" in found and found["0"].status == "done":
        return found["0"]
    return next(iter(found.values()), None)


def main() -> None:
    """One of the processes. It ends when standard input closes: then nobody waits for it."""

    def listen() -> None:
        sys.stdin.read()
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    from ..methods import load
    from .execute import make

    folder = Path(sys.argv[1])
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    torch.set_num_threads(job["threads"])
    load()
    with joined(job["spec"]["budget"].get("device", "cpu")) as own:
        outcome = make(job["digest"], job["spec"], Path(job["work"]))
        if own == 0 or outcome.status == "failed":
            part = folder / f".{own}.tmp"
            part.write_text(json.dumps(asdict(outcome)), encoding="utf-8")
            part.replace(folder / f"{own}.json")
    sys.stdout.flush()
    os._exit(0 if outcome.status == "done" else 1)  # the others may wait for this one for ever


if __name__ == "__main__":
    main()
