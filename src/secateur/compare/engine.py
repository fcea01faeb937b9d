"""The engine: which runs are missing, who makes them, and what becomes of them."""

from __future__ import annotations

import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ModelError, OutputError, SecateurError, StudyError
from ..frozen import thawed
from ..models import resolve
from ..record import dumps
from ..tasks import find
from .contrasts import contrast
from .local import Executor, Local
from .outcome import Outcome, limit_of
from .plan import Left, Run, chosen_knobs, left_out, runs_of
from .rows import Row, read_rows, write_rows
from .store import Store
from .study import Study

#: Seconds between two signs of life.
BEAT = 5.0
#: So many runs in a row that end before anything of them is done, for one reason, stop a study.
ENOUGH = 3


@dataclass(frozen=True)
class Tick:
    """How far a study is: runs that are over, failed ones among them, of all; seconds left, None while unknown."""

    done: int
    failed: int
    total: int
    left: float | None
    doing: str = ""


@dataclass(frozen=True, eq=False)
class Comparison:
    """A study with what its runs found.

    Attributes:
        rows: of the runs that are over, failed ones among them.
        missing: how many runs have not been made.
        left_out: what the study does not try, and why.
    """

    study: Study
    rows: list[Row]
    missing: int
    left_out: list[Left]

    def __str__(self) -> str:
        from .tables import table

        return table(self.study, self.rows, self.missing)


def compare(
    study: Study | Mapping[str, Any] | str | Path,
    out: str | Path | None = None,
    *,
    workers: int | None = None,
    threads: int | None = None,
    ray: str | None = None,
    retry: bool = False,
    progress: Callable[[Tick], None] | None = None,
) -> Comparison:
    """Make the runs of a study that are missing, and read those that are there.

    Args:
        study: a `Study`, its plain data, or the file that says it.
        out: a directory; of a file, its own name without the ending by default. It may be shared by several processes,
            and by studies that have runs in common.
        workers: processes that work at once; one for two processors by default.
        threads: of each of them; the processors are shared out evenly by default.
        ray: the address of a Ray cluster that works in place of processes here (``auto``, ``local``).
        retry: try failed runs again.
        progress: called whenever a run has ended.

    Raises:
        StudyError, OutputError: before any run is made.
    """
    asked = _study(study)
    target = Path(out) if out is not None else _beside(study)
    target.mkdir(parents=True, exist_ok=True)
    _keep_protocol(asked, target)
    store = Store(target / "runs.sqlite")
    runner: Executor | None = None
    try:
        runs = _planned(asked, store)
        store.add(runs)
        store.retry(r.digest for r in (runs if retry else _have_longer(runs, store)))
        if any(status in ("pending", "running") for status in _states(store, runs)):
            _there(asked)
            runner = _executor(target, workers, threads, ray)
            _work(asked, store, runner, target, progress or (lambda _: None))
    finally:
        if runner is not None:
            runner.close()
        store.release()
        found, quiet = _collect(asked, store), store.quiet()
        store.close()
        write_rows(target / "rows.jsonl", found.rows)
    if not found.missing and quiet:
        _tidy(target / "work", keep_log=any(not row.done for row in found.rows))
    return found


def _there(study: Study) -> None:
    """Find what is pruned before any run is made; the demo model is converted here, and not by every worker."""
    sources = [(s.kind, s.source, dict(s.options)) for s in study.subjects]
    given = [thawed(c.masks) for c in study.contenders if c.masks]
    sources += [("task", m["task"], {k: v for k, v in m.items() if k != "task"}) for m in given]
    for kind, source, options in sources:
        try:
            if kind == "task":
                find(source, **options)
            else:
                resolve(source)
        except ModelError as error:
            raise StudyError(f"{error}; nor is it a task (secateur tasks)" if kind == "model" else str(error)) from None
        except SecateurError:
            raise
        except Exception as error:  # of the user's file
            said = str(error).strip().splitlines()
            raise StudyError(f"{source} cannot be read: {type(error).__name__}: {said[0] if said else ''}") from error


def _tidy(work: Path, keep_log: bool) -> None:
    """Remove what runs shared; failures may point to the log."""
    for path in work.iterdir() if work.is_dir() else ():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif not keep_log:
            path.unlink(missing_ok=True)
    if not keep_log:
        shutil.rmtree(work, ignore_errors=True)


def load(path: str | Path) -> Comparison:
    """The study of a directory that `compare` wrote; its runs from the store, or from ``rows.jsonl`` where that is all.

    Raises:
        StudyError: it is no study.
    """
    folder = Path(path)
    file = folder / "study.yaml"
    if not file.is_file():
        raise StudyError(f"{folder} is not the directory of a study: it has no study.yaml")
    study = Study.load(file)
    if (folder / "runs.sqlite").is_file():
        found = collect(study, folder)
        # Read elsewhere than it was run, the files that it names may be others; what it found stays what it found.
        if found.rows or not (folder / "rows.jsonl").is_file():
            return found
    if not (folder / "rows.jsonl").is_file():
        raise StudyError(f"{folder} has no runs: secateur compare {file} makes them")
    rows = read_rows(folder / "rows.jsonl")
    return Comparison(study, rows, 0, left_out(study))


def collect(study: Study, folder: Path) -> Comparison:
    """What a directory holds of a study, which need not be the one that was run there last."""
    store = Store(folder / "runs.sqlite")
    try:
        return _collect(study, store)
    finally:
        store.close()


# -- the loop --------------------------------------------------------------------------------------


