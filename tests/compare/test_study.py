"""Studies as data, and their runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur import Recipe
from secateur.compare import load, write_rows
from secateur.compare.contrasts import contrasts, study_of
from secateur.compare.plan import chosen_knobs, left_out, runs_of
from secateur.compare.rows import Row
from secateur.compare.store import Store
from secateur.compare.study import Study
from secateur.errors import SecateurError
from secateur.methods import all_methods


def study(**more: Any) -> Study:
    return Study.of({
        "tasks": [{"task": "digits", "options": {"images": 300}}], "methods": ["magnitude", "snip"],
        "targets": [0.5, 0.9], "seeds": 2, "budget": {"epochs": 1}, **more,
    })  # fmt: skip


def test_a_study_is_read_from_yaml_as_users_write_it() -> None:
    read = Study.load("""
study: mine
model: demo
methods: [magnitude, {method: wanda, allocation: owl, label: wanda-owl}]
targets: [0.3, 2:4, "params 10%"]
seeds: [3, 5]
budget: {windows: 4}
""")
    assert read.targets == ("0.3", "2:4", "params 10%") and read.seeds == (3, 5)
    assert read.contenders[1].recipe().allocation == "owl"
    assert Study.load(read.dump()) == read


@settings(max_examples=40, deadline=None)
@given(
    methods=st.lists(st.sampled_from([m.name for m in all_methods()]), min_size=1, max_size=4, unique=True),
    targets=st.lists(st.sampled_from(["0.5", "0.9", "2:4", "1:4", "flops 50%", "params 30%"]), min_size=1, unique=True),
    seeds=st.integers(1, 3),
    kind=st.sampled_from(["tasks", "models"]),
)
def test_every_cell_is_run_or_left_out_with_a_reason(methods: Any, targets: Any, seeds: int, kind: str) -> None:
    made = Study.of({
        kind: ["digits" if kind == "tasks" else "demo"], "methods": methods, "targets": targets, "seeds": seeds,
    })  # fmt: skip
    assert Study.load(made.dump()) == made
    runs, left = runs_of(made), left_out(made)
    cells = {(r.label, r.target) for r in runs if r.label != "dense"}
    assert cells.isdisjoint({(x.label, x.target) for x in left})
    assert len(cells) + len(left) == len(methods) * len(targets)
    assert all(x.reason for x in left)
    assert len(runs) == seeds * (1 + len(cells))


def test_runs_are_named_by_what_decides_their_outcome() -> None:
    first = {(r.label, r.target, r.seed): r.digest for r in runs_of(study())}
    again = {(r.label, r.target, r.seed): r.digest for r in runs_of(study(methods=["snip", "magnitude"], seeds=1))}
    assert all(first[key] == digest for key, digest in again.items())
    renamed = study(methods=[{"method": "magnitude", "label": "other"}])
    assert {r.digest for r in runs_of(renamed)} <= set(first.values())
    longer = {r.digest for r in runs_of(study(budget={"epochs": 2}))}
    assert longer.isdisjoint(first.values())
    assert len(set(first.values())) == len(first)


def test_a_method_without_data_and_chance_is_run_once_for_all_seeds() -> None:
    made = Study.of({"models": ["demo"], "methods": ["magnitude", "wanda"], "targets": [0.5], "seeds": 3})
    digests = {
        label: [r.digest for r in runs_of(made) if r.label == label] for label in ("dense", "magnitude", "wanda")
    }
    assert [len(set(digests[x])) for x in ("dense", "magnitude", "wanda")] == [1, 1, 3]
    assert len(digests["magnitude"]) == 3


def test_knobs_are_tuned_before_there_is_a_final_run() -> None:
    made = study(methods=[{"method": "gmp", "tune": {"driver.every": [1, 5]}}], targets=[0.5])
    tried = [r for r in runs_of(made) if r.role == "tune"]
    assert len(tried) == 2 and not [r for r in runs_of(made) if r.role == "final" and r.label == "gmp"]
    rows = [r.row("done", None, {"valid": 0.1 + k, "higher_is_better": True}) for k, r in enumerate(tried)]
    assert chosen_knobs(made, rows[:1]) == {}
    chosen = chosen_knobs(made, rows)
    final = [r for r in runs_of(made, chosen) if r.role == "final" and r.label == "gmp"]
    assert [r.spec["recipe"]["knobs"]["driver"]["every"] for r in final] == [5, 5]
    lower = [Row.from_dict({**r.to_dict(), "result": {**r.result, "higher_is_better": False}}) for r in rows]
    assert next(iter(chosen_knobs(made, lower).values()))["driver"]["every"] == 1


@pytest.mark.parametrize(
    "change, message",
    [
        ({"methods": []}, "at least one method"),
        ({"methods": ["magnitud"]}, "did you mean 'magnitude'"),
        ({"methods": ["magnitude", "magnitude"]}, "there twice"),
        ({"methods": [{"method": "magnitude", "label": "dense"}]}, "the baseline"),
        ({"methods": [{"method": "magnitude", "sparsity": 0.5}]}, "the study's to say"),
        ({"methods": [{"method": "magnitude", "tune": {"p": [1]}}]}, "axis.knob"),
        ({"targets": [1.5]}, "between 0 and 1"),
        ({"targets": ["flop 50%"]}, "not understood"),
        ({"targets": ["5:4"]}, "5:4"),
        ({"seeds": 0}, "at least one seed"),
        ({"seeds": [1, 1]}, "there twice"),
        ({"budget": {"epoch": 1}}, "budget is a mapping"),
        ({"budget": {"epochs": 1, "total_epochs": 2}}, "give one of them"),
        ({"budget": {"windows": 1.5}}, "whole number"),
        ({"budget": {"eval_windows": 2}}, "at least 3"),
        ({"method": ["magnitude"]}, "did you mean 'methods'"),
        ({"options": 3}, "sizes of a ready task"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence(change: dict[str, Any], message: str) -> None:
    with pytest.raises(SecateurError, match=message) as caught:
        study(**change)
    assert "\n" not in str(caught.value)


def test_every_contrast_is_a_study_or_says_why_not() -> None:
    for name, asked in contrasts().items():
        for kind, subject in (("task", "digits"), ("model", "demo")):
            if not asked.sides(kind):
                with pytest.raises(SecateurError, match="cannot be run on a"):
                    study_of(name, kind, subject)
                continue
            made = study_of(name, kind, subject, epochs=1.0, other={"task": "digits"})
            assert Study.load(made.dump()) == made
            levels = asked.levels_of(kind)
            cells = {(r.label, levels[r.target]) for r in runs_of(made) if r.label != "dense"}
            for level in {level for _, level in cells}:
                present = {s for s, labels in asked.labels(kind).items() if any((x, level) in cells for x in labels)}
                assert len(present) >= 2, f"{name}: {level} has one side only"
            assert not left_out(made), name


def test_layers_that_a_pattern_does_not_fit_stay_dense_on_both_sides() -> None:
    made = study_of("unstructured-vs-structured", "task", "digits", epochs=1.0)
    by_label = {c.label: c.recipe() for c in made.contenders}
    skipped = {label: recipe.skip for label, recipe in by_label.items() if recipe.granularity == "element"}
    assert len(skipped) == 2 and len(set(skipped.values())) == 1 and next(iter(skipped.values()))
    assert by_label["l1-norm (structured)"].skip == Recipe.of("l1-norm").skip


def test_a_model_that_was_trained_again_is_another_one(tmp_path: Path) -> None:
    made = Study.of({"models": [str(tmp_path)], "methods": ["magnitude"], "targets": [0.5], "seeds": 1})
    (tmp_path / "model.safetensors").write_bytes(b"one")
    first = [r.digest for r in runs_of(made)]
    assert [r.digest for r in runs_of(made)] == first
    (tmp_path / "model.safetensors").write_bytes(b"two")
    assert set(first).isdisjoint(r.digest for r in runs_of(made))


def test_a_study_that_was_moved_reads_its_rows(tmp_path: Path) -> None:
    made = study(seeds=1)
    (tmp_path / "study.yaml").write_text(made.dump(), encoding="utf-8")
    rows = [r.row("done", None, {"test": 0.5}) for r in runs_of(made)]
    write_rows(tmp_path / "rows.jsonl", rows)
    Store(tmp_path / "runs.sqlite").close()  # it knows none of these digests
    assert len(load(tmp_path).rows) == len(rows)
