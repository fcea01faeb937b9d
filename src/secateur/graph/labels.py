"""Labels of axis positions: which of them go together, which vanish with others, which must stay.

A label is an integer. `tie` makes two labels one. A *join* is a label that goes when any of its parents goes, such
as position ``h * head_dim + d`` of a merged axis, which goes with head ``h`` and with dimension ``d``. A frozen
label never goes; its reason is kept for the message.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.int64]

#: The label of what no removal may reach.
RIGID = 0


class Labels:
    """A union-find over labels with joins and reasons."""

    def __init__(self) -> None:
        self._parent: Array = np.zeros(1024, dtype=np.int64)
        self._marked = np.zeros(1024, dtype=bool)  # roots with an entry in the dictionaries below
        self._size = 1
        self._marked[RIGID] = True
        self.frozen: dict[int, str] = {RIGID: "its axis is not one of channels"}
        #: label -> each way in which it is made: it goes if any member of the tuple goes
        self.joins: dict[int, list[tuple[int, ...]]] = {}
        self._made: dict[tuple[int, ...], int] = {}

    def __len__(self) -> int:
        return self._size

    def fresh(self, count: int) -> Array:
        """New labels, each for itself."""
        start, self._size = self._size, self._size + count
        if self._size > len(self._parent):
            room = max(self._size, 2 * len(self._parent))
            self._parent = np.concatenate([self._parent, np.zeros(room - len(self._parent), dtype=np.int64)])
            self._marked = np.concatenate([self._marked, np.zeros(room - len(self._marked), dtype=bool)])
        labels = np.arange(start, self._size, dtype=np.int64)
        self._parent[start : self._size] = labels
        return labels

    def roots(self, labels: Array) -> Array:
        """The representative of each label's class."""
        while True:
            up = self._parent[labels]
            if np.array_equal(up, labels):
                return up
            labels = up

    def root(self, label: int) -> int:
        while (up := int(self._parent[label])) != label:
            label = up
        return label

    def tie(self, a: Array, b: Array) -> None:
        """Make ``a[i]`` and ``b[i]`` one; a label tied to a frozen one is frozen."""
        if a is b:
            return
        a, b = self.roots(a), self.roots(b)
        differ = a != b
        if not differ.any():
            return
        low, high = np.minimum(a, b)[differ], np.maximum(a, b)[differ]
        plain = ~self._marked[high]
        if plain.all() and len(np.unique(high)) == len(high) and not np.isin(high, low).any():
            self._parent[high] = low
            return
        for x, y in zip(low.tolist(), high.tolist(), strict=True):
            self._union(x, y)

    def _union(self, a: int, b: int) -> None:
        a, b = self.root(a), self.root(b)
        if a == b:
            return
        if RIGID in (a, b):
            self.freeze(np.array([a or b]), self.frozen[RIGID])
            return
        a, b = min(a, b), max(a, b)
        self._parent[b] = a
        if self._marked[b]:
            self._marked[a] = True
            if b in self.frozen:
                self.frozen.setdefault(a, self.frozen[b])
            if b in self.joins:
                self.joins.setdefault(a, []).extend(self.joins.pop(b))

    def freeze(self, labels: Iterable[int] | Array, reason: str) -> None:
        """Let none of these go."""
        for label in np.unique(self.roots(np.asarray(labels, dtype=np.int64))).tolist():
            self._marked[label] = True
            self.frozen.setdefault(label, reason)

    def join(self, *axes: Array) -> Array:
        """Labels, elementwise, that go when any of their parents goes."""
        found = np.empty(len(axes[0]), dtype=np.int64)
        rows = np.stack([self.roots(a) for a in axes], 1).tolist()
        for i, row in enumerate(rows):
            parents = tuple(sorted(set(row)))
            if len(parents) == 1:
                found[i] = parents[0]
                continue
            made = self._made.get(parents)
            if made is None:
                made = self._made[parents] = int(self.fresh(1)[0])
                self.define(made, parents)
            found[i] = made
        return found

    def define(self, label: int, parents: tuple[int, ...]) -> None:
        """State that ``label`` goes exactly when one of ``parents`` goes."""
        label = self.root(label)
        self._marked[label] = True
        known = self.joins.setdefault(label, [])
        if parents not in known:
            known.append(parents)

    def parents(self, label: int) -> list[frozenset[int]]:
        """The joins of a label, with the parents as they are tied by now."""
        root = self.root(label)
        joins = self.joins.get(root)
        if not joins:
            return []
        found = [frozenset(self.root(p) for p in join) for join in dict.fromkeys(joins)]
        return list(dict.fromkeys(found))