def _work(
    study: Study, store: Store, runner: Executor, target: Path, progress: Callable[[Tick], None]
) -> None:  # fmt: skip
    runs = _planned(study, store)
    flying: dict[str, Run] = {}
    times: list[float] = []
    idle: list[Outcome] = []  # the last ones, all ended before they began
    beaten = time.monotonic()
    while True:
        while len(flying) < runner.slots:
            run = store.claim(runs, _free)
            if run is None:
                break
            flying[run.digest] = run
            runner.start(run.digest, run.spec)
            progress(_tick(store, runs, times, runner.slots, f"{run.label} {run.target}".strip()))
        if not flying:
            more = _planned(study, store)
            if len(more) > len(runs):  # tuning has chosen: the final runs are known now
                store.add(more)
                runs = more
                continue
            if not any(s in ("pending", "running") for s in _states(store, runs)):
                return
            time.sleep(0.5)  # another process has the rest, or what the rest waits for
        for outcome in runner.wait(0.5) if flying else ():
            run = flying.pop(outcome.digest)
            _enter(store, target, outcome)
            times.append(outcome.seconds)
            idle = [] if outcome.begun else [*(x for x in idle if x.reason == outcome.reason), outcome]
            if len(idle) >= ENOUGH:
                store.retry(x.digest for x in idle)
                raise StudyError(
                    f"the study stops: {ENOUGH} runs in a row ended before anything of them was done, each because: "
                    f"{outcome.reason}; once that is mended, the same command goes on"
                )
            progress(_tick(store, runs, times, runner.slots, f"{run.label} {run.target}".strip()))
        if time.monotonic() - beaten > BEAT:
            store.beat()
            beaten = time.monotonic()


def _have_longer(runs: Iterable[Run], store: Store) -> Iterator[Run]:
    """Those that were stopped for their time, and may take longer now."""
    over = store.outcomes()
    for run in runs:
        limit = limit_of(over[run.digest][1]) if run.digest in over else None
        now = run.spec["budget"]["seconds"]
        if limit is not None and (now is None or now > limit):
            yield run


def _free(run: Run, status: Mapping[str, str]) -> bool:
    """Whether what a run begins with is there."""
    return run.after is None or status.get(run.after) in ("done", "failed")


def _enter(store: Store, target: Path, outcome: Outcome) -> None:
    if outcome.record:
        folder = target / "artifacts"
        folder.mkdir(exist_ok=True)
        part = folder / f".{outcome.digest}.{os.getpid()}.tmp"
        part.write_text(dumps(outcome.record), encoding="utf-8")
        part.replace(folder / f"{outcome.digest}.json")
    store.finish(outcome.digest, outcome.status, outcome.reason, outcome.result, outcome.seconds)


def _tick(store: Store, runs: list[Run], times: list[float], slots: int, doing: str) -> Tick:
    counts = store.counts(runs)
    waiting = counts["pending"] + counts["running"]
    left = statistics.mean(times) * waiting / slots if times else None
    return Tick(counts["done"] + counts["failed"], counts["failed"], sum(counts.values()), left, doing)


def _planned(study: Study, store: Store) -> list[Run]:
    """All runs that are known now."""
    first = runs_of(study)
    if not any(c.tune for c in study.contenders):
        return first
    return runs_of(study, chosen_knobs(study, _rows(first, store)))


def _rows(runs: Iterable[Run], store: Store) -> list[Row]:
    over = store.outcomes()
    found = []
    for run in runs:
        known = next((d for d in (run.digest, run.older) if d in over), None)
        if known is not None:
            status, reason, result, _ = over[known]
            found.append(run.row(status, reason, result))
    return found


def _states(store: Store, runs: Iterable[Run]) -> list[str]:
    return [s for s, count in store.counts(runs).items() for _ in range(count)]


def _collect(study: Study, store: Store) -> Comparison:
    runs = _planned(study, store)
    rows = _rows(runs, store)
    missing = len({r.digest for r in runs}) - len({r.digest for r in rows})
    return Comparison(study, rows, missing, left_out(study))


# -- where -----------------------------------------------------------------------------------------


def _study(given: Study | Mapping[str, Any] | str | Path) -> Study:
    from ..methods import load as load_methods

    load_methods()
    if isinstance(given, Study):
        asked = given
    elif isinstance(given, Mapping):
        asked = Study.of(given)
    elif not (path := Path(given)).is_file():
        raise StudyError(f"there is no study file {path}")
    else:
        asked = Study.load(path)
    if asked.contrast is not None:
        contrast(asked.contrast)
    return asked


def _beside(study: Any) -> Path:
    if isinstance(study, (str, Path)):
        return Path(study).with_suffix("")
    raise StudyError("say where the runs are kept: out=")


def _keep_protocol(study: Study, target: Path) -> None:
    """Write what was asked beside the runs; a directory that holds something else is refused."""
    file = target / "study.yaml"
    if not file.exists() and any(not p.name.startswith(".study.") for p in target.iterdir()):
        raise OutputError(f"{target} exists, and is not the directory of a study: choose another --out")
    part = target / f".study.{os.getpid()}.tmp"
    part.write_text(study.dump(), encoding="utf-8")
    part.replace(file)


def _executor(target: Path, workers: int | None, threads: int | None, ray: str | None) -> Executor:
    cores = os.cpu_count() or 1
    count = workers or max(1, cores // 2)
    if count < 1 or (threads is not None and threads < 1):
        raise StudyError("workers and threads are at least 1")
    each = threads or max(1, cores // count)
    if ray is not None:
        from .on_ray import Cluster

        return Cluster(ray, target / "work", workers, each)
    return Local(target / "work", count, each)
