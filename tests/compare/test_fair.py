"""One budget for all, and nothing of one run in another: single runs, made here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from secateur.compare.contrasts import study_of
from secateur.compare.engine import Comparison
from secateur.compare.execute import execute
from secateur.compare.of_tasks import run_task
from secateur.compare.plan import Run, runs_of
from secateur.compare.report import answers
from secateur.compare.study import Study
from secateur.compare.tables import _cell
from secateur.errors import StudyError

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


def test_a_file_that_was_edited_since_is_refused(tmp_path: Path) -> None:
    there = other(tmp_path / "b")
    run = planned(f"{there}:clouds", "magnitude")[0]
    there.write_text(TINY.read_text(encoding="utf-8"), encoding="utf-8")
    outcome = execute(run.digest, run.spec, tmp_path / "work")
    assert outcome.status == "failed" and "is not what it was when the study began" in (outcome.reason or "")


def test_nothing_is_calibrated_on_the_held_out_text() -> None:
    asked = {"model": "demo", "targets": [0.5], "data": "text:evaluation"}
    with pytest.raises(StudyError, match="calibration text and the held-out text are the same"):
        runs_of(Study.of({**asked, "methods": ["wanda"]}))
    assert runs_of(Study.of({**asked, "methods": ["magnitude"]}))


def test_a_contrast_needs_two_sides_and_one_budget() -> None:
    with pytest.raises(StudyError, match="no two sides at 0.5"):
        study_of("unstructured-vs-structured", "task", "digits", targets=["0.5"])
    assert study_of("initialized-vs-pretrained", "task", "digits").budget.total_epochs == 5.0
    asked = study_of("unstructured-vs-structured", "task", "digits", seeds=1)
    rows = [r.row("done", None, {"metric": "accuracy", "test": 0.5}) for r in runs_of(asked) if r.target in ("", "0.5")]
    assert answers(Comparison(asked, rows, 1, [])) == [], "the other sides have no runs yet"


def test_a_lost_model_fits_into_the_table() -> None:
    assert _cell([1e304, 1e304]) == "1e+304" and _cell([23.456, 23.458]) == "23.46 ±0.00"
