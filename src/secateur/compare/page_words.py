"""The answer of a study in words and in a table: who leads, who is not shown to be worse, what failed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import DataError
from ..report import values as v
from .cells import DENSE
from .leaders import Leaders, leaders
from .page_data import Frame
from .rows import Row
from .statistics import Estimate
from .verdicts import Comparison, against


def listed(words: Sequence[str], last: str = "and") -> str:
    """Words as a sentence has them.

    >>> listed(["a", "b", "c"])
    'a, b and c'
    """
    if len(words) < 2:
        return "".join(words)
    return f"{', '.join(words[:-1])} {last} {words[-1]}"


def many(count: int, one: str, more: str = "") -> str:
    """A number with its noun.

    >>> many(1, "run"), many(3, "run")
    ('1 run', '3 runs')
    """
    return f"{count:,} {one if count == 1 else more or one + 's'}"


def leaders_of(frame: Frame) -> dict[str, Leaders]:
    """Target -> who may be the best there."""
    if frame.problem or not frame.targets:
        return {}
    found = {one.target: one for one in leaders([r for r in frame.rows if not r.dense])}
    return {t: found[t] for t in frame.targets if t in found}


def against_dense(frame: Frame) -> dict[tuple[str, str], Comparison]:
    """(target, label) -> what pruning changed, where the dense model was measured."""
    if frame.problem or not any(r.label == DENSE for r in frame.rows):
        return {}
    try:
        return {(c.target, c.left): c for c in against(frame.rows)}
    except DataError:
        return {}


def changed(found: Estimate, metric: str) -> str:
    """A paired comparison: points of accuracy, times of a perplexity, else a plain difference.

    >>> changed(Estimate(-0.021, -0.03, -0.01, 0.95, 3), "accuracy")
    '−2.10\\xa0points [−3.00,\\xa0−1.00]'
    """
    if found.value is None:
        return v.NONE
    if found.scale == "ratio":
        text = v.ratio(1.0, found.value)
        bare = found.low is None or found.high is None or found.low == found.high
        return text if bare else f"{text} {ratio_span(found.low or 0.0, found.high or 0.0)}"
    times, unit = (100.0, f"{v.NBSP}points") if metric == "accuracy" else (1.0, "")
    text = signed(times * found.value, metric) + unit
    if found.low is None or found.high is None or found.low == found.high:
        return text
    return f"{text} [{signed(times * found.low, metric)},{v.NBSP}{signed(times * found.high, metric)}]"


def ratio_span(low: float, high: float) -> str:
    """An interval of a ratio."""
    return f"[{v.ratio(1.0, low).removesuffix('×')},{v.NBSP}{v.ratio(1.0, high).removesuffix('×')}]"


def signed(value: float, metric: str) -> str:
    """A difference with its sign."""
    text = f"{abs(value):.2f}" if metric == "accuracy" else f"{abs(value):.3g}"
    return text if float(text) == 0 else ("−" if value < 0 else "+") + text


def named_best(one: Leaders) -> str | None:
    """The best mean, where it is the best of several."""
    return one.leader if len(one.members) + len(one.beaten) > 1 else None


def clause(frame: Frame, found: Mapping[str, Leaders]) -> str:
    """What came out on one subject, in one sentence without its full stop."""
    named = {t: one.leader for t, one in found.items() if named_best(one) is not None}
    where = f"on {frame.short}"
    if frame.problem:
        return f"{where} the runs cannot be compared: {frame.problem}"
    if not named:
        own = [r for r in frame.rows if not r.dense]
        why = (
            "none has run" if not own else "too few runs are there" if any(r.done for r in own) else "every run failed"
        )
        return f"{where} no method can be named: {why}"
    clear = [t for t in named if len(found[t].members) == 1 and found[t].beaten]
    if len(set(named.values())) == 1:
        leader = next(iter(named.values()))
        at = "at every target" if len(named) > 1 and len(named) == len(frame.targets) else f"at {listed(list(named))}"
        said = f"{where} {leader} has the best mean {at}"
        if len(clear) == len(named):
            return f"{said}, and is shown to be better than every other method that ran there"
        if clear:
            return f"{said}; it is shown to be better than every other method at {listed(clear)} alone"
        return f"{said}, and is not shown to be better than all others at any"
    who: dict[str, list[str]] = {}
    for target, leader in named.items():
        who.setdefault(str(leader), []).append(target)
    best = listed([f"{leader} at {listed(targets)}" for leader, targets in who.items()])
    tail = (
        f"; shown to be better than all others only at {listed(clear)}"
        if clear
        else "; none is shown to be better than all others"
    )
    return f"{where} the best mean is that of {best}{tail}"


def headline(frames: Sequence[Frame], found: Sequence[Mapping[str, Leaders]]) -> tuple[str, list[str]]:
    """The answer in one sentence, and one sentence a subject where there are several."""
    if not frames:
        return "Nothing has been run yet.", []
    clauses = [clause(frame, own) for frame, own in zip(frames, found, strict=True)]
    whole = [capital(c) + "." for c in clauses]
    if len(frames) == 1:
        return whole[0], []
    tables = [best for own in found for one in own.values() if (best := named_best(one)) is not None]
    if not tables:
        return "No method can be named on any subject.", whole
    counts = sorted({label: tables.count(label) for label in tables}.items(), key=lambda x: (-x[1], x[0]))
    top = [label for label, n in counts if n == counts[0][1]]
    each = "each " if len(top) > 1 else ""
    has = "have" if len(top) > 1 else "has"
    said = (
        f"{listed(top)} {each}{has} the best mean in {counts[0][1]} of {len(tables)} tables of a subject and a target."
    )
    return said, whole


def capital(text: str) -> str:
    """The first letter large."""
    return text[:1].upper() + text[1:]


def answers_table(
    frame: Frame, found: Mapping[str, Leaders], changes: Mapping[tuple[str, str], Comparison]
) -> list[dict[str, Any]]:
    """One line a target: the best mean, those not shown to be worse, those that are, and those not known of."""
    lines = []
    for target in frame.targets:
        one = found.get(target)
        if one is None:
            continue
        best = one.leader
        change = changes.get((target, best)) if best else None
        lines.append(
            {
                "target": target,
                "leader": best,
                "score": frame.interval(frame.score(best, target)) if best else v.NONE,
                "change": changed(change.estimate, frame.metric) if change else v.NONE,
                "only": best is not None and named_best(one) is None,
                "alone": len(one.members) == 1 and bool(one.beaten),
                "members": list(one.members[1:]),
                "beaten": [
                    {"label": b.label, "why": f"{b.by} is ahead by {_ahead(b.estimate, frame)}"} for b in one.beaten
                ],
                "open": [{"label": label, "why": why} for label, why in one.open.items()],
            }
        )
    return lines


def _ahead(found: Estimate, frame: Frame) -> str:
    return changed(found, frame.metric)


def standing(one: Leaders | None, label: str) -> str:
    """What can be said of a method at a target."""
    if one is None:
        return v.NONE
    if label == one.leader:
        return "nothing to compare with" if named_best(one) is None else "best mean" if len(one.members) > 1 else "best"
    if label in one.members:
        return "not shown to be worse"
    if any(b.label == label for b in one.beaten):
        return "shown to be worse"
    return one.open.get(label, v.NONE)


def failures(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Runs that failed, or whose score is not a finite number, by reason."""
    said: dict[tuple[str, str, str, str], list[int]] = {}
    for row in rows:
        reason = None
        if not row.done:
            reason = row.reason or "no reason was recorded"
        elif row.role == "final" and row.score is None:
            raw = row.result.get("test")
            reason = "no score" if raw is None else f"the score is not a finite number ({raw})"
        if reason is not None:
            said.setdefault((row.subject, row.label, row.target, reason), []).append(row.seed)
    return [
        {
            "subject": s,
            "label": label,
            "target": t or v.NONE,
            "seeds": ", ".join(map(str, sorted(seeds))),
            "reason": why,
        }
        for (s, label, t, why), seeds in sorted(said.items())
    ]
