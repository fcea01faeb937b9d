"""What the budget says of devices, and the study of speeds, hold for every kind of contender."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from secateur.compare import of_tasks
from secateur.compare.of_tasks import run_task
from secateur.compare.plan import Run, runs_of
from secateur.compare.study import Study

TINY = Path(__file__).with_name("tiny.py")


COMPOUND = {"compound": [{"prune": "magnitude"}, {"quantize": "int8"}], "label": "x"}


def only_run(method: Any, target: Any, **budget: Any) -> Run:
    asked = Study.of({
        "tasks": [f"{TINY}:clouds"], "methods": [method], "targets": [target], "seeds": 1, "latency": True,
        "budget": {"epochs": 0.5, **budget},
    })  # fmt: skip
    (run,) = [r for r in runs_of(asked) if r.label == "x"]
    return run


def test_the_speed_of_a_compound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = only_run(COMPOUND, 0.5)
    monkeypatch.setattr(of_tasks, "speed", lambda *_: {"ratio": 1.0})
    assert run_task(run.spec, tmp_path, run.digest)[0]["latency"] == {"ratio": 1.0}


@pytest.mark.parametrize(
    ("method", "target"),
    [(COMPOUND, 0.5), *(({"method": m, "label": "x"}, "flops 30%") for m in ("fbs", "supernet"))],
)
def test_it_is_trained_where_the_budget_says(
    method: Any, target: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(*_: Any, device: str = "cpu", **__: Any) -> None:
        raise InterruptedError(device)

    monkeypatch.setattr(of_tasks, "train", asked)
    run = only_run(method, target, device="cuda")
    with pytest.raises(InterruptedError, match="cuda"):
        run_task(run.spec, tmp_path, run.digest)
