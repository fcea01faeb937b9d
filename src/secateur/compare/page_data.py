"""What a page shows of one subject: its rows by contender and target, and how its figures are written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from ..errors import DataError
from ..report import values as v
from .cells import Cell, cells, target_key
from .rows import Row
from .statistics import Estimate, mean


@dataclass
class Frame:
    """The final runs of one subject.

    Attributes:
        rows: the runs.
        labels: the contenders, in the study's order; ``slots`` has the colour and shape of each on the whole page.
        targets: as a reader expects them, from little to much.
        scores: (target, label) -> mean with its interval; the baseline stands under the empty target.
        short: the subject without its sizes, where no other has that name.
        problem: why the scores cannot be put together, in one sentence.
    """

    subject: str
    kind: str
    rows: list[Row]
    labels: list[str]
    slots: Mapping[str, int]
    targets: list[str]
    metric: str
    up: bool
    cells: dict[tuple[str, str], Cell] = field(default_factory=dict)
    scores: dict[tuple[str, str], Estimate] = field(default_factory=dict)
    problem: str | None = None
    short: str = ""

    def runs(self, label: str, target: str) -> list[Row]:
        return [r for r in self.rows if r.label == label and r.target == target]

    def score(self, label: str, target: str) -> Estimate | None:
        """The mean score; None where nothing was measured."""
        found = self.scores.get((target, label))
        return found if found is not None and found.value is not None else None

    @property
    def dense(self) -> Estimate | None:
        return next((e for (t, _), e in self.scores.items() if not t and e.value is not None), None)

    def figure(self, label: str, target: str, *path: str) -> float | None:
        """The mean of a figure over the runs that have it."""
        known = [x for r in self.runs(label, target) if r.done and (x := r.figure(*path)) is not None]
        return fmean(known) if known else None

    def show(self, value: float | None) -> str:
        """A score as a person reads it."""
        return show(self.metric, value)

    def interval(self, found: Estimate | None, *, bare: bool = False) -> str:
        """A score with its interval; without one it says how many runs there are."""
        if found is None or found.value is None:
            return v.NONE
        if found.low is not None and found.low == found.high:
            return f"{self.show(found.value)}, the same at every seed"
        if found.low is None or found.high is None:
            return self.show(found.value) + ("" if bare else f" (n{v.NBSP}={v.NBSP}{found.n}, no interval)")
        return f"{self.show(found.value)} {span(self.metric, found.low, found.high)}"


def show(metric: str, value: float | None) -> str:
    """A score as a person reads it: accuracies as percentages with two decimals.

    >>> show("accuracy", 0.91234), show("perplexity", 14.237)
    ('91.23\\xa0%', '14.24')
    """
    if value is None:
        return v.NONE
    if metric == "accuracy":
        return f"{100 * value:.2f}{v.NBSP}%"
    if 10 <= abs(value) < 100:
        return f"{value:.2f}"
    return v.measure(value) if abs(value) >= 100 else f"{value:.4g}"


def span(metric: str, low: float, high: float) -> str:
    """An interval: ``[90.12, 92.30]``, in the units of its score."""
    first, last = (show(metric, x).removesuffix(f"{v.NBSP}%") for x in (low, high))
    return f"[{first},{v.NBSP}{last}]"


def frames(rows: Sequence[Row], order: Sequence[str] = (), subjects: Sequence[str] = ()) -> list[Frame]:
    """One frame a subject; contenders in the study's order where it says one, else as the rows come."""
    final = [r for r in rows if r.role == "final"]
    known = list(dict.fromkeys([*order, *(r.label for r in final if not r.dense)]))
    slots = {label: k for k, label in enumerate(known)}
    found = []
    names = dict.fromkeys(r.subject for r in final)
    for subject in sorted(names, key=lambda s: (subjects.index(s) if s in subjects else len(subjects), s)):
        own = [r for r in final if r.subject == subject]
        present = {r.label for r in own if not r.dense}
        about = next((r for r in own if r.done and r.metric), None)
        frame = Frame(
            subject=subject,
            kind=own[0].kind,
            rows=own,
            labels=[label for label in known if label in present],
            slots=slots,
            targets=sorted({r.target for r in own if not r.dense}, key=target_key),
            metric=about.metric if about else "score",
            up=about.higher_is_better if about else True,
            short=short if [s.split(" (")[0] for s in names].count(short := subject.split(" (")[0]) == 1 else subject,
        )
        try:
            table = cells(own)
        except DataError as error:
            frame.problem = str(error)
        else:
            frame.cells = {(t, label): cell for (_, t, label), cell in table.items()}
            frame.scores = {
                key: mean(list(cell.scores.values()), scale=cell.scale) for key, cell in frame.cells.items()
            }
        found.append(frame)
    return found
