"""Sizes, memory and the machine."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import re
import resource
import sys
import threading
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Stored and non-zero parameters; a tied parameter counts once."""
    total = nonzero = 0
    for parameter in model.parameters():
        total += parameter.numel()
        nonzero += int(torch.count_nonzero(parameter.detach()))
    return total, nonzero


def bytes_on_disk(path: Path) -> int:
    """Size of the weight files of a model directory."""
    return sum(f.stat().st_size for f in path.glob("*.safetensors") if not f.name.startswith(("masks", ".")))


def resident_bytes() -> int:
    """Resident memory of this process now."""
    with suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def high_water() -> int:
    """The most resident memory that this process has had, in bytes; `forget_high_water` starts anew."""
    with suppress(OSError):
        # Not ru_maxrss: what the parent had when it made this process is in that as well.
        if found := re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text()):
            return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def forget_high_water() -> bool:
    """Let `high_water` start at what is resident now, where the system can do that (Linux); whether it could."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
        return True
    return False


def give_back_memory() -> int:
    """Free what nothing uses any more, and give it back to the system where that can be asked for; bytes that stay
    resident."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # of glibc
    return resident_bytes()


def bytes_in_memory(model: nn.Module) -> int:
    """Bytes of the parameters and buffers, shared ones once, and what layers say that they hold besides."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    unseen = sum(getattr(m, "unseen_bytes", 0) for m in model.modules())
    return unseen + sum(t.numel() * t.element_size() for t in tensors.values())


class Peak:
    """Peak resident memory of this process inside a ``with`` block.

    The system's own mark where it can be set back, and a sample every 20 ms: another block within this one sets it back
    too.
    """

    def __init__(self) -> None:
        self.bytes, self._marked = 0, False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            self.bytes = max(self.bytes, resident_bytes())

    def __enter__(self) -> Peak:
        self._marked, self.bytes = forget_high_water(), resident_bytes()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        self.bytes = max(self.bytes, resident_bytes(), high_water() if self._marked else 0)


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    found = {"python": platform.python_version()}
    for name in ("secateur", "torch", "numpy", "safetensors", "transformers"):
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def machine() -> dict[str, Any]:
    """The machine that the timings belong to."""
    cpu = platform.processor() or platform.machine()
    memory = None
    with suppress(OSError):
        if found := re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text()):
            cpu = found[1]
        if found := re.search(r"MemTotal:\s*(\d+) kB", Path("/proc/meminfo").read_text()):
            memory = int(found[1]) * 1024
    return {
        "cpu": cpu,
        "instructions": torch.backends.cpu.get_cpu_capability(),  # the widest that torch uses, such as AVX512
        "threads": torch.get_num_threads(),
        "memory": memory,
        "system": platform.system(),
    }
