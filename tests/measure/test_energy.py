"""Energy from counters of the test's own: folders as Linux has them, and a library in place of pynvml."""

from __future__ import annotations

import sys
import types
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import nn

from secateur.measure import energy as of_energy
from secateur.measure.energy import energy, nvml, rapl

RANGE = 262_143_328_850


def zone(root: Path, folder: str, name: str, microjoules: int) -> Path:
    path = root / folder
    path.mkdir(parents=True)
    (path / "name").write_text(f"{name}\n")
    (path / "energy_uj").write_text(f"{microjoules}\n")
    (path / "max_energy_range_uj").write_text(f"{RANGE}\n")
    return path / "energy_uj"


def test_a_counter_that_wraps_around(tmp_path: Path) -> None:
    file = zone(tmp_path, "intel-rapl:0", "package-0", RANGE - 1_500_000)
    (counter,), reason = rapl(tmp_path)
    assert reason == "" and counter() == 0
    for now, joules in ((RANGE - 500_000, 1.0), (2_000_000, 2.5), (2_000_000, 0.0), (10_000_000, 8.0)):
        file.write_text(str(now))
        assert counter() == joules


def test_nothing_is_counted_twice(tmp_path: Path) -> None:
    names = {
        "intel-rapl:0": "package-0", "intel-rapl:0:0": "core", "intel-rapl:0:1": "uncore", "intel-rapl:0:2": "dram",
        "intel-rapl:1": "package-1", "intel-rapl:2": "psys", "intel-rapl-mmio:0": "package-0",
    }  # fmt: skip
    files = {folder: zone(tmp_path, folder, name, 0) for folder, name in names.items()}
    (tmp_path / "intel-rapl:3").mkdir()  # one without a name
    counters, _ = rapl(tmp_path)
    for k, file in enumerate(files.values()):
        file.write_text(str(10**k * 1_000_000))
    assert sum(c() for c in counters) == 1 + 1000 + 10000


def test_reasons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert rapl(tmp_path) == ([], f"the processor has no energy counter here ({tmp_path}/intel-rapl:*)")
    file = zone(tmp_path, "intel-rapl:0", "package-0", 0)
    file.write_text("nothing")
    counters, reason = rapl(tmp_path)
    assert counters == [] and "cannot be read" in reason

    original = Path.read_text

    def refuse(path: Path, *args: object) -> str:
        if path.name == "energy_uj":
            raise PermissionError(13, "Permission denied", str(path))
        return original(path)

    monkeypatch.setattr(Path, "read_text", refuse)
    assert rapl(tmp_path) == ([], f"the energy counter may be read by root only ({file})")
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "nvidia-ml-py" in nvml()[1]


def test_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    class NVMLError(Exception):
        pass

    millijoules = {"GPU-a": 5_000, "GPU-b": 0}
    fake = types.ModuleType("pynvml")
    fake.NVMLError, fake.nvmlInit = NVMLError, lambda: None
    fake.nvmlDeviceGetHandleByUUID = lambda uuid: uuid
    fake.nvmlDeviceGetTotalEnergyConsumption = lambda uuid: millijoules[uuid]
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda k: types.SimpleNamespace(uuid="ab"[k]))
    (counter,), reason = nvml()
    millijoules.update({"GPU-a": 7_500, "GPU-b": 9_000})
    assert reason == "" and counter() == 2.5 and counter() == 0

    def none(_: str) -> int:
        raise NVMLError("Not Supported")

    fake.nvmlDeviceGetTotalEnergyConsumption = none
    assert nvml() == ([], "the energy of the GPU cannot be read: Not Supported")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert nvml() == ([], "torch sees no GPU")


class Burning(nn.Module):
    """Takes so many joules a run."""

    def __init__(self, joules: float) -> None:
        super().__init__()
        self.joules, self.calls = joules, 0


def test_joules_of_one_run(monkeypatch: pytest.MonkeyPatch) -> None:
    models = {"fast": Burning(2.0), "dense": Burning(5.0)}
    reads: list[float] = []
    total = {"now": 100.0, "seconds": 0.0, "last": 0.0}

    class Load:
        name, items = "work", {"work": 1}

        def __call__(self, model: nn.Module) -> Mapping[str, float]:
            assert isinstance(model, Burning)
            model.calls += 1
            total["now"] += model.joules
            total["seconds"] += 0.05
            return {"work": 0.05}

    def counter() -> float:
        found = total["now"] - total["last"]
        total["last"] = total["now"]
        reads.append(found)
        if len(reads) % 2 == 0:  # after a reading, before the next one
            total["now"] += 1000.0
        return found

    monkeypatch.setattr(of_energy.time, "perf_counter", lambda: total["seconds"])
    found = energy(models, Load(), {"fast": 0.05, "dense": 0.3}, [counter], repeats=3)
    assert [found[n]["runs"] for n in models] == [4, 1]
    assert [models[n].calls for n in models] == [4 * 4, 1 * 4]  # one reading to warm up
    assert [found[n]["median"] for n in models] == pytest.approx([2.0, 5.0])
    assert [found[n]["watts"] for n in models] == pytest.approx([40.0, 100.0])
    assert found["fast"]["ratio"]["median"] == pytest.approx(2.5) and found["dense"]["ratio"] is None
