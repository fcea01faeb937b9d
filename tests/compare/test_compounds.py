"""Compounds and decompositions in a study: at its targets, or at their own; and what each step brings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from secateur.compare import compare, write_report
from secateur.compare.ablation import ablations
from secateur.compare.of_models import run_model
from secateur.compare.of_tasks import run_task
from secateur.compare.plan import left_out, runs_of
from secateur.compare.study import Study
from secateur.errors import SecateurError, StudyError

TINY = Path(__file__).with_name("tiny.py")
BOTH: list[dict[str, Any]] = [
    {"prune": "magnitude"}, {"recover": {"method": "finetune", "epochs": 1}}, {"quantize": "int8"},
]  # fmt: skip


def study(methods: list[Any], targets: list[Any], **more: Any) -> Study:
    return Study.of({
        "task": f"{TINY}:clouds", "methods": methods, "targets": targets, "seeds": 2, "budget": {"epochs": 1}, **more,
    })  # fmt: skip


def test_a_study_says_what_each_step_brings(tmp_path: Path) -> None:
    asked = study(["magnitude", {"compound": BOTH, "label": "both", "ablate": True}], [0.5])
    assert Study.load(asked.dump()) == asked
    assert [c.label for c in asked.contenders][1:] == [
        "both", "both without 1 (prune magnitude)", "both without 2 (recover finetune)",
        "both without 3 (quantize int8)",
    ]  # fmt: skip
    made = compare(asked, tmp_path / "s", workers=1, threads=1)
    assert all(r.done for r in made.rows), [r.reason for r in made.rows]
    rows = {r.label: r for r in made.rows if r.seed == 0}
    assert rows["both"].result["bytes"] < rows["magnitude"].result["bytes"]
    assert rows["both"].result["nonzero"] == pytest.approx(rows["magnitude"].result["nonzero"], rel=0.1)
    assert rows["both without 1 (prune magnitude)"].result["sparsity"] == 0
    assert rows["both"].result["cost"]["epochs"] == 2 and rows["both"].result["cost"]["after_dense"] == 1
    found = ablations(asked.to_dict(), made.rows)
    assert [(a.label, a.target, [s.step for s in a.steps]) for a in found] == [
        ("both", "0.5", ["prune magnitude", "recover finetune", "quantize int8"])
    ]
    (one,) = found
    for step, label in zip(one.steps, [c.label for c in asked.contenders][2:], strict=True):
        scores = [[r.score for r in made.rows if r.label == x] for x in ("both", label)]
        assert step.moved.value == pytest.approx(sum(a - b for a, b in zip(*scores, strict=True)) / 2)
    assert (one.steps[2].sizes["bytes"] or 1) < 0.9 and (one.steps[0].sizes["nonzero"] or 1) < 0.7
    text = str(made)
    assert "what each step of both brings at 0.5" in text and "quantize int8" in text
    page = write_report(made, tmp_path / "s" / "report.html").read_text(encoding="utf-8")
    assert "What each step brings" in page and "prune magnitude" in page


def test_decompositions_compete(tmp_path: Path) -> None:
    asked = study(["magnitude", {"method": "svd", "allocation": "uniform"}], [0.4])
    made = compare(asked, tmp_path / "s", workers=1, threads=1)
    own = [r for r in made.rows if r.label == "svd"]
    dense = next(r for r in made.rows if r.dense)
    assert all(r.done for r in own) and own[0].result["parameters"] < dense.result["parameters"]


def test_what_does_not_fit_is_left_out() -> None:
    closed = {
        "compound": [{"prune": {"method": "magnitude", "sparsity": 0.5}}, {"quantize": "int8"}],
        "label": "closed",
    }
    opened = {"compound": [{"prune": "magnitude"}, {"quantize": "int8"}], "label": "open"}
    asked = study(["magnitude", closed, opened, "svd"], [0.5, "own", "2:4", "params 30%"])
    out = {(x.label, x.target): x.reason for x in left_out(asked)}
    assert set(out) == {
        ("magnitude", "own"), ("magnitude", "params 30%"), ("closed", "0.5"), ("closed", "2:4"),
        ("closed", "params 30%"), ("open", "own"), ("open", "params 30%"), ("svd", "own"), ("svd", "2:4"),
    }  # fmt: skip
    assert "leaves open how much 'prune magnitude' takes" in out["open", "own"]
    assert "its target is 'own'" in out["closed", "0.5"] and "a pattern of these" in out["svd", "2:4"]
    for methods in ([{"compound": "nowhere.yaml"}], [{"compound": [{"quantize": "int8"}], "ablate": True}],
                    [{"compound": BOTH, "sparsity": 0.5}], [{"compound": BOTH, "ablate": "yes"}]):  # fmt: skip
        with pytest.raises(SecateurError):
            study(methods, [0.5])


def test_runs_without_a_step_are_shared() -> None:
    """Without its open step a compound does the same at each target."""
    asked = study(
        [{"compound": [{"prune": "magnitude"}, {"quantize": "int8"}], "label": "c", "ablate": True}], [0.5, 0.7]
    )
    runs = [r for r in runs_of(asked) if r.label == "c without 1 (prune magnitude)" and r.seed == 0]
    assert len(runs) == 2 and len({r.digest for r in runs}) == 1
    assert len({r.digest for r in runs_of(asked) if r.label == "c" and r.seed == 0}) == 2


def test_on_a_language_model(model: Path, text: Path, tmp_path: Path) -> None:
    """Bytes are as they are stored: integers packed."""
    held = tmp_path / "held.txt"
    held.write_text(" ".join(f"w{(5 * k * k + k) % 63 + 1}" for k in range(600)))
    steps = [{"decompose": {"method": "low-rank", "sparsity": 0.2}}, {"prune": "sparsegpt"}, {"quantize": "int8"}]
    asked = Study.of({
        "model": str(model), "methods": [{"compound": steps, "label": "all", "ablate": True}, "low-rank"],
        "targets": [0.5], "seeds": 1, "data": f"text:{text}", "evaluation": f"text:{held}",
        "budget": {"windows": 4, "length": 16, "eval_windows": 6},
    })  # fmt: skip
    found = {}
    for run in runs_of(asked):
        if run.label in ("dense", "all", "all without 3 (quantize int8)", "low-rank"):
            found[run.label] = run_model(run.spec, tmp_path, "run")[0]
    sizes = {label: r["bytes"] for label, r in found.items()}
    assert sizes["all"] < sizes["all without 3 (quantize int8)"] < sizes["dense"]
    assert found["all"]["sparsity"] == pytest.approx(0.5, abs=0.01) and found["low-rank"]["sparsity"] == 0
    assert found["low-rank"]["parameters"] < found["dense"]["parameters"]
    assert all(r["test"] > 1 and r["cost"]["seconds"] >= 0 for r in found.values())
    assert found["all"]["cost"]["samples"] == 4 and len(found["all"]["recipe_digest"]) == 16


def test_all_training_counts(tmp_path: Path) -> None:
    """Dense training is as much shorter as the steps that train are long."""
    steps = [{"prune": "magnitude"}, {"recover": "finetune"}, {"recover": {"method": "finetune", "epochs": 1}}]
    asked = study([{"compound": steps, "label": "c"}], [0.5], seeds=1, budget={"total_epochs": 4})
    run = next(r for r in runs_of(asked) if r.label == "c")
    result, record = run_task(run.spec, tmp_path, "run")
    assert result["cost"]["epochs"] == 4 and result["protocol"]["epochs"] == 2  # 2 and 1 and 1
    assert result["cost"]["after_dense"] == 2 and record["metric"]["after"] == result["test"]
    asked = study([{"compound": steps, "label": "c"}], [0.5], seeds=1, budget={"total_epochs": 1})
    with pytest.raises(StudyError, match="train 1 epochs of the 1 that all may take"):
        run_task(next(r for r in runs_of(asked) if r.label == "c").spec, tmp_path, "run")


@pytest.mark.parametrize("method", ["svd", {"method": "cp", "ranks": 4, "label": "c"}, {"method": "tome", "r": 2}])
def test_a_transform_is_written_as_it_was_read(method: Any) -> None:
    asked = study([method], ["params 30%", "own"])
    assert Study.load(asked.dump()) == asked
