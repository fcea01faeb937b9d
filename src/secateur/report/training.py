"""What a report says of a run that trained a task: its metric, and its curves."""

from __future__ import annotations

from secateur.report import charts
from secateur.report import values as v
from secateur.report.read import Record

_POINTS = 60  # of a curve; more would be a band


def metric_of(run: Record, when: str) -> float | None:
    """The task's metric, ``before`` or ``after``."""
    return v.figure(run, when, "metric", "value")


def _split(run: Record) -> str:
    """What the metric was measured on."""
    return "validation" if v.dig(run, "score") == "valid" else "test"


def headline(run: Record, who: str) -> str | None:
    """The answer in one sentence; None where the run trained no task."""
    name, after = v.dig(run, "task", "metric"), metric_of(run, "after")
    if name is None or after is None:
        return None
    task, before = v.dig(run, "task", "name"), metric_of(run, "before")
    where = f"{who} on task {task}: {name} on the {_split(run)} data {v.small(after)}"
    if before is None:
        return f"{where}."
    return f"{where}, against {v.small(before)} of the dense model that it was made of."


def tile(run: Record) -> dict[str, str] | None:
    """The figure that a reader came for; None where the run trained no task."""
    name, after = v.dig(run, "task", "metric"), metric_of(run, "after")
    if name is None or after is None:
        return None
    way = "higher" if v.dig(run, "task", "higher_is_better") else "lower"
    before = metric_of(run, "before")
    dense = f"{v.small(before)} dense; " if before is not None else ""
    tag = f"{str(name).capitalize()}, {_split(run)}"
    return {"name": tag, "value": v.small(after), "detail": f"{dense}{way} is better"}


def rows(run: Record) -> list[tuple[str, str, str, str]]:
    """The row of the before and after table."""
    tag, after = v.dig(run, "task", "metric"), metric_of(run, "after")
    if tag is None or after is None:
        return []
    before = metric_of(run, "before")
    return [(f"{str(tag).capitalize()}, {_split(run)}", v.small(before), v.small(after), v.change(before, after))]


def plots(run: Record) -> list[dict[str, object]]:
    """Metric, loss and sparsity by epoch, over all legs of the run."""
    curve = v.maps(run.get("curves"))
    made = []
    metric = str(v.dig(run, "task", "metric") or "metric")
    slots = [str(k + 1) for k in range(len(curve))]
    step = max(1, -(-len(curve) // _POINTS))
    for key, label in (("metric", f"{metric}, validation"), ("loss", "training loss"), ("sparsity", "sparsity")):
        legs: dict[str, charts.Series] = {}
        for k, row in enumerate(curve):
            value = v.figure(row, key)
            if value is not None and (k % step == 0 or k == len(curve) - 1):
                leg = str(row.get("leg") or "training").replace("|", "/")
                tip = f"{leg}, epoch {v.small(v.figure(row, 'epoch'))}|{label} {v.small(value)}"
                legs.setdefault(leg, charts.Series(leg)).points.append(charts.Point(k, value, tip))
        values = [p.y for s in legs.values() for p in s.points]
        if not values or (key == "sparsity" and max(values) == 0):
            continue
        if len(legs) > charts.COLORS:  # rounds beyond number: one line is enough
            one = charts.Series("all rounds")
            one.points = [p for s in legs.values() for p in s.points]
            legs = {"": one}
        chart = charts.lines(
            list(legs.values()), y_label=label.capitalize(), x_label="Epochs of the whole run", slots=slots,
            alt=f"{label} by epoch, from {v.small(values[0])} to {v.small(values[-1])}.",
            bounds=charts.padded(values),
        )  # fmt: skip
        if chart is not None:
            made.append({"id": f"curve-{key}", "title": label.capitalize(), "chart": chart, "caption": ""})
    return made
