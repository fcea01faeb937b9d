"""Energy of a forward pass, where the machine has a counter that may be read."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .interval import interval, ratio
from .latency import turns
from .speed import Workload

#: Where Linux keeps the energy counters of processors (RAPL), of Intel and AMD.
POWERCAP = Path("/sys/class/powercap")
#: Seconds for which a model works between two readings: counters advance about once a millisecond.
SPAN = 0.2

#: A source of joules: each call says how many went by since the one before.
Counter = Callable[[], float]


class Rapl:
    """One counter of a processor package or its memory: joules since it was read last, over a wrap-around too.

    Args:
        zone: its folder, with ``energy_uj`` and ``max_energy_range_uj`` (microjoules).
    """

    def __init__(self, zone: Path) -> None:
        self._file = zone / "energy_uj"
        self._range = int((zone / "max_energy_range_uj").read_text())
        self._last = self._read()

    def _read(self) -> int:
        return int(self._file.read_text())

    def __call__(self) -> float:
        now, last = self._read(), self._last
        self._last = now
        return (now - last + (self._range if now < last else 0)) / 1e6


def rapl(root: Path = POWERCAP) -> tuple[list[Counter], str]:
    """The counters of all packages and their memory, or none and the reason."""
    zones = []
    for zone in sorted(root.glob("intel-rapl:*")):
        try:
            name = (zone / "name").read_text().strip()
        except OSError:
            continue
        # Parts of a package are in the package's sum, and all of it in psys; memory is beside it.
        if re.fullmatch(r"package-\d+|dram", name):
            zones.append(zone)
    if not zones:
        return [], f"the processor has no energy counter here ({root}/intel-rapl:*)"
    try:
        return [Rapl(zone) for zone in zones], ""
    except PermissionError as error:
        return [], f"the energy counter may be read by root only ({error.filename})"
    except (OSError, ValueError) as error:
        return [], f"the energy counter cannot be read: {error}"


class _Nvml:
    """One GPU: joules since it was read last, from a counter in millijoules that starts with the driver."""

    def __init__(self, library: Any, handle: Any) -> None:
        self._read: Callable[[], int] = lambda: int(library.nvmlDeviceGetTotalEnergyConsumption(handle))
        self._last = self._read()

    def __call__(self) -> float:
        now, last = self._read(), self._last
        self._last = now
        return (now - last) / 1e3


def nvml() -> tuple[list[Counter], str]:
    """The counters of all NVIDIA GPUs that ``CUDA_VISIBLE_DEVICES`` does not hide from torch, through ``pynvml``."""
    try:
        library: Any = import_module("pynvml")
    except ImportError:
        return [], "the energy of a GPU is read through pynvml, which is not installed (pip install nvidia-ml-py)"
    try:
        library.nvmlInit()
        facts: Any = torch.cuda.get_device_properties
        uuids = [facts(k).uuid for k in range(torch.cuda.device_count())]
        handles = [library.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}") for uuid in uuids]
        found: list[Counter] = [_Nvml(library, handle) for handle in handles]
    except (library.NVMLError, AttributeError) as error:  # AttributeError: an older torch knows no uuid
        return [], f"the energy of the GPU cannot be read: {error}"
    return found, "" if found else "torch sees no GPU"


def energy(
    models: Mapping[str, nn.Module],
    workload: Workload,
    seconds: Mapping[str, float],
    counters: Sequence[Counter],
    repeats: int = 7,
) -> dict[str, dict[str, Any]]:
    """Joules of one turn of a workload, of models that take turns.

    A counter knows the whole package, so what else runs there, and what the machine takes when idle, is in it.

    Args:
        models: the last one is what the others are compared with.
        seconds: of one turn of each model, about: a reading is taken over as many as fill `SPAN`.
        counters: their joules are added up.
        repeats: readings of each model.

    Returns:
        Model -> ``median``, ``low``, ``high`` (joules, with the ``coverage`` of the interval), ``watts`` (at the
        median), ``runs`` in one reading, and ``ratio``: how many times as much the last model takes (None for itself).
    """
    runs = {id(model): max(1, ceil(SPAN / max(seconds[name], 1e-6))) for name, model in models.items()}

    def reading(model: nn.Module) -> tuple[float, float]:
        count = runs[id(model)]
        for counter in counters:
            counter()  # from here on
        begun = time.perf_counter()
        for _ in range(count):
            workload(model)
        passed = time.perf_counter() - begun
        return sum(counter() for counter in counters) / count, passed / count

    taken = turns(models, reading, repeats, warmup=1)
    baseline = list(models)[-1]
    joules = {name: [j for j, _ in found] for name, found in taken.items()}
    rows: dict[str, dict[str, Any]] = {}
    for name, found in taken.items():
        comparable = name != baseline and min(joules[name]) > 0
        rows[name] = {
            **interval(joules[name]).to_dict(),
            "watts": interval([j / max(s, 1e-9) for j, s in found]).median,
            "runs": runs[id(models[name])],
            "ratio": ratio(joules[baseline], joules[name]).to_dict() if comparable else None,
        }
    return rows
