"""Run one forward pass in several lanes that wait for each other at each layer.

A layer can be solved only when all of its calibration inputs are known. Sending all windows through a block in
one batch meets that at the price of very large temporaries, which cost page faults and cache misses at every
pointwise operation. Here each lane is a small batch with a stack of its own; one lane runs at a time, stops in
front of a layer, and goes on when every lane has come there. Each product is still computed exactly once.

The stacks are greenlets, all in the calling thread. Threads would each keep a heap of freed activations and a pool
of OpenMP workers.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch
from greenlet import GreenletExit, getcurrent, greenlet

T = TypeVar("T")


class Parted(Exception):
    """Lanes came to different places; there is no common point at which to go on."""


class Lanes(Generic[T]):
    """Jobs that run in turn, one at a time, and wait for each other.

    ``pause(key)`` is called inside a job and returns, first lane first, when every lane has paused at that key.
    Whether gradients are recorded is a lane's own affair; other modes of torch are shared, so a job must not
    pause inside one that it entered.

    Raises:
        Parted: lanes paused at different keys, or one ended where another paused. All are abandoned.
    """

    def __init__(self, jobs: Sequence[Callable[[], T]]) -> None:
        self._jobs = list(jobs)
        self._alone = len(jobs) == 1
        self.current = 0

    def pause(self, key: str) -> None:
        """Wait, inside a lane, until all lanes have come here."""
        if self._alone:
            return
        records = torch.is_grad_enabled()
        home = getcurrent().parent
        assert home is not None
        home.switch(key)
        torch.set_grad_enabled(records)

    def run(self) -> list[T]:
        """Run all lanes to their ends; what they returned, in order."""
        # Jobs know these lanes, by which they pause. Forgotten here, what they hold is free when they end, and not
        # when the garbage collector next looks for cycles.
        jobs, self._jobs = self._jobs, []
        if self._alone:
            return [jobs[0]()]
        records = torch.is_grad_enabled()
        lanes = [greenlet(job) for job in jobs]
        for lane in lanes:
            lane.gr_context = contextvars.copy_context()
        results: list[T] = []
        try:
            while True:
                places: set[str | None] = set()
                for self.current, lane in enumerate(lanes):
                    answer = lane.switch()
                    torch.set_grad_enabled(records)
                    if lane.dead:
                        results.append(answer)
                    places.add(None if lane.dead else answer)
                if len(places) > 1:
                    raise Parted
                if places == {None}:
                    return results
        finally:
            for lane in lanes:
                if lane:  # what waits unwinds, so that it gives back what it holds
                    lane.throw(GreenletExit)
            torch.set_grad_enabled(records)


def lane_size(length: int) -> int:
    """How many windows one lane takes: about 2048 tokens, whose temporaries are reused and not mapped anew."""
    return max(1, -(-2048 // length))
