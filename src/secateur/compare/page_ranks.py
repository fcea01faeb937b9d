"""Ranks over subjects and targets, drawn on a line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import DataError
from ..report import scatter
from ..report import values as v
from .page_data import Frame
from .page_words import capital, listed, many
from .ranks import Ranks, rank


def ranks(found: Sequence[Frame]) -> list[dict[str, Any]]:
    """Ranks by target, and by subject where there are several; none where nothing can be ranked."""
    frames = [frame for frame in found if not frame.problem and frame.labels]
    slots = frames[0].slots if frames else {}
    rows = [r for frame in frames for r in frame.rows]
    made = []
    if len(frames) > 1:
        made.append(_shown(rows, "subject", "By subject, ranks averaged over targets", slots))
    made.append(_shown(rows, "target", "By subject and target" if len(frames) > 1 else "By target", slots))
    return [one for one in made if one is not None]


def _shown(rows: Sequence[Any], by: Any, title: str, slots: Mapping[str, int]) -> dict[str, Any] | None:
    try:
        one = rank(rows, by=by)
    except (DataError, ValueError):
        return None
    if len(one.labels) < 2:
        return None
    spoken = "; ".join(f"{label} {mean:.2f}" for label, mean in zip(one.labels, one.means, strict=True))
    chart = scatter.ranking(
        [(label, slots[label], mean) for label, mean in zip(one.labels, one.means, strict=True)],
        one.groups,
        distance=one.critical if one.shown else None,
        alt=f"Mean ranks, 1 is best. {spoken}.",
    )
    return {"title": title, "chart": chart, "caption": _caption(one, by), "file": f"ranks-by-{by}"}


def _caption(one: Ranks, by: str) -> str:
    said = [f"{one.text if one.text.startswith(one.labels[0]) else capital(one.text)}."]
    if one.f_p is not None:
        said.append(f"Friedman test: p {_p(one.f_p)} over {many(len(one.blocks), 'block')}.")
    if one.groups and one.shown:
        said.append(f"A bar joins methods whose ranks are not shown to differ (Nemenyi, {v.percent(one.level)}).")
    if by == "target":
        said.append("Targets of one subject depend on each other, so this p is too small: read it as a description.")
    if one.left_out:
        said.append(f"Left out, because some of their runs are missing: {listed(list(one.left_out))}.")
    return " ".join(said)


def _p(value: float) -> str:
    return "below 0.001" if value < 0.001 else f"= {value:.3f}"
