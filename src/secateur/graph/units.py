"""What can be removed together: units, and the families in which they compete."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from .labels import Array
from .trace import Slot, Trace


@dataclass(frozen=True, eq=False)
class Unit:
    """A smallest set of positions that can only go together.

    Attributes:
        gone: the labels that go with it.
        places: slot number -> positions along the slot's axis.
    """

    gone: frozenset[int]
    places: dict[int, Array]


@dataclass(eq=False)
class Family:
    """Units with equal footprint, which compete with each other: a pool.

    Attributes:
        name: where its first weight lies, which axis of it, and how many positions a unit takes there: the rows of
            a head are ``q_proj.weight:0 x64``.
        units: what may go.
        slots: slot numbers that every unit touches.
        multiple: what the number of units that stay is a multiple of, besides what the user asks for.
    """

    name: str
    units: list[Unit]
    slots: tuple[int, ...]
    multiple: int = 1

    def __len__(self) -> int:
        return len(self.units)

    def places(self, slot: int) -> Array:
        """``(units, positions of each)`` along a slot's axis."""
        return np.stack([unit.places[slot] for unit in self.units])

    @property
    def kind(self) -> str:
        """What families of the same place in other blocks share: the name without numbers, and the length."""
        return kind_of(self.name, len(self))


def kind_of(name: str, units: int) -> str:
    """A family's name without the numbers of its path, and its length."""
    path, colon, place = name.rpartition(":")
    return f"{re.sub(r'(?<![a-zA-Z])[0-9]+', '#', path)}{colon}{place} {units}"


@dataclass(eq=False)
class Dependencies:
    """All families of a traced model, and what is frozen.

    Attributes:
        families: pools of units.
        frozen: ``(name of a tensor, axis) -> reason`` for axes of parameters of which nothing can go.
    """

    trace: Trace
    families: list[Family]
    frozen: dict[tuple[str, int], str]

    @property
    def slots(self) -> list[Slot]:
        return self.trace.slots

    @cached_property
    def roots(self) -> list[Array]:
        """The class of each position of each slot."""
        return [self.trace.labels.roots(slot.labels) for slot in self.slots]

    def kept(self, gone: Iterable[int]) -> dict[int, Array]:
        """Slot number -> positions that stay, for every slot that loses some."""
        mask = self.mask(gone)
        found = {}
        for i, roots in enumerate(self.roots):
            lost = mask[roots]
            if lost.any():
                found[i] = np.flatnonzero(~lost)
        return found

    def mask(self, gone: Iterable[int]) -> NDArray[np.bool_]:
        """Whether each label is one of these."""
        mask = np.zeros(len(self.trace.labels), dtype=bool)
        mask[np.fromiter(gone, dtype=np.int64)] = True
        return mask

    @cached_property
    def _seen(self) -> dict[str, list[Array]]:
        """The different axes that operations in each module's own forward met, as classes."""
        found: dict[str, list[Array]] = {}
        for name, axes in self.trace.seen.items():
            different = {self.trace.labels.roots(a).tobytes(): a for a in axes}
            found[name] = [self.trace.labels.roots(a) for a in different.values()]
        return found

    def sizes(self, gone: Iterable[int]) -> dict[str, dict[int, list[int]]]:
        """Module name -> length of an axis that its own forward met -> what such axes become, where they change."""
        mask = self.mask(gone)
        found: dict[str, dict[int, list[int]]] = {}
        for name, axes in self._seen.items():
            sizes: dict[int, list[int]] = {}
            for roots in axes:
                left = len(roots) - int(mask[roots].sum())
                if left != len(roots) and left not in sizes.setdefault(len(roots), []):
                    sizes[len(roots)].append(left)
            if sizes:
                found[name] = sizes
        return found

    def flops(self, gone: Iterable[int] = ()) -> int:
        """Floating point operations of the traced run without these labels; two to a multiply-add."""
        mask = self.mask(gone)
        return sum(f * int(np.prod([len(r) - int(mask[r].sum()) for r in axes])) for f, axes in self.products)

    @cached_property
    def products(self) -> list[tuple[int, list[Array]]]:
        """The trace's costs, with the class of each position in place of its label."""
        return [(f, [self.trace.labels.roots(a) for a in axes]) for f, axes in self.trace.costs]

    def parameters(self, gone: Iterable[int], each: Mapping[str, int] | None = None) -> int:
        """How many parameters the model has without these labels.

        Args:
            each: what one parameter of a tensor counts, by the tensor's name, such as its bytes; 1 by default.
        """
        kept = self.kept(gone)
        sizes: dict[int, list[int]] = {}
        counts: dict[int, int] = {}
        for i, slot in enumerate(self.slots):
            if slot.is_parameter:
                shape = sizes.setdefault(id(slot.tensor), list(slot.tensor.shape))
                counts[id(slot.tensor)] = 1 if each is None else each[slot.names[0]]
                if i in kept:
                    shape[slot.axis] = len(kept[i])
        single = self.trace.single * (1 if each is None else max(each.values(), default=1))
        return single + int(sum(np.prod(shape) * counts[key] for key, shape in sizes.items()))


