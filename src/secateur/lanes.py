"""Run one forward pass in several lanes that wait for each other at each layer.

A layer can be solved only when all of its calibration inputs are known. Sending all windows through a block in
one batch meets that at the price of very large temporaries, which cost page faults and cache misses at every
pointwise operation. Here each lane is a small batch with its own thread; one lane runs at a time, stops in front of
a layer, and goes on when every lane has come there. Each product is still computed exactly once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch

T = TypeVar("T")


class Parted(Exception):
    """Lanes came to different places; there is no common point at which to go on."""


class _Abandoned(BaseException):
    """Ends a lane's thread; not an `Exception`, so that no model code catches it."""


class Lanes(Generic[T]):
    """Jobs that run in turn, one at a time, and wait for each other.

    ``pause(key)`` is called inside a job and returns, first lane first, when every lane has paused at that key.

    Raises:
        Parted: lanes paused at different keys, or one ended where another paused. All are abandoned.
    """

    def __init__(self, jobs: Sequence[Callable[[], T]]) -> None:
        self._jobs = jobs
        self._go = [threading.Semaphore(0) for _ in jobs]
        self._back = threading.Semaphore(0)
        self._at: list[str | None] = [None] * len(jobs)
        self._results: list[T | None] = [None] * len(jobs)
        self._errors: list[BaseException | None] = [None] * len(jobs)
        self._abandoned = False
        self.current = 0

    def pause(self, key: str) -> None:
        """Wait, inside a lane, until all lanes have come here."""
        lane = self.current
        if len(self._jobs) == 1:
            return
        self._at[lane] = key
        self._back.release()
        self._go[lane].acquire()
        if self._abandoned:
            raise _Abandoned

    def run(self) -> list[T]:
        """Run all lanes to their ends; what they returned, in order."""
        if len(self._jobs) == 1:
            return [self._jobs[0]()]
        threads = [threading.Thread(target=self._lane, args=(i,), daemon=True) for i in range(len(self._jobs))]
        for thread in threads:
            thread.start()
        try:
            while True:
                for lane in range(len(self._jobs)):
                    self._at[lane] = None
                    self.current = lane
                    self._go[lane].release()
                    self._back.acquire()
                    error = self._errors[lane]
                    if error is not None:
                        raise error
                places = set(self._at)
                if places == {None}:
                    return self._results  # type: ignore[return-value]
                if len(places) > 1:
                    raise Parted
        finally:
            self._abandoned = True
            for go in self._go:
                go.release()
            for thread in threads:
                thread.join()

    def _lane(self, lane: int) -> None:
        self._go[lane].acquire()
        if self._abandoned:
            return
        try:
            with torch.no_grad():  # the grad mode is one of the thread
                self._results[lane] = self._jobs[lane]()
        except _Abandoned:
            return
        except BaseException as error:
            self._errors[lane] = error
        self._back.release()


def lane_size(windows: int, length: int) -> int:
    """How many windows one lane takes: about 2048 tokens, and not so many lanes that their threads weigh.

    Each lane's thread brings a pool of OpenMP workers of its own.
    """
    lanes = max(1, min(16, 256 // max(torch.get_num_threads(), 1)))
    return max(1, -(-2048 // length), -(-windows // lanes))
