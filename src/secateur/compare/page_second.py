"""What stands beside the intervals of a page: a second opinion on them, and where they are narrower than they look."""

from __future__ import annotations

import math
from collections.abc import Mapping

from ..errors import DataError
from ..report import values as v
from .cells import DENSE
from .page_data import Frame
from .page_words import many
from .verdicts import Comparison, Rules, against

#: Share of a text that calibration draws beyond which its intervals are a tenth too narrow for other text.
NEAR_ALL = 0.2


def pooled(frame: Frame) -> dict[tuple[str, str], Comparison]:
    """(target, label) -> what pruning changed, by one spread of all methods of the target (Dunnett)."""
    if frame.problem or not any(r.label == DENSE for r in frame.rows):
        return {}
    try:
        found = against(frame.rows, rules=Rules(variance="pooled"))
    except DataError:
        return {}
    return {(c.target, c.left): c for c in found if c.estimate.low is not None}


def on_pooled(changes: Mapping[tuple[str, str], Comparison], second: Mapping[tuple[str, str], Comparison]) -> list[str]:
    """When the second opinion can be trusted, with what speaks for that here."""
    if not second:
        return []
    said = (
        "“Pooled” is a second opinion on the difference from dense: one spread for all methods of a target in place of"
        " each method's own. It shows more with few seeds, and can be trusted only where methods vary alike from seed"
        " to seed: "
    )
    spreads: dict[str, list[float]] = {}
    for (target, label), change in changes.items():
        if (target, label) in second and change.estimate.spread is not None:
            spreads.setdefault(target, []).append(change.estimate.spread)
    several = [own for own in spreads.values() if len(own) > 1]
    if not several:
        return [said + "of which too little is known here."]
    if still := sum(own.count(0.0) for own in several):
        return [said + f"here {many(still, 'result does', 'results do')} not vary at all, so go by each method's own."]
    ratio = max(max(own) / min(own) for own in several)
    return [
        said + f"here the most variable method of a target varies up to {v.measure(ratio)} times as much as the least."
    ]


def on_calibration(frame: Frame) -> list[str]:
    """Draws of calibration windows that are most of their text are not independent of each other."""
    drawn = [
        (int(n), int(of))
        for r in frame.rows
        if (n := r.figure("calibration", "windows")) is not None and (of := r.figure("calibration", "of"))
    ]
    if not drawn:
        return []
    windows, text = max(drawn, key=lambda x: x[0] / x[1])
    share = windows / text
    if share <= NEAR_ALL:
        return []
    begun = f"Each seed calibrates on {windows:,} of the {text:,} windows that the text has"
    if share > 0.99:
        return [f"{begun}: all seeds see the same text, and intervals say nothing of other text."]
    return [
        f"{begun}, so two seeds share {v.percent(share)} of theirs and are not independent: for other text, intervals"
        f" should be about {1 / math.sqrt(1 - share):.1f} times as wide."
    ]