class _Closure:
    """What goes with what."""

    def __init__(self, trace: Trace) -> None:
        labels = trace.labels
        up = labels.roots(np.arange(len(labels))).tolist()
        self.joins: dict[int, list[frozenset[int]]] = {}
        self.children: dict[int, set[int]] = {}
        for label in list(labels.joins):
            root = up[label]
            if root in self.joins:
                continue
            ways = [frozenset(up[p] for p in join) for join in dict.fromkeys(labels.joins[root])]
            joins = self.joins[root] = list(dict.fromkeys(ways))
            for join in joins:
                for parent in join:
                    if parent != root:
                        self.children.setdefault(parent, set()).add(root)
        #: With one way to be made, what is gone has a parent that is gone: only the others need a look.
        self.several = {x for x, joins in self.joins.items() if len(joins) > 1}

    def is_seed(self, root: int) -> bool:
        return all(root in join for join in self.joins.get(root, ()))

    def of(self, seed: int) -> frozenset[int]:
        """All that goes with ``seed``."""
        if seed not in self.children and seed not in self.several:
            return frozenset((seed,))
        gone: set[int] = set()
        due = [seed]
        while due:
            while due:
                label = due.pop()
                if label not in gone:
                    gone.add(label)
                    due.extend(self.children.get(label, ()))
            for label in gone & self.several if len(gone) < len(self.several) else self.several & gone:
                for join in self.joins[label]:
                    if not join & gone:
                        due.append(max(sorted(join), key=lambda p: self._covered(p, gone)))
                        break
                if due:
                    break
        return frozenset(gone)

    def _covered(self, parent: int, gone: set[int]) -> float:
        children = self.children.get(parent, set())
        return len(children & gone) / len(children) if children else 0.0


