"""Runs in processes of this machine."""

from __future__ import annotations

import contextlib
import json
import math
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from .outcome import Outcome, over_time


class Executor(Protocol):
    """Where runs are made: so many at once."""

    slots: int

    def start(self, digest: str, spec: Mapping[str, Any]) -> None:
        """Begin a run; at most ``slots`` at once."""

    def wait(self, seconds: float) -> list[Outcome]:
        """What has ended, waiting no longer than so."""

    def close(self) -> None:
        """Stop everything."""


class _Worker:
    def __init__(self, work: Path, threads: int, log: Any) -> None:
        env = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "secateur.compare.worker", str(work), str(threads)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=env, start_new_session=True,
        )  # fmt: skip
        self.digest: str | None = None
        self.begun = 0.0
        self.limit: float | None = None
        self.text = b""


class Local:
    """So many worker processes, each with its share of the processor.

    A run that takes longer than its budget is stopped with its worker; a worker that dies takes one run with it, and
    another worker takes its place. They end when this process does, however that ends.
    """

    def __init__(self, work: Path, workers: int, threads: int) -> None:
        self.slots = workers
        self._work, self._threads = work, threads
        self._workers: list[_Worker] = []
        self._selector = selectors.DefaultSelector()
        work.mkdir(parents=True, exist_ok=True)
        self._log = (work / "workers.log").open("ab")

    def start(self, digest: str, spec: Mapping[str, Any]) -> None:
        worker = next((w for w in self._workers if w.digest is None), None)
        if worker is None:
            worker = _Worker(self._work, self._threads, self._log)
            self._workers.append(worker)
            assert worker.process.stdout is not None
            os.set_blocking(worker.process.stdout.fileno(), False)
            self._selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
        worker.digest, worker.begun = digest, math.inf
        worker.limit = spec["budget"].get("seconds")
        assert worker.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it is dead: `wait` says so
            worker.process.stdin.write((json.dumps({"digest": digest, "spec": spec}) + "\n").encode())
            worker.process.stdin.flush()

    def wait(self, seconds: float) -> list[Outcome]:
        found: list[Outcome] = []
        for key, _ in self._selector.select(seconds):
            found += self._heard(key.data)
        now = time.perf_counter()
        for worker in list(self._workers):
            if worker.digest is not None and worker.limit is not None and now - worker.begun > worker.limit:
                found.append(self._lost(worker, over_time(worker.limit)))
        return found

    def _heard(self, worker: _Worker) -> list[Outcome]:
        assert worker.process.stdout is not None
        chunk: bytes | None = worker.process.stdout.read()
        if chunk:
            worker.text += chunk
            *lines, worker.text = worker.text.split(b"\n")
            found = [json.loads(line) for line in lines]
            if {} in found:
                worker.begun = time.perf_counter()
            if any(found):
                worker.digest = None
            return [Outcome(**said) for said in found if said]
        if chunk is None:
            return []
        code = worker.process.wait()
        reason = f"its process was killed by signal {-code}" if code < 0 else f"its process ended with status {code}"
        hint = " (out of memory?)" if code == -9 else f"; see {self._work / 'workers.log'}"
        lost = self._lost(worker, reason + hint)
        return [lost] if lost.digest else []

    def _lost(self, worker: _Worker, reason: str) -> Outcome:
        digest, begun = worker.digest or "", not math.isinf(worker.begun)
        seconds = time.perf_counter() - worker.begun if begun else 0.0
        assert worker.process.stdout is not None
        self._selector.unregister(worker.process.stdout)
        self._workers.remove(worker)
        _end(worker)
        return Outcome(digest, "failed", reason, seconds=seconds, begun=begun)

    def close(self) -> None:
        for worker in self._workers:
            _end(worker)
        self._workers = []
        self._selector.close()
        self._log.close()


def _end(worker: _Worker) -> None:
    if worker.process.poll() is None:  # its number is its own until it has been waited for
        with contextlib.suppress(ProcessLookupError):
            os.killpg(worker.process.pid, signal.SIGKILL)  # it leads a session: what it started goes with it
    worker.process.wait()
    for stream in (worker.process.stdin, worker.process.stdout):
        if stream is not None:
            with contextlib.suppress(BrokenPipeError):
                stream.close()
