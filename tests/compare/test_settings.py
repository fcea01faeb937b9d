"""What does not decide a run does not name it; what is broken around runs stops a study; several processes make one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from secateur.compare import compare, read_rows
from secateur.compare.execute import execute
from secateur.compare.outcome import over_time
from secateur.compare.plan import runs_of
from secateur.compare.store import Store
from secateur.compare.study import Study
from secateur.errors import StudyError
from tests.compare.test_engine import study

STUDIES = Path(__file__).parents[2] / "benchmarks" / "results" / "studies"


def named(asked: Study) -> dict[tuple[str, str, int], str]:
    return {(r.label, r.target, r.seed): r.digest for r in runs_of(asked)}


@pytest.mark.parametrize("folder", sorted(STUDIES.iterdir()), ids=lambda p: p.name)
def test_runs_of_committed_studies_keep_their_names(folder: Path) -> None:
    known = {row.digest for row in read_rows(folder / "rows.jsonl")}
    runs = runs_of(Study.load(folder / "study.yaml"))
    assert runs and all(r.digest in known or r.older in known for r in runs)


def test_time_does_not_name_a_run_and_more_of_it_tries_again(tmp_path: Path) -> None:
    short, long = (study(budget={"epochs": 1, "seconds": s}) for s in (2.0, 900.0))
    assert named(short) == named(long) == named(study())
    # A store of an earlier version, which named runs by their time too: one is over, one took too long.
    runs = runs_of(short)
    store = Store(tmp_path / "s.sqlite")
    (tmp_path / "s").mkdir()
    store.add([r for r in runs if r.older])
    store.close()
    store = Store(tmp_path / "r.sqlite")
    from dataclasses import replace

    store.add([replace(r, digest=r.older or "", older=None) for r in runs])
    for digest, status, reason in ((runs[0].older, "done", None), (runs[1].older, "failed", over_time(2.0))):
        run = store.claim(runs_of_digest(runs, digest), lambda r, s: True)
        assert run is not None and store.finish(run.digest, status, reason, {"test": 1.0}, 1.0)
    store.add(runs)
    assert store.outcomes()[runs[0].digest][0] == "done" and store.outcomes()[runs[1].digest][0] == "failed"
    from secateur.compare.engine import _have_longer

    assert not list(_have_longer(runs_of(short), store))
    assert [r.digest for r in _have_longer(runs_of(long), store)] == [runs[1].digest]


def runs_of_digest(runs: list[Any], digest: str | None) -> list[Any]:
    from dataclasses import replace

    return [replace(r, digest=digest) for r in runs if r.older == digest]


def test_data_name_a_run_where_it_is_measured_on_them() -> None:
    def of(**more: Any) -> dict[tuple[str, str, int], str]:
        return named(
            Study.of({"model": "demo", "methods": ["magnitude", "wanda"], "targets": [0.5], "seeds": 1, **more})
        )

    first, other, fewer = of(), of(data="text:evaluation", evaluation="text:calibration"), of(budget={"windows": 8})
    assert first[("magnitude", "0.5", 0)] == fewer[("magnitude", "0.5", 0)]
    assert first[("", "dense", 0)] == fewer[("", "dense", 0)] if ("", "dense", 0) in first else True
    assert first[("wanda", "0.5", 0)] != fewer[("wanda", "0.5", 0)]
    assert len({x[("wanda", "0.5", 0)] for x in (first, other, fewer)}) == 3
    assert len({x[("magnitude", "0.5", 0)] for x in (first, other)}) == 2, "held-out text does decide"


def test_a_broken_environment_stops_the_study_and_the_rerun_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    monkeypatch.setenv("SECATEUR_DATA", str(data))
    with pytest.raises(
        StudyError, match="stops: 3 runs in a row .*: the data are not there .*the same command goes on"
    ):
        compare(study("absent", seeds=3), tmp_path / "s", workers=1, threads=1)
    assert sum(Store(tmp_path / "s" / "runs.sqlite").starts().values()) == 3
    data.write_text("")
    made = compare(study("absent", seeds=3), tmp_path / "s", workers=1, threads=1)
    assert made.missing == 0 and all(r.done for r in made.rows) and len(made.rows) == 3 * (1 + 2 * 2)


def test_workers_that_do_not_start_stop_the_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken" / "torch"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise SystemExit(7)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "broken"), prepend=":")
    with pytest.raises(StudyError, match="stops: 3 runs in a row .* ended with status 7"):
        compare(study(), tmp_path / "s", workers=1, threads=1)
    monkeypatch.undo()
    assert compare(study(seeds=1, targets=[0.5]), tmp_path / "s", workers=1, threads=1).missing == 0


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch has no gloo here")
def test_two_processes_make_one_run(tmp_path: Path) -> None:
    budget = {"epochs": 1, "processes": 2}
    one, two = (runs_of(study(methods=["snip"], targets=[0.5], seeds=1, **x))[1] for x in ({}, {"budget": budget}))
    assert one.digest != two.digest
    alone, together = (execute(run.digest, run.spec, tmp_path / "work") for run in (one, two))
    assert alone.status == together.status == "done", (alone.reason, together.reason)
    assert together.result["protocol"]["processes"] == 2 and "processes" not in alone.result["protocol"]
    for key in ("sketch", "data", "nonzero", "layers", "metric"):
        assert alone.result[key] == together.result[key]
    assert together.result["test"] == pytest.approx(alone.result["test"], abs=0.02)
    dead = runs_of(study("deadly", methods=["snip"], targets=[0.5], seeds=[1], budget=budget))[0]
    failed = execute(dead.digest, dead.spec, tmp_path / "work")
    assert "one of its 2 processes ended before it could tell why" in (failed.reason or "") and failed.begun
    assert not list((tmp_path / "work").glob("*.shared"))
