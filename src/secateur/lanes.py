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
from typing import Any, Generic, TypeVar

import torch
from greenlet import GreenletExit, getcurrent, greenlet

T = TypeVar("T")


class Parted(Exception):
    """Lanes came to different places; there is no common point at which to go on."""


class Lanes(Generic[T]):
    """Jobs that run in turn, one at a time, and wait for each other.

    ``pause(key)`` is called inside a job and returns, first lane first, when every lane has paused at that key.
    Whether gradients are recorded and what autocast does are a lane's own affair.

    Raises:
        Parted: lanes paused at different keys, or one ended where another paused, or one paused in an inference mode
            that it entered itself. All are abandoned.
    """

    def __init__(self, jobs: Sequence[Callable[[], T]]) -> None:
        self._jobs = list(jobs)
        self._alone = len(jobs) == 1
        self._inference = False
        self.current = 0

    def pause(self, key: str) -> None:
        """Wait, inside a lane, until all lanes have come here."""
        if self._alone:
            return
        if torch.is_inference_mode_enabled() != self._inference:
            raise Parted  # this mode cannot be left and entered from outside
        modes = _modes()
        home = getcurrent().parent
        assert home is not None
        home.switch(key)
        _enter(modes)

    def run(self) -> list[T]:
        """Run all lanes to their ends; what they returned, in order."""
        # Jobs know these lanes, by which they pause. Forgotten here, what they hold is free when they end, and not
        # when the garbage collector next looks for cycles.
        jobs, self._jobs = self._jobs, []
        if self._alone:
            return [jobs[0]()]
        modes = _modes()
        self._inference = torch.is_inference_mode_enabled()
        lanes = [greenlet(job) for job in jobs]
        for lane in lanes:
            lane.gr_context = contextvars.copy_context()
        results: list[T] = []
        try:
            while True:
                places: set[str | None] = set()
                for self.current, lane in enumerate(lanes):
                    answer = lane.switch()
                    _enter(modes)
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
            _enter(modes)


_DEVICES = ("cpu", "cuda")


def _modes() -> tuple[Any, ...]:
    """Modes of torch that belong to a thread, of which all lanes are one."""
    casts = [(d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in _DEVICES]
    return torch.is_grad_enabled(), torch.is_autocast_cache_enabled(), casts


def _enter(modes: tuple[Any, ...]) -> None:
    records, caches, casts = modes
    torch.set_grad_enabled(records)
    torch.set_autocast_cache_enabled(caches)
    for device, enabled, dtype in casts:
        torch.set_autocast_enabled(device, enabled)
        torch.set_autocast_dtype(device, dtype)


def lane_size(length: int) -> int:
    """How many windows one lane takes: about 2048 tokens, whose temporaries are reused and not mapped anew."""
    return max(1, -(-2048 // length))
