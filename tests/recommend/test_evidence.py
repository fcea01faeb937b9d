"""Runs of studies: read from what a study leaves, shipped in less, and taken together into cells."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur import Recipe
from secateur.compare import Row, write_rows
from secateur.errors import DataError
from secateur.recommend import evidence
from secateur.recommend.candidate import Aim
from secateur.recommend.cells import aim_of, cells, lost
from secateur.recommend.evidence import Run, export, gather, read, shipped
from secateur.recommend.subject import Subject
from tests.recommend.rows import row, study

CNN = Subject("net", "cnn", 1000)


def folder(path: Path, rows: list[Row], name: str | None = None) -> Path:
    path.mkdir(parents=True)
    write_rows(path / "rows.jsonl", rows)
    if name is not None:
        (path / "study.yaml").write_text(f"study: {name}\n")
    return path


def test_a_study_is_read(tmp_path: Path) -> None:
    rows = [row("digits", "dense", "", 0, 0.9, parameters=77), row("digits", "magnitude", "0.5", 0, 0.8)]
    rows.append(replace(rows[1], digest="tuned", role="tune"))
    found = read(folder(tmp_path / "one", rows, "my study"))
    assert {run.row.digest for run in found} == {
        rows[0].digest,
        rows[1].digest,
    }  # runs that chose a knob are no evidence
    assert {(run.study, run.own, run.subject) for run in found} == {("my study", True, Subject("digits", "cnn", 77))}
    assert {run.study for run in read(folder(tmp_path / "two", rows))} == {"two"}


def test_a_language_model_is_known_by_its_metric(tmp_path: Path) -> None:
    rows = [row("a/b", "dense", "", 0, 9.0, metric="perplexity")]
    assert read(folder(tmp_path / "s", rows))[0].subject.kind == "decoder"


@pytest.mark.parametrize("name", ["fashion.jsonl", "fashion.jsonl.gz"])
def test_what_ships_is_less_and_says_the_same(name: str, tmp_path: Path) -> None:
    rows = [
        row("digits", label, target, seed, 0.5 + 0.1 * seed, latency={"ratio": 2.0}, cost={"seconds": 3.0},
            layers=[{"name": "x"}] * 50, sketch={"bits": "A" * 9}, groups={"a": 1.0}, data={"train": "hash"},
            environment={"machine": {"instructions": "AVX2"}, "threads": 2, "versions": {"torch": "2"}})
        for label, target in (("dense", ""), ("magnitude", "0.5"), ("gmp", "0.5")) for seed in (0, 1)
    ]  # fmt: skip
    one, target = folder(tmp_path / "study", rows), tmp_path / name
    assert export(one, target) == 6
    again = read(target, own=False)
    assert [run.row.score for run in again] == [
        r.score for r in sorted(rows, key=lambda r: (r.label != "dense", r.label))
    ]
    result = again[0].row.result
    assert not {"layers", "sketch", "groups", "data"} & set(result)
    assert result["environment"] == {"machine": {"instructions": "AVX2"}, "threads": 2}
    ours, theirs = cells(read(one)), cells(again)
    assert [c.outcomes[0].drop for c in ours] == [c.outcomes[0].drop for c in theirs]
    assert (ours[0].own, theirs[0].own) == (True, False)
    first = target.read_bytes()
    export(one, target)
    assert target.read_bytes() == first  # the same file from the same study
    assert not list(tmp_path.glob("*.partial"))


def test_a_subject_that_nobody_describes_does_not_ship(tmp_path: Path) -> None:
    one = folder(tmp_path / "study", [row("mine.py:net", "magnitude", "0.5", 0, 0.5)])
    with pytest.raises(DataError, match=r"mine\.py:net"):
        export(one, tmp_path / "x.jsonl")
    assert export(one, tmp_path / "x.jsonl", {"mine.py:net": Subject("mine.py:net", "cnn", 5)}) == 1
    assert read(tmp_path / "x.jsonl")[0].subject.parameters == 5


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"format": "other"}', '{"format": "secateur evidence 1"}', "\x00"])
def test_other_files_are_refused(text: str, tmp_path: Path) -> None:
    for name in ("x.jsonl.gz", "x.json"):
        (tmp_path / name).write_text(text)
        with pytest.raises(DataError, match="x.json"):
            read(tmp_path / name)
    with pytest.raises(DataError, match="rows.jsonl"):
        read(tmp_path)
    with pytest.raises(DataError, match="no study"):
        read(tmp_path / "missing")


def test_the_users_own_runs_count_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row("digits", "magnitude", "0.5", s, 0.5) for s in (0, 1)]
    ours = [Run(rows[0], "shipped", CNN), Run(replace(rows[1], digest="other"), "shipped", CNN)]
    monkeypatch.setattr(evidence, "shipped", lambda: ours)
    found = gather([folder(tmp_path / "mine", rows)])
    assert [(run.row.digest, run.own) for run in found] == [
        (rows[0].digest, True), (rows[1].digest, True), ("other", False)
    ]  # fmt: skip


def test_what_ships_with_the_package_can_be_read() -> None:
    assert all(not run.own and run.row.role == "final" for run in shipped())


def test_losses() -> None:
    assert lost(0.45, 0.9, "accuracy", True) == pytest.approx(0.5)
    assert lost(20.0, 10.0, "perplexity", False) == pytest.approx(math.log(2))
    assert lost(2.4, 2.0, "bits per character", False) == pytest.approx(0.2)
    assert lost(0.5, 0.0, "accuracy", True) is None
    assert lost(-1.0, 10.0, "perplexity", False) is None


def test_aims() -> None:
    assert aim_of("0.9", "element", None) == Aim("weights", "weights", 0.1)
    assert aim_of("2:4", "2:4", None) == Aim("pattern", "weights", 0.5)
    assert aim_of("flops to 30%", "coupled", None) == Aim("units", "flops", 0.3)
    assert aim_of("latency to 3ms", "coupled", 0.4) == Aim("units", "weights", 0.6)
    for odd in ("", "much", "7", "9:4", "latency to 3ms"):
        assert aim_of(odd, "element", None) is None


def test_cells_take_seeds_together_and_every_seed_has_its_own_baseline() -> None:
    rows = [row("net", "dense", "", 0, 0.8), row("net", "dense", "", 1, 0.4)]
    rows += [row("net", "magnitude", "0.5", 0, 0.4), row("net", "magnitude", "0.5", 1, 0.4)]
    rows += [row("net", "wanda", "0.5", 0, 0.6), row("net", "random", "0.5", 0, 0.2)]
    (cell,) = cells(Run(r, "s", CNN) for r in rows)
    by = {o.label: o for o in cell.outcomes}
    assert by["magnitude"].drop == pytest.approx((0.5 + 0.0) / 2)
    assert by["wanda"].drop == pytest.approx(0.25)
    assert (cell.absolute, cell.best, cell.spread) == (True, pytest.approx(0.25), pytest.approx(1 / 6))
    assert [cell.regret(by[x]) for x in ("magnitude", "wanda", "random")] == pytest.approx([0.0, 0.0, 3.0])


def test_failed_runs_lost_as_much_as_the_worst() -> None:
    rows = [row("net", "dense", "", 0, 1.0), row("net", "random", "0.5", 0, 0.2), row("net", "wanda", "0.5", 0, 0.9)]
    rows += [row("net", "ria", "0.5", 0, None, status="failed"), row("net", "admm", "0.5", 0, math.inf)]
    rows += [
        row("net", "magnitude", "0.9", 0, None, status="failed"),
        row("net", "lamp", "0.5", 0, 0.9, status="failed"),
    ]
    (cell,) = cells(Run(r, "s", CNN) for r in rows)  # where nothing was finished there is no cell
    by = {o.label: o for o in cell.outcomes}
    for label in ("ria", "admm", "lamp"):
        assert (by[label].drop, by[label].score, by[label].failed) == (pytest.approx(0.8), None, 1)


def test_without_a_baseline_regret_is_known_and_losses_are_not() -> None:
    (cell,) = cells(Run(row("net", m, "0.5", 0, s), "s", CNN) for m, s in (("magnitude", 0.8), ("wanda", 0.6)))
    assert not cell.absolute
    assert {o.label: cell.regret(o) for o in cell.outcomes} == {"magnitude": 0.0, "wanda": pytest.approx(2.0)}


def test_rows_of_any_order_make_the_same_cells_and_odd_ones_are_left_out() -> None:
    runs = study("s", CNN, {"magnitude": 0.1, "wanda": 0.05})
    odd = replace(runs[-1].row, digest="odd", label="odd", recipe={"unknown": 1})
    assert cells([*runs, Run(odd, "s", CNN)]) == cells(reversed(runs)) == cells(runs)


def test_recipes_of_other_versions_are_understood_as_far_as_they_go() -> None:
    old = {k: v for k, v in Recipe.of("wanda").to_dict().items() if k not in ("control", "nested")}
    rows = [row("net", "wanda", "0.5", 0, 0.5)]
    (cell,) = cells([Run(replace(rows[0], recipe=json.loads(json.dumps(old))), "s", CNN)])
    assert cell.outcomes[0].candidate.family == "llm"


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=9, unique=True))
def test_places_are_ranks_and_lead_back_to_what_was_lost(drops: list[float]) -> None:
    labels = ["magnitude", "wanda", "random", "obc", "ria", "lamp", "admm", "snip", "synflow"][: len(drops)]
    (cell,) = cells(study("s", Subject("net", "cnn", 10**6), dict.fromkeys(labels, 0.1), targets=("0.5",), noise=0.0))
    assert {cell.place(o) for o in cell.outcomes} == {1.0}, "equal ones share the middle"
    made = replace(
        cell, outcomes=tuple(replace(o, drop=round(d, 6)) for o, d in zip(cell.outcomes, drops, strict=True))
    )
    places = {o.drop: made.place(o) for o in made.outcomes}
    assert sum(made.place(o) for o in made.outcomes) == pytest.approx(len(drops))
    if len(places) == len(drops):
        assert [places[d] for d in sorted(places)] == pytest.approx(
            [2 * k / (len(drops) - 1) for k in range(len(drops))]
        )
        assert all(made.drop_at(place) == pytest.approx(drop, abs=1e-9) for drop, place in places.items())
    assert made.drop_at(-1.0) == made.best
    assert made.drop_at(9.0) == pytest.approx(max(o.drop for o in made.outcomes))
