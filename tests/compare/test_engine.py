"""The engine and its store: what is missing is run, once; nothing that goes wrong stops a study."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from secateur.compare import compare, load, read_rows
from secateur.compare.plan import runs_of
from secateur.compare.store import Store
from secateur.compare.study import Study
from secateur.errors import OutputError, StudyError, UnknownName

TINY = Path(__file__).with_name("tiny.py")


def study(task: str = "clouds", **more: Any) -> Study:
    return Study.of({
        "task": f"{TINY}:{task}", "methods": ["magnitude", "random"], "targets": [0.5, 0.75], "seeds": 2,
        "budget": {"epochs": 1}, **more,
    })  # fmt: skip


def timeless(rows: Any) -> list[Any]:
    """Rows without what differs between two runs of the same thing."""
    found = []
    for row in rows:
        result = {k: v for k, v in row.result.items() if k not in ("created", "environment", "cost", "latency")}
        found.append((row.digest, row.label, row.target, row.seed, row.status, json.dumps(result, sort_keys=True)))
    return sorted(found)


def test_a_study_is_run_read_back_and_not_run_again(tmp_path: Path) -> None:
    ticks: list[Any] = []
    made = compare(study(), tmp_path / "s", workers=2, threads=1, progress=ticks.append)
    assert made.missing == 0 and len(made.rows) == 2 * (1 + 2 * 2) and all(r.done for r in made.rows)
    assert ticks[-1].done == ticks[-1].total == 10 and ticks[-1].left == 0
    first = next(r for r in made.rows if r.label == "magnitude" and r.target == "0.75")
    assert first.score is not None and first.figure("sparsity") == pytest.approx(0.75, abs=0.02)
    assert set(first.result["groups"]) == {"class 0", "class 1"}
    assert [x["kept"] < x["parameters"] for x in first.result["layers"]] == [True] * len(first.result["layers"])
    assert first.result["effective_flops"] < first.result["flops"]
    assert first.result["cost"]["epochs"] == 1.0 and first.result["cost"]["samples"] >= 64
    assert first.result["data"]["train"] != first.result["data"]["test"]
    assert 0 < first.result["cost"]["memory_before"] <= first.result["cost"]["peak_memory"]
    assert {p.name for p in (tmp_path / "s").iterdir()} == {"study.yaml", "runs.sqlite", "rows.jsonl", "artifacts"}
    assert timeless(load(tmp_path / "s").rows) == timeless(made.rows)
    begun = time.perf_counter()
    again = compare(study(), tmp_path / "s")
    assert timeless(again.rows) == timeless(made.rows) and time.perf_counter() - begun < 2
    assert "accuracy on the test data" in str(again)
    # What is committed of a study is its protocol and its rows.
    for name in ("runs.sqlite",):
        (tmp_path / "s" / name).unlink()
    assert timeless(load(tmp_path / "s").rows) == timeless(read_rows(tmp_path / "s" / "rows.jsonl"))
    # Another method, another seed: only what is missing is run.
    compare(study(seeds=1), tmp_path / "t", workers=1, threads=1)
    compare(study(methods=["magnitude", "random", "snip"]), tmp_path / "t", workers=1, threads=1)
    store = Store(tmp_path / "t" / "runs.sqlite")
    assert set(store.starts().values()) == {1}


def test_failures_are_rows_with_a_reason(tmp_path: Path) -> None:
    made = compare(study("broken", methods=["magnitude"]), tmp_path / "s", workers=1, threads=1)
    failed = [r for r in made.rows if not r.done]
    assert {r.seed for r in failed} == {1} and all("a mistake" in (r.reason or "") for r in failed)
    assert all(r.done for r in made.rows if r.seed == 0) and made.missing == 0
    assert "failed" in str(made)
    store = Store(tmp_path / "s" / "runs.sqlite")
    before = store.starts()
    compare(study("broken", methods=["magnitude"]), tmp_path / "s", workers=1, threads=1)
    assert store.starts() == before
    compare(study("broken", methods=["magnitude"]), tmp_path / "s", workers=1, threads=1, retry=True)
    assert sum(store.starts().values()) == sum(before.values()) + len({r.digest for r in failed})


def test_a_worker_that_dies_takes_one_run_with_it(tmp_path: Path) -> None:
    made = compare(study("deadly", targets=[0.5]), tmp_path / "s", workers=1, threads=1)
    assert {r.seed for r in made.rows if not r.done} == {1}
    assert all("signal 9" in (r.reason or "") for r in made.rows if not r.done)
    assert all(r.done for r in made.rows if r.seed == 0)
    assert [p.name for p in (tmp_path / "s" / "work").iterdir()] == ["workers.log"], "a reason may point to it"


def test_a_run_over_its_budget_of_time_is_stopped(tmp_path: Path) -> None:
    asked = study("slow", methods=["magnitude"], targets=[0.5], budget={"epochs": 1, "seconds": 8})
    made = compare(asked, tmp_path / "s", workers=1, threads=1)
    assert {r.seed for r in made.rows if not r.done} == {1}
    assert all("longer than its budget of 8 s" in (r.reason or "") for r in made.rows if not r.done)


def test_knobs_are_chosen_without_the_test_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECATEUR_NO_TEST", "1")
    asked = study("guarded", methods=[{"method": "gmp", "tune": {"driver.every": [1, 2]}}], targets=[0.5], seeds=1)
    made = compare(asked, tmp_path / "s", workers=1, threads=1)
    tried = [r for r in made.rows if r.role == "tune"]
    assert len(tried) == 2 and all(r.done and r.score is None and r.figure("valid") is not None for r in tried)
    assert all(r.result["groups"] is None for r in tried)
    final = [r for r in made.rows if r.role == "final" and r.label == "gmp"]
    assert len(final) == 1 and not final[0].done and "test data" in (final[0].reason or "")


def test_one_budget_for_all_training(tmp_path: Path) -> None:
    asked = study(methods=["snip", "magnitude-finetune"], targets=[0.5], seeds=1, budget={"total_epochs": 6})
    made = compare(asked, tmp_path / "s", workers=1, threads=1)
    spent = {r.label: r.figure("cost", "epochs") for r in made.rows}
    assert spent == {"dense": 6.0, "snip": 6.0, "magnitude-finetune": 6.0}


def test_masks_from_another_task(tmp_path: Path) -> None:
    asked = study(
        methods=[{"method": "magnitude", "masks": {"task": f"{TINY}:guarded"}, "label": "transferred"}],
        targets=[0.5], seeds=1,
    )  # fmt: skip
    made = compare(asked, tmp_path / "s", workers=1, threads=1)
    row = next(r for r in made.rows if r.label == "transferred")
    assert row.done, row.reason
    assert row.figure("sparsity") == pytest.approx(0.5, abs=0.02)


def test_claims(tmp_path: Path) -> None:
    runs = runs_of(study(seeds=1))
    first, second = Store(tmp_path / "r.sqlite"), Store(tmp_path / "r.sqlite")
    first.add(runs)
    one = first.claim(runs, lambda run, _: True)
    two = second.claim(runs, lambda run, _: True)
    assert one is not None and two is not None and one.digest != two.digest
    assert second.finish(two.digest, "done", None, {"test": 1.0}, 2.0)
    assert not second.finish(one.digest, "done", None, {}, 1.0), "it is the other's"
    assert first.counts(runs) == {"pending": len(runs) - 2, "running": 1, "done": 1, "failed": 0}
    first.release()
    third = second.claim(runs, lambda run, _: True)
    assert third is not None and third.digest == one.digest
    assert not first.finish(one.digest, "done", None, {}, 1.0), "it was given back"
    held = [first.claim(runs, lambda run, status: run.after is None or status[run.after] == "done") for _ in runs]
    assert all(run is None or run.after is None or first.outcomes()[run.after][0] == "done" for run in held)


def test_runs_of_a_dead_process_are_taken_over_and_those_of_a_living_one_are_not(tmp_path: Path) -> None:
    runs = runs_of(study(seeds=1))
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from secateur.compare.store import Store\nfrom secateur.compare.study import Study\n"
        "from secateur.compare.plan import runs_of\nfrom secateur.methods import load\nload()\n"
        "runs = runs_of(Study.load(Path(sys.argv[2])))\nstore = Store(Path(sys.argv[1]))\nstore.add(runs)\n"
        "print(store.claim(runs, lambda r, s: True).digest, flush=True)\ntime.sleep(120)\n"
    )
    (tmp_path / "study.yaml").write_text(study(seeds=1).dump(), encoding="utf-8")
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "r.sqlite"), str(tmp_path / "study.yaml")], stdout=subprocess.PIPE
    )
    assert other.stdout is not None
    taken = other.stdout.readline().decode().strip()
    store = Store(tmp_path / "r.sqlite")
    assert all((run := store.claim(runs, lambda r, s: True)) is None or run.digest != taken for _ in runs)
    other.send_signal(signal.SIGKILL)  # not waited for: it is a zombie, and dead all the same
    deadline = time.monotonic() + 20
    while (found := store.claim(runs, lambda r, s: True)) is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert found is not None and found.digest == taken
    other.wait()
    other.stdout.close()


def test_an_engine_on_a_silent_machine_is_given_up(tmp_path: Path) -> None:
    runs = runs_of(study(seeds=1))
    store = Store(tmp_path / "r.sqlite")
    store.add(runs)
    taken = store.claim(runs, lambda r, s: True)
    assert taken is not None
    with sqlite3.connect(tmp_path / "r.sqlite") as db:
        db.execute("update owners set host = 'elsewhere'")
    other = Store(tmp_path / "r.sqlite")
    assert all((run := other.claim(runs, lambda r, s: True)) is None or run.digest != taken.digest for _ in runs)
    with sqlite3.connect(tmp_path / "r.sqlite") as db:
        db.execute("update owners set seen = seen - 1000 where host = 'elsewhere'")
    again = other.claim(runs, lambda r, s: True)
    assert again is not None and again.digest == taken.digest


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_table(tmp_path: Path) -> None:
    asked = study(methods=["magnitude", "random", "snip"], targets=[0.25, 0.5, 0.75], seeds=2)
    alone = compare(asked, tmp_path / "alone", workers=1, threads=1)
    (tmp_path / "study.yaml").write_text(asked.dump(), encoding="utf-8")
    code = "import sys; from pathlib import Path; from secateur.compare import compare; "
    code += "compare(Path(sys.argv[1]), Path(sys.argv[2]), workers=1, threads=1)"
    killed = 0
    for wait in (0.3, 1.1, 0.6, 60.0):
        engine = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "study.yaml"), str(tmp_path / "s")])
        deadline = time.monotonic() + 60
        while not (tmp_path / "s" / "work" / "workers.log").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        try:
            engine.wait(wait + (2.0 if wait < 60 else 0.0))
        except subprocess.TimeoutExpired:
            engine.kill()
            engine.wait()
            killed += 1
    store = Store(tmp_path / "s" / "runs.sqlite")
    starts = store.starts()
    assert timeless(load(tmp_path / "s").rows) == timeless(alone.rows)
    assert len(starts) == 20 and sum(starts.values()) <= 20 + killed, "only runs that were under way are begun again"


def test_another_engine_at_work_keeps_its_files(tmp_path: Path) -> None:
    asked = study(methods=["magnitude"], targets=[0.5], seeds=1)
    made = compare(asked, tmp_path / "s", workers=1, threads=1)
    assert made.missing == 0
    store = Store(tmp_path / "s" / "runs.sqlite")
    others = runs_of(study(methods=["random"], targets=[0.5], seeds=1))
    store.add(others)
    assert store.quiet() and store.claim(others, lambda r, s: True) is not None
    assert not store.quiet()
    (tmp_path / "s" / "work" / "dense").mkdir(parents=True)
    compare(asked, tmp_path / "s")
    assert (tmp_path / "s" / "work" / "dense").is_dir()


def test_what_cannot_be_found_is_said_before_any_run(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="no model at fashion-resnt.*nor is it a task"):
        compare({"model": "fashion-resnt", "methods": ["magnitude"], "targets": [0.5]}, tmp_path / "a")
    with pytest.raises(StudyError, match="nothing named 'clowds'"):
        compare(study("clowds"), tmp_path / "b")
    with pytest.raises(UnknownName, match="contrast named 'one-shot'|'one-shot'"):
        compare(study(contrast="one-shot"), tmp_path / "c")


def test_trouble_of_the_store_is_one_sentence(tmp_path: Path) -> None:
    store = Store(tmp_path / "r.sqlite")
    store._db.execute("pragma max_page_count = 1")
    with pytest.raises(OutputError, match="full; what has been run is kept"):
        store.add(runs_of(study()))
    assert not store._db.in_transaction


def test_where_it_may_not_write(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine", encoding="utf-8")
    with pytest.raises(OutputError, match="not the directory of a study"):
        compare(study(), tmp_path)
    with pytest.raises(StudyError, match="no study.yaml"):
        load(tmp_path)
    with pytest.raises(StudyError, match="no study file"):
        compare(tmp_path / "missing.yaml")
    assert os.listdir(tmp_path) == ["precious"]
