"""Runs on a Ray cluster: the same study, the same store, other machines."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import StudyError
from .outcome import Outcome, over_time


def _remote(job: str, work: str, threads: int) -> str:
    """What runs on the cluster: text in, text out."""
    import torch

    from secateur.compare.execute import execute
    from secateur.methods import load

    torch.set_num_threads(threads)
    load()
    asked = json.loads(job)
    return json.dumps(asdict(execute(asked["digest"], asked["spec"], Path(work))))


def _reach(address: str) -> None:
    """Knock before Ray does, which goes on knocking for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as error:
        raise StudyError(f"no Ray cluster at '{address}': {error}") from None


class Cluster:
    """So many runs at once as the cluster has room for, each on its own processors.

    secateur, the model's files and the data must be at hand on every machine; dense models and checkpoints of runs
    under way lie in the study's directory where that is shared, and on each machine otherwise.

    Args:
        address: ``auto`` (the cluster of this machine), an address of Ray, or ``local`` for one that is started here.
        workers: runs at once; as many as there are processors for when None.
    """

    def __init__(self, address: str, work: Path, workers: int | None, threads: int) -> None:
        try:
            import ray
        except ImportError:
            raise StudyError("--ray needs the package 'ray': pip install 'secateur[ray]'") from None
        self._ray = ray
        _reach(address)
        own: dict[str, Any] = {"address": address}
        if address == "local":
            own = {"num_cpus": (workers or 1) * threads, "include_dashboard": False}
        try:
            ray.init(log_to_driver=False, ignore_reinit_error=True, **own)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise StudyError(f"no Ray cluster at '{address}': {str(error).splitlines()[0]}") from None
        room = int(ray.cluster_resources().get("CPU", 1) // threads)
        self.slots = max(1, min(room, workers or room))
        self._work, self._threads = str(work.absolute()), threads
        self._call = ray.remote(num_cpus=threads, max_retries=0)(_remote)
        self._flying: dict[Any, tuple[str, float, float | None]] = {}

    def start(self, digest: str, spec: Mapping[str, Any]) -> None:
        job = json.dumps({"digest": digest, "spec": dict(spec)})
        self._flying[self._call.remote(job, self._work, self._threads)] = (
            digest, time.perf_counter(), spec["budget"].get("seconds"),
        )  # fmt: skip

    def wait(self, seconds: float) -> list[Outcome]:
        ready, _ = self._ray.wait(list(self._flying), num_returns=1, timeout=seconds)
        found = []
        for reference in ready:
            digest, *_ = self._flying.pop(reference)
            try:
                found.append(Outcome(**json.loads(self._ray.get(reference))))
            except self._ray.exceptions.RayError as error:
                found.append(Outcome(digest, "failed", f"the cluster lost it: {str(error).strip().splitlines()[0]}"))
        now = time.perf_counter()
        for reference, (digest, begun, limit) in list(self._flying.items()):
            if limit is not None and now - begun > limit:
                self._ray.cancel(reference, force=True)
                del self._flying[reference]
                found.append(Outcome(digest, "failed", over_time(limit), seconds=now - begun))
        return found

    def close(self) -> None:
        for reference in self._flying:
            self._ray.cancel(reference, force=True)
        self._ray.shutdown()
