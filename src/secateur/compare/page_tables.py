"""Tables of a study that one can sort and filter: results by contender and target, all runs, and the protocol."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..report import values as v
from ..report.read import when_of
from .cells import target_key
from .leaders import Leaders
from .page_again import commands
from .page_data import Frame, show
from .page_words import changed, listed, many, standing
from .rows import Row
from .verdicts import Comparison


@dataclass(frozen=True)
class Column:
    """A column: its head, whether it holds numbers, and how a cell of it looks."""

    head: str
    number: bool = False
    look: str = ""


@dataclass
class Grid:
    """A table with a filter and a file: cells are (text, value to sort by and to save)."""

    name: str
    title: str
    columns: list[Column]
    rows: list[list[tuple[str, Any]]] = field(default_factory=list)

    def used(self) -> Grid:
        """Without columns in which nothing stands."""
        keep = [k for k in range(len(self.columns)) if any(row[k][0] not in (v.NONE, "") for row in self.rows)]
        return Grid(
            self.name, self.title, [self.columns[k] for k in keep], [[row[k] for k in keep] for row in self.rows]
        )


def _cell(value: float | None, text: Callable[[float], str]) -> tuple[str, Any]:
    return (v.NONE, None) if value is None else (text(value), value)


def results(
    frame: Frame,
    found: Mapping[str, Leaders],
    changes: Mapping[tuple[str, str], Comparison],
    second: Mapping[tuple[str, str], Comparison],
    name: str,
) -> Grid:
    """Every contender at every target, the baseline first."""
    heads = [
        Column("Method"), Column("Target"), Column("Runs", True), Column(frame.metric.capitalize(), True),
        Column("Interval"), Column("Against dense", True), Column("Which is"), Column("Pooled"),
        Column("Pooled says"), Column("At this target"),
        Column("Sparsity", True), Column("Non-zero", True), Column("Effective FLOPs", True),
        Column("Sparse bytes", True), Column("Speed-up", True), Column("Time", True), Column("Peak memory", True),
        Column("Samples", True), Column("Labels", True),
    ]  # fmt: skip
    grid = Grid(name, f"Results on {frame.subject}", heads)
    keys = [(r.label, r.target) for r in frame.rows if r.dense][:1]
    keys += [(label, target) for target in frame.targets for label in frame.labels if frame.runs(label, target)]
    for label, target in keys:
        runs = frame.runs(label, target)
        score, change = frame.scores.get((target, label)), changes.get((target, label))
        done, lost = (score.n, score.failures) if score is not None else (sum(r.done for r in runs), 0)
        low = score.low if score is not None else None
        high = score.high if score is not None else None
        interval = span(frame, low, high)
        moved = change.estimate if change is not None else None
        other = second.get((target, label))

        def figure(*path: str, of: tuple[str, str] = (label, target)) -> float | None:
            return frame.figure(of[0], of[1], *path)

        grid.rows.append(
            [
                (label, None),
                (target or v.NONE, None),
                (f"{done}" + (f" of {done + lost}" if lost else ""), done),
                _cell(score.value if score is not None else None, frame.show),
                (interval, None),
                (
                    changed(moved, frame.metric) if moved is not None else v.NONE,
                    moved.value if moved is not None else None,
                ),
                (change.text if change is not None else v.NONE, None),
                (changed(other.estimate, frame.metric) if other is not None else v.NONE, None),
                (other.text if other is not None else v.NONE, None),
                ("the baseline" if not target else standing(found.get(target), label), None),
                _cell(figure("sparsity"), v.percent),
                _cell(figure("nonzero"), v.short),
                _cell(figure("effective_flops"), v.short),
                _cell(figure("sparse_bytes"), v.size),
                _cell(figure("latency", "ratio"), lambda x: f"{x:.2f}×"),
                _cell(figure("cost", "seconds"), v.duration),
                _cell(figure("cost", "peak_memory"), v.size),
                _cell(figure("cost", "samples"), v.count),
                _cell(figure("cost", "labels"), v.count),
            ]
        )
    return grid.used()


def span(frame: Frame, low: float | None, high: float | None) -> str:
    """An interval in a cell of its own."""
    if low is None or high is None:
        return v.NONE
    first = show(frame.metric, low).removesuffix(f"{v.NBSP}%")
    return f"{first} to {show(frame.metric, high)}"


def all_runs(study: Mapping[str, Any], rows: Sequence[Row]) -> Grid:
    """Every run, with the command that makes it again."""
    heads = [
        Column("Subject"), Column("Method"), Column("Target"), Column("Seed", True), Column("Role"), Column("Status"),
        Column("Test", True), Column("Validation", True), Column("Sparsity", True), Column("Time", True),
        Column("Command", look="code wrap"), Column("Peak memory", True), Column("Epochs", True),
        Column("Digest", look="code"),
    ]  # fmt: skip
    grid = Grid("runs", "All runs", heads)
    for row, command in zip(rows, commands(study, rows), strict=True):
        grid.rows.append(
            [
                (row.subject, None),
                (row.label, None),
                (row.target or v.NONE, None),
                (str(row.seed), row.seed),
                (row.role if row.role != "final" else "", None),
                (row.status, None),
                _cell(row.score, lambda x, m=row.metric: show(m, x)),  # type: ignore[misc]
                _cell(row.figure("valid"), lambda x, m=row.metric: show(m, x)),  # type: ignore[misc]
                _cell(row.figure("sparsity"), v.percent),
                _cell(row.figure("cost", "seconds"), v.duration),
                (command, None),
                _cell(row.figure("cost", "peak_memory"), v.size),
                _cell(row.figure("cost", "epochs"), lambda x: f"{x:g}"),
                (row.digest, None),
            ]
        )
    return grid.used()


def protocol(study: Mapping[str, Any], rows: Sequence[Row]) -> list[tuple[str, str, bool]]:
    """What was asked, and under which conditions: (name, value, whether it is code)."""
    facts: list[tuple[str, str, bool]] = []

    def fact(name: str, value: Any, code: bool = False) -> None:
        if value is not None and str(value) != "":
            facts.append((name, str(value), code))

    final = [r for r in rows if r.role == "final"]
    fact("Question", study.get("question"))
    for subject in dict.fromkeys(r.subject for r in final):
        own = next(r for r in final if r.subject == subject)
        what = "a task, trained here" if own.kind == "task" else "a language model, trained before"
        fact("Subject", f"{subject}: {what}")
    asked = [
        str(m.get("label", m.get("method"))) if isinstance(m, Mapping) else str(m)
        for m in v.items(study.get("methods"))
    ]
    labels = list(dict.fromkeys([*asked, *(r.label for r in final if not r.dense)]))
    fact("Methods", f"{len(labels)}: {', '.join(labels)}" if labels else None)
    fact("Targets", ", ".join(sorted({r.target for r in final if r.target}, key=target_key)))
    fact("Seeds", ", ".join(map(str, sorted({r.seed for r in final}))))
    budget = study.get("budget")
    said = [f"{str(k).replace('_', ' ')} {x}" for k, x in budget.items()] if isinstance(budget, Mapping) else []
    spent = _varied(final, "protocol")
    fact("Budget, one for all", "; ".join(said) or None)
    for subject, each in spent.items():
        if sorted(each.split("; ")) == sorted(said):
            continue
        fact("Each run" if len(spent) == 1 else f"Each run on {subject}", each)
    fact("Calibration text", study.get("data"))
    fact("Held-out text", study.get("evaluation"))
    tuned = sum(r.role == "tune" for r in rows)
    fact(
        "Splits",
        "scores are on test data that no choice has seen; "
        + (f"knobs were chosen in {many(tuned, 'run')} on validation data" if tuned else "no knob was tuned"),
    )
    for subject in dict.fromkeys(r.subject for r in final):
        counts = {n for r in final if r.subject == subject and (n := r.figure("test_count")) is not None}
        size = f", {listed([v.count(n) for n in sorted(counts)])} samples or tokens" if counts else ""
        hashes = _hashes([r for r in final if r.subject == subject])
        if hashes:
            fact(f"Data of {subject}", f"SHA-256 {hashes}{size}", True)
    for name, value in _surroundings(final):
        fact(name, value)
    return facts


def _varied(rows: Sequence[Row], key: str) -> dict[str, str]:
    """Subject -> what a part of its results says; where runs differ, all values."""
    found: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        part = row.result.get(key)
        for name, value in part.items() if isinstance(part, Mapping) else ():
            values = found.setdefault(row.subject, {}).setdefault(str(name).replace("_", " "), [])
            if (text := f"{value:g}" if isinstance(value, float) else str(value)) not in values:
                values.append(text)
    return {
        s: "; ".join(f"{name} {listed(values[:6], 'or')}" for name, values in own.items()) for s, own in found.items()
    }


def _hashes(rows: Sequence[Row]) -> str:
    seen: dict[str, list[str]] = {}
    for row in rows:
        data = row.result.get("data")
        for split, digest in data.items() if isinstance(data, Mapping) else ():
            if digest and str(digest) not in seen.setdefault(str(split), []):
                seen[str(split)].append(str(digest))
    few = {k: x for k, x in seen.items() if x}
    return ", ".join(
        f"{split} {x[0][:16]}" if len(x) == 1 else f"{split} {len(x)} different, one a seed" if len(x) < 12
        else f"{split} {len(x)} different"
        for split, x in few.items()
    )  # fmt: skip


def _surroundings(rows: Sequence[Row]) -> list[tuple[str, str]]:
    machines: dict[str, None] = {}
    versions: dict[str, None] = {}
    threads: dict[str, None] = {}
    for row in rows:
        where = row.result.get("environment")
        if not isinstance(where, Mapping):
            continue
        machine = where.get("machine")
        if isinstance(machine, Mapping):
            parts = [
                f"{v.size(v.number(x))} of memory" if k == "memory" else f"{x} threads" if k == "threads" else str(x)
                for k, x in machine.items()
                if x is not None and x != ""
            ]
            machines.setdefault(", ".join(parts))
        known = where.get("versions")
        if isinstance(known, Mapping):
            versions.setdefault(", ".join(f"{k} {x}" for k, x in known.items()))
        if where.get("threads") is not None:
            threads.setdefault(str(where["threads"]))
    times = sorted(str(r.result["created"]) for r in rows if r.result.get("created"))
    total = sum(x for r in rows if (x := r.figure("cost", "seconds")) is not None)
    found = [(("Machine" if len(machines) == 1 else "One of the machines"), m) for m in machines]
    if threads:
        found.append(("Threads of a run", listed(list(threads), "or")))
    found += [("Versions", one) for one in versions]
    if times:
        span = when_of(times[0]) if times[0] == times[-1] else f"{when_of(times[0])} to {when_of(times[-1])}"
        found.append(("When", span))
    if total:
        found.append(("Computed in all", v.duration(total)))
    return found
