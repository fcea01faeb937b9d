"""The fastest way of computing each layer, such that no workload as a whole becomes slower."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from .candidates import Site, Table, zeros

#: A candidate must save this share of a layer's time; so must a second index, for it takes memory.
_GAIN = 0.03


@dataclasses.dataclass
class Choice:
    """What became of one layer.

    Attributes:
        name, shape, zeros: the layer, its matrix and the share of it that is zero.
        kind: of the values: ``dense`` where nothing was won.
        index: ``col``, ``bits``, ``col+bits`` or ``quad``; empty where dense.
        seconds: workload -> candidate -> seconds.
        reason: why.
    """

    name: str
    shape: tuple[int, int]
    zeros: float
    kind: str
    index: str
    seconds: dict[str, dict[str, float]]
    reason: str


@dataclasses.dataclass
class _Option:
    """One way of computing a layer: seconds in each workload."""

    kind: str
    index: str
    seconds: list[float]


def choose(
    found: Sequence[Site],
    table: Any,
    kinds: Sequence[str],
    cold: bool,
    workloads: int,
    progress: Callable[[int, int], None] | None = None,
    ways_of: Callable[..., tuple[Choice, list[_Option]]] | None = None,
) -> list[Choice]:
    """A choice for each site; ``ways_of`` says what there is to choose from, and reads the ``table``.

    Workloads count the same, however long they take: a prompt takes long, but each of its answer's tokens is waited
    for. A layer may lose in one workload what it wins in another, as long as the workload as a whole does not lose.
    """
    choices, options = [], []
    for done, site in enumerate(found):
        choice, ways = (ways_of or _options)(site, table, kinds, cold, workloads)
        choices.append(choice)
        options.append(ways)
        if progress is not None:
            progress(done + 1, len(found))
    dense = [sum(ways[0].seconds[w] for ways in options) or 1.0 for w in range(workloads)]
    taken = [min(ways, key=lambda o: _share(o, dense) * (1 + _GAIN * _second(o.index))) for ways in options]
    for k, (ways, best) in enumerate(zip(options, taken, strict=True)):
        if _share(best, dense) > (1 - _GAIN) * _share(ways[0], dense):
            taken[k] = ways[0]
    given_up: set[int] = set()
    while True:  # what is given up for one workload may be missed in another
        excess = [
            sum(own.seconds[w] - ways[0].seconds[w] for own, ways in zip(taken, options, strict=True))
            for w in range(workloads)
        ]
        slower = [w for w in range(workloads) if excess[w] > 1e-9 * dense[w]]
        if not slower:
            break
        w = slower[0]
        worst = max(range(len(taken)), key=lambda k: taken[k].seconds[w] - options[k][0].seconds[w])
        taken[worst] = options[worst][0]
        given_up.add(worst)
    for k, (choice, own, ways) in enumerate(zip(choices, taken, options, strict=True)):
        if own.kind != "dense":
            choice.kind, choice.index = own.kind, own.index
            choice.reason = f"{_share(ways[0], dense) / _share(own, dense):.2f} times as fast"
        elif not choice.reason:
            choice.reason = "it would make a workload slower" if k in given_up else "not faster without its zeros"
    return choices


def _second(index: str) -> bool:
    """Whether a layer keeps two of them."""
    return "+" in index or index == "quad"


def _share(option: _Option, dense: Sequence[float]) -> float:
    return sum(s / d for s, d in zip(option.seconds, dense, strict=True))


def _options(
    site: Site, table: Table, kinds: Sequence[str], cold: bool, workloads: int
) -> tuple[Choice, list[_Option]]:
    """What is known of a site, and its options; the first is dense."""
    weight = site.matrix()
    choice = Choice(site.name, (weight.shape[0], weight.shape[1]), zeros(weight), "dense", "", {}, site.reason)
    if not choice.reason and not bool(weight.isfinite().all()):
        choice.reason = "it holds values that are not finite"
    if choice.reason:
        return choice, [_Option("dense", "", [0.0] * workloads)]
    rows = {shape: table.seconds(site, shape, kinds, cold) for _, shape in site.inputs}
    choice.seconds = {"x".join(map(str, shape)): row for shape, row in rows.items()}

    def total(name: Callable[[dict[str, float]], str]) -> list[float]:
        spent = [0.0] * workloads
        for (w, shape), count in site.inputs.items():
            spent[w] += count * rows[shape].get(name(rows[shape]), float("inf"))
        return spent

    found = [_Option("dense", "", total(lambda _: "dense"))]
    for kind in kinds:
        for index in ("col", "bits", "col+bits", "quad", "dense"):
            found.append(_Option(kind, index, total(lambda row, k=kind, i=index: f"{k}.{_read(row, k, i)}")))  # type: ignore[misc]
    return choice, found


def _read(row: dict[str, float], kind: str, index: str) -> str:
    """Which index the operator reads: bits wherever there are few tokens and they are there, as beside quads."""
    if index == "dense":
        return index
    return "bits" if ("bits" in index or index == "quad") and f"{kind}.bits" in row else index.removesuffix("+bits")