def dependencies(trace: Trace) -> Dependencies:
    """Units and families of a traced model."""
    labels = trace.labels
    closure = _Closure(trace)
    roots = [labels.roots(slot.labels) for slot in trace.slots]
    if not roots:
        return Dependencies(trace, [], {})
    frozen = np.array(sorted({labels.root(x) for x in labels.frozen}), dtype=np.int64)
    blocked: dict[int, str] = {labels.root(x): why for x, why in reversed(labels.frozen.items())}

    families: dict[tuple[tuple[int, int], ...], list[Family]] = {}
    taken: dict[int, set[int]] = {}  # of each family: what goes with its units; they share nothing
    stuck: dict[int, str] = {}
    closures: dict[frozenset[int], int] = {}
    seeds = np.unique(np.concatenate([*roots, np.array(sorted(closure.children), dtype=np.int64)]))
    for seed in seeds[~np.isin(seeds, frozen)].tolist():
        if closure.is_seed(seed) and (gone := closure.of(seed)) not in closures:
            closures[gone] = seed
            if reason := next((blocked[g] for g in gone if g in blocked), None):
                stuck[seed] = reason
    free = [gone for gone, seed in closures.items() if seed not in stuck]
    lengths = [len(slot.labels) for slot in trace.slots]
    parameters = {i for i, slot in enumerate(trace.slots) if slot.is_parameter}
    for gone, places in zip(free, _places(roots, free), strict=True):
        if parameters.isdisjoint(places):
            continue
        unit = Unit(gone, places)
        whole = [i for i, p in places.items() if len(p) == lengths[i]]
        if whole:
            stuck[closures[gone]] = f"it is all of {trace.slots[whole[0]].names[0]}"
            continue
        key = tuple((i, len(p)) for i, p in places.items())
        alike = families.setdefault(key, [])
        family = next((f for f in alike if taken[id(f)].isdisjoint(gone)), None)
        if family is None:
            slots = tuple(places)
            family = Family(_name(trace, slots, unit), [], slots)
            alike.append(family)
            taken[id(family)] = set()
        family.units.append(unit)
        taken[id(family)] |= gone
    every = [family for alike in families.values() for family in alike]
    reached = set().union(*(unit.gone for family in every for unit in family.units))
    reasons_of: dict[tuple[str, int], str] = {}
    for i, slot in enumerate(trace.slots):
        mine = set(roots[i].tolist())
        if slot.is_parameter and not mine & reached:
            why = next((blocked[x] for x in mine if x in blocked), None)
            why = why or next((stuck[x] for x in mine if x in stuck), None)
            if why is None:
                parents = {p for x in mine for join in closure.joins.get(x, ()) for p in join}
                why = next((r for p in parents if (r := blocked.get(p) or stuck.get(p))), None)
            if why is None:
                why = "its positions only go with others that cannot"
            reasons_of[slot.names[0], slot.axis] = why
    return Dependencies(trace, every, reasons_of)


def _places(roots: Sequence[Array], gone: Sequence[frozenset[int]]) -> list[dict[int, Array]]:
    """For each set of labels: slot number -> the positions there that have one of them."""
    found: list[dict[int, Array]] = [{} for _ in gone]
    slots = np.repeat(np.arange(len(roots)), [len(r) for r in roots])
    positions = np.concatenate([np.arange(len(r)) for r in roots])
    flat = np.concatenate(roots)
    order = np.argsort(flat, kind="stable")
    labels = np.fromiter(itertools.chain.from_iterable(gone), dtype=np.int64)
    first, last = (np.searchsorted(flat, labels, side, sorter=order) for side in ("left", "right"))
    counts = last - first
    inside = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    owner = np.repeat(np.repeat(np.arange(len(gone)), [len(g) for g in gone]), counts)
    # By set, then by slot and position, which is the order of the flat list.
    owner, where = np.divmod(np.sort(owner * len(flat) + order[np.repeat(first, counts) + inside]), len(flat))
    slot, position = slots[where], positions[where]
    starts = np.flatnonzero(np.diff(owner, prepend=-1) | np.diff(slot, prepend=-1))
    edges = [*starts.tolist(), len(where)]
    for k, i, (a, b) in zip(owner[starts].tolist(), slot[starts].tolist(), itertools.pairwise(edges), strict=True):
        found[k][i] = position[a:b]
    return found


def _name(trace: Trace, slots: Iterable[int], unit: Unit) -> str:
    """The first weight whose output axis the units lie on, else the first axis at all, and its share in a unit."""
    chosen = [i for i in slots if trace.slots[i].is_parameter]
    first = sorted(chosen, key=lambda i: trace.slots[i].axis != 0 or trace.slots[i].tensor.dim() < 2)[0]
    slot, width = trace.slots[first], len(unit.places[first])
    return f"{slot.names[0]}:{slot.axis}" + (f" x{width}" if width > 1 else "")
