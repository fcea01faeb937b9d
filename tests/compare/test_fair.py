"""One budget for all, and nothing of one run in another: single runs, made here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from secateur.compare.of_tasks import run_task
from secateur.compare.plan import Run, runs_of
from secateur.compare.study import Study

TINY = Path(__file__).with_name("tiny.py")


def planned(task: str, method: Any, **more: Any) -> list[Run]:
    return runs_of(Study.of({"task": task, "methods": [method], "targets": [0.5], "seeds": 1, **more}))


def results(runs: list[Run], work: Path) -> dict[str, dict[str, Any]]:
    return {run.label: run_task(run.spec, work, run.digest)[0] for run in runs}


def other(folder: Path) -> Path:
    """The same task with its labels the other way around."""
    folder.mkdir()
    text = TINY.read_text(encoding="utf-8").replace("float(), labels", "float(), 1 - labels")
    (folder / "tiny.py").write_text(text, encoding="utf-8")
    return folder / "tiny.py"


def test_dense_models_of_two_files_are_two(tmp_path: Path) -> None:
    turned = planned(f"{other(tmp_path / 'b')}:clouds", "magnitude", budget={"epochs": 3})
    alone = results(turned, tmp_path / "alone")
    results(planned(f"{TINY}:clouds", "magnitude", budget={"epochs": 3}), tmp_path / "both")
    after = results(turned, tmp_path / "both")
    assert after["magnitude"]["test"] == alone["magnitude"]["test"]


def test_the_dense_run_is_what_others_begin_with_and_its_time_counts(tmp_path: Path) -> None:
    runs = planned(f"{TINY}:clouds", "magnitude", budget={"epochs": 40})
    made = results(runs, tmp_path)
    assert len(list((tmp_path / "dense").rglob("*.safetensors"))) == 1
    seconds = {label: result["cost"]["seconds"] for label, result in made.items()}
    assert seconds["magnitude"] > 0.5 * seconds["dense"], "it was read, and had been trained all the same"


@pytest.mark.parametrize(
    ("method", "total"),
    [
        ("magnitude-finetune", 4.5),  # 3 and 1.5 epochs
        ({"method": "lth-rewind", "steps": 2}, 7.25),  # 2.5 epochs, and twice 0.95 of that
        ({"method": "magnitude", "masks": {"task": f"{TINY}:clouds"}}, 4.0),  # the ticket is trained for, too
    ],
)
def test_epochs_of_all_training(tmp_path: Path, method: Any, total: float) -> None:
    made = results(planned(f"{TINY}:clouds", method, budget={"total_epochs": total}), tmp_path)
    for label, result in made.items():
        assert result["cost"]["epochs"] == pytest.approx(total, abs=0.26), label  # a step is a quarter of an epoch


def test_the_file_that_masks_come_from_is_in_the_digest(tmp_path: Path) -> None:
    there = other(tmp_path / "b")
    before = planned("digits", {"method": "magnitude", "masks": {"task": f"{there}:clouds"}})
    there.write_text(TINY.read_text(encoding="utf-8"), encoding="utf-8")
    after = planned("digits", {"method": "magnitude", "masks": {"task": f"{there}:clouds"}})
    assert [a.digest == b.digest for a, b in zip(before, after, strict=True)] == [True, False]
