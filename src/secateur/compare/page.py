"""The report of a study: one HTML file that tells what was asked, what came out, and how sure that is."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Template

from ..report import values as v
from ..report.read import when_of
from ..report.reproduce import embed, yaml_of
from ..report.shell import environment, put, shell
from .ablation import ablations, grids
from .answers import Answer
from .leaders import Leaders
from .page_again import recipes, task_name
from .page_answers import contrasts
from .page_data import Frame, frames
from .page_groups import seeds_table
from .page_layers import gone, panels
from .page_plots import tradeoffs
from .page_ranks import ranks
from .page_second import on_calibration, on_pooled, pooled
from .page_tables import all_runs, protocol, results
from .page_words import against_dense, answers_table, failures, headline, leaders_of, listed, many
from .rows import Row

_HERE = Path(__file__).parent
#: Parts of a result that a page does not carry: they would be most of it.
_HEAVY = ("layers", "sketch", "environment", "data")


def render(
    study: Mapping[str, Any],
    rows: Sequence[Row],
    answers: Sequence[Answer] = (),
    *,
    left_out: Mapping[tuple[str, str, str], str] | None = None,
) -> str:
    """The report as HTML text.

    Args:
        study: the protocol as plain data, as `Study.to_dict` gives it.
        rows: the runs, in any order; those that failed too.
        answers: of contrasts.
        left_out: (subject, label, target) -> why the study does not try it.
    """
    rows = sorted(rows, key=lambda r: (r.subject, not r.dense, r.label, r.target, r.role, r.seed))
    order = [_label(m) for m in v.items(study.get("methods"))]
    found = frames(rows, order, [*map(task_name, v.items(study.get("tasks"))), *map(str, v.items(study.get("models")))])
    best = [leaders_of(frame) for frame in found]
    said, clauses = headline(found, best)
    name = str(study.get("study") or study.get("name") or "study")
    left_out = left_out or {}
    failed, (lacking, holes) = failures(rows), missing(study, found, left_out)
    ranked = ranks(found)
    steps = grids(ablations(study, rows))
    contents = [("h-contrasts", "The answer")] if answers else []
    contents += [("h-answer", "Method by method" if answers else "The answer")]
    contents += [("h-asked", "What was asked")]
    contents += [(f"h-subject-{k}", f"Results on {frame.short}") for k, frame in enumerate(found)]
    contents += [("h-steps", "What each step brings")] if steps else []
    contents += [("h-ranks", "Ranks")] if ranked else []
    contents += [("h-failed", "What failed or is missing")] if failed or holes or left_out else []
    contents += [("h-runs", "All runs"), ("h-recipes", "Recipes"), ("h-study", "The study file")]
    if not rows:
        contents = [one for one in contents if one[0] != "h-recipes"]
    return _template().render(
        title=f"{name} · secateur",
        **shell(
            script=(_HERE / "page.js").read_text(encoding="utf-8"),
            style=(_HERE / "page.css").read_text(encoding="utf-8"),
        ),
        data=embed(record(study, rows)),
        name=name,
        headline=next((a.question for a in answers if a.question), said),
        subtitle=_subtitle(found),
        tiles=_tiles(rows, found),
        contents=contents,
        clauses=clauses or ([said] if answers else []),
        subjects=[_subject(k, frame, own) for k, (frame, own) in enumerate(zip(found, best, strict=True))],
        reading=_reading(found, best),
        contrasts=contrasts(answers),
        protocol=protocol(study, rows),
        steps=steps,
        ranks=ranked,
        failures=failed,
        missing=holes,
        unrun="Not run yet:" if left_out else "Not run, because the study leaves them out or has not come to them:",
        unfinished=f"{many(lacking, 'run')} of this study {'is' if lacking == 1 else 'are'} not there: what follows may"
        " change with them."
        if lacking and rows
        else "",
        left_out=_left_out(left_out),
        again=_again(rows),
        runs=all_runs(study, rows),
        recipes=recipes(rows),
        study_file=yaml_of(dict(study)) if study else "",
        version=_version(rows),
        created=when_of(max((str(r.result["created"]) for r in rows if r.result.get("created")), default=None)),
    )


def write_study_report(
    path: Path,
    study: Mapping[str, Any],
    rows: Sequence[Row],
    answers: Sequence[Answer] = (),
    *,
    left_out: Mapping[tuple[str, str, str], str] | None = None,
) -> Path:
    """Write the report beside ``path`` first, then put it in place in one step; returns the path."""
    return put(path, render(study, rows, answers, left_out=left_out))


@functools.cache
def _template() -> Template:
    return environment(_HERE).get_template("page.html.j2")


def _label(method: Any) -> str:
    return str(method.get("label", method.get("method", ""))) if isinstance(method, Mapping) else str(method)


def record(study: Mapping[str, Any], rows: Sequence[Row]) -> Any:
    """Study and rows for JSON: figures by dotted names, in columns, without what would be most of the page."""
    flat = []
    for row in rows:
        data: dict[str, Any] = {k: x for k, x in vars(row).items() if k not in ("recipe", "result")}
        for key, value in row.result.items():
            if key in _HEAVY:
                continue
            if isinstance(value, Mapping) and key != "groups":
                data |= {f"{key}.{name}": x for name, x in value.items()}
            else:
                data[key] = value
        flat.append(data)
    columns = list(dict.fromkeys(key for data in flat for key in data))
    cells = [[data.get(key) for key in columns] for data in flat]
    return v.plain({"study": dict(study), "left_out": ["recipe", *_HEAVY], "columns": columns, "rows": cells})


def _subject(k: int, frame: Frame, best: Mapping[str, Leaders]) -> dict[str, Any]:
    changes, second = against_dense(frame), pooled(frame)
    name = f"subject-{k}"
    fine = frame.problem is None
    return {
        "id": name,
        "name": frame.subject,
        "short": frame.short,
        "metric": frame.metric,
        "way": "higher" if frame.up else "lower",
        "problem": frame.problem,
        "notes": [*_notes(frame), *on_calibration(frame), *on_pooled(changes, second)],
        "answers": answers_table(frame, best, changes),
        "plots": tradeoffs(frame, name) if fine else [],
        "results": results(frame, best, changes, second, f"{name}-results"),
        "panels": panels(frame, name) if fine else [],
        "seeds": seeds_table(frame) if fine else None,
    }


def _notes(frame: Frame) -> list[str]:
    """What the figures themselves give reason to say."""
    said = []
    if frame.targets and frame.dense is None:
        said.append("The dense model was not measured, so what pruning costs is not known.")
    return [*said, *gone(frame)]


def _reading(found: Sequence[Frame], best: Sequence[Mapping[str, Leaders]]) -> list[str]:
    tables = [one for own in best for one in own.values()]
    if not tables:
        return []
    level = v.percent(tables[0].level)
    return [
        f"Brackets are {level} intervals of the mean over seeds. They say how the mean would move with other seeds, not"
        " with another data set or another model.",
        "“Not shown to be worse” is not “as good”: with few seeds, small differences cannot be shown. At each target"
        f" alone, with a probability of at least {level}, the method whose true mean is best is the one named first, or"
        " one of those not shown to be worse, or one of which nothing can be said.",
        "Against dense is a paired difference over seeds"
        + (" (perplexities: a ratio)." if any(f.metric == "perplexity" for f in found) else "."),
    ]


def _subtitle(found: Sequence[Frame]) -> list[str]:
    if not found:
        return []
    labels = dict.fromkeys(label for frame in found for label in frame.labels)
    targets = dict.fromkeys(t for frame in found for t in frame.targets)
    seeds = {r.seed for frame in found for r in frame.rows}
    return [
        listed([frame.subject for frame in found]),
        f"{many(len(labels), 'method')} at {many(len(targets), 'target')} with {many(len(seeds), 'seed')}",
    ]


def _tiles(rows: Sequence[Row], found: Sequence[Frame]) -> list[dict[str, str]]:
    if not rows:
        return []
    failed = sum(not r.done for r in rows)
    tiles = [{"name": "Runs", "value": v.count(len(rows)), "detail": f"{failed} failed" if failed else "none failed"}]
    for frame in found[:2]:
        if (dense := frame.dense) is not None:
            what = frame.metric.capitalize() + (f" on {frame.short}" if len(found) > 1 else "")
            way = "higher" if frame.up else "lower"
            tiles.append({"name": f"Dense: {what}", "value": frame.show(dense.value), "detail": f"{way} is better"})
    seconds = sum(x for r in rows if (x := r.figure("cost", "seconds")) is not None)
    if seconds:
        tiles.append({"name": "Computed in all", "value": v.duration(seconds), "detail": ""})
    return tiles


def missing(
    study: Mapping[str, Any], found: Sequence[Frame], left_out: Mapping[tuple[str, str, str], str]
) -> tuple[int, list[str]]:
    """How many runs the study has that are not there, and which, by subject and method."""
    labels = [_label(m) for m in v.items(study.get("methods"))]
    targets = [str(t) for t in v.items(study.get("targets"))]
    seeds = [s for s in v.items(study.get("seeds")) if isinstance(s, int)]
    own = {
        _label(m): [str(t) for t in v.items(m.get("targets"))]
        for m in v.items(study.get("methods"))
        if isinstance(m, Mapping)
    }
    total, said = 0, []
    for frame in found:
        for label in dict.fromkeys([*labels, *frame.labels]):
            lacks = []
            for target in own.get(label) or dict.fromkeys([*targets, *frame.targets]):
                there = {r.seed for r in frame.runs(label, target)}
                wanted = sorted(set(seeds or {r.seed for r in frame.rows}) - there)
                if not wanted or (frame.subject, label, target) in left_out:
                    continue
                total += len(wanted)
                noun = "seed" if len(wanted) == 1 else "seeds"
                some = f" with {noun} {listed([str(s) for s in wanted])}" if there else ""
                lacks.append(f"target {target}{some}")
            if lacks:
                said.append(f"{label} on {frame.short}: {'; '.join(lacks)}")
    return total, said


def _left_out(given: Mapping[tuple[str, str, str], str]) -> list[tuple[str, str]]:
    """Each reason once, with where it holds."""
    said: dict[str, dict[str, list[str]]] = {}
    for (subject, label, target), why in given.items():
        said.setdefault(why, {}).setdefault(f"{label} on {subject}", []).append(target)
    return [(why, "; ".join(f"{who} at {listed(at)}" for who, at in own.items())) for why, own in said.items()]


def _again(rows: Sequence[Row]) -> str:
    text = "Its command makes one run again, outside the study." if rows else "There are no runs yet."
    if any(r.kind == "model" for r in rows):
        text += (
            " Of a language model it prunes and measures in the same way; the study itself calibrates each seed on"
            " other windows of the text, which secateur compare does."
        )
    return text


def _version(rows: Sequence[Row]) -> str:
    found = {
        str(version) for r in rows if (version := v.dig(r.result, "environment", "versions", "secateur")) is not None
    }
    return listed(sorted(found), "or")
