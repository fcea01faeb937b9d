"""Ties, joins and frozen labels against a reference that tries everything."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from secateur.graph import Slot, Trace, dependencies
from secateur.graph.labels import RIGID, Labels

BASE = 7  # labels to begin with; joins add to them


class Reference:
    """The same laws on handles 0, 1, 2, ..., without a union-find and without short cuts."""

    def __init__(self, count: int) -> None:
        self.classes = [{i} for i in range(count)]
        self.frozen: set[int] = set()
        self.joins: list[tuple[int, tuple[int, ...]]] = []

    def of(self, handle: int) -> frozenset[int]:
        return frozenset(next(c for c in self.classes if handle in c))

    def tie(self, a: int, b: int) -> None:
        merged = set(self.of(a) | self.of(b))
        self.classes = [c for c in self.classes if not c & merged] + [merged]

    def join(self, *parents: int) -> None:
        handle = sum(map(len, self.classes))
        self.classes.append({handle})
        self.joins.append((handle, parents))

    def ways(self, handle: int) -> set[frozenset[frozenset[int]]]:
        """The ways in which a handle's class is made, as sets of classes."""
        mine = self.of(handle)
        return {frozenset(self.of(p) for p in parents) for child, parents in self.joins if child in mine}

    def stuck(self) -> set[int]:
        return {h for f in self.frozen for h in self.of(f)}

    def gone_with(self, seed: int) -> frozenset[int]:
        gone = set(self.of(seed))
        while True:
            more = {h for child, parents in self.joins if gone & set(parents) for h in self.of(child)}
            if more <= gone:
                return frozenset(gone)
            gone |= more

    def units(self) -> set[frozenset[int]]:
        """What can go, where every class is made in one way at most."""
        seeds = [h for c in self.classes for h in [min(c)] if all(self.of(h) in way for way in self.ways(h))]
        return {gone for s in seeds if not (gone := self.gone_with(s)) & self.stuck()}


pairs = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=3)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("tie"), pairs),
        st.tuples(st.just("join"), st.lists(st.integers(0, 30), min_size=1, max_size=3)),
        st.tuples(st.just("freeze"), st.integers(0, 30)),
        st.tuples(st.just("rigid"), st.integers(0, 30)),
    ),
    max_size=9,
)


def play(todo: list[tuple[str, Any]]) -> tuple[Labels, np.ndarray, Reference]:
    """The same steps on both; handles are taken modulo how many there are."""
    labels, reference = Labels(), Reference(BASE)
    handles = labels.fresh(BASE)
    for what, value in todo:
        n = len(handles)
        if what == "tie":
            labels.tie(handles[[a % n for a, _ in value]], handles[[b % n for _, b in value]])
            for a, b in value:
                reference.tie(a % n, b % n)
        elif what == "join":
            made = labels.join(*(handles[[p % n]] for p in value))
            handles = np.concatenate([handles, made])
            reference.join(*(p % n for p in value))
        elif what == "freeze":
            labels.freeze(handles[[value % n]], "asked")
            reference.frozen.add(value % n)
        else:
            labels.tie(handles[[value % n]], np.array([RIGID]))
            reference.frozen.add(value % n)
    return labels, handles, reference


def units_of(labels: Labels, handles: np.ndarray) -> set[frozenset[int]]:
    """Units as positions of a vector that has one position a handle, and a rigid one so that it never goes whole."""
    vector = nn.Parameter(torch.zeros(len(handles) + 1))
    slot = Slot(("vector",), vector, 0, np.concatenate([handles, [RIGID]]))
    found = dependencies(Trace(labels, [slot]))
    return {frozenset(u.places[0].tolist()) for f in found.families for u in f.units}


@given(steps)
def test_units_are_what_the_reference_finds(todo: list[tuple[str, Any]]) -> None:
    labels, handles, reference = play(todo)
    found = units_of(labels, handles)
    for unit in found:
        assert all(reference.of(h) <= unit for h in unit), "tied labels go together"
        assert not unit & reference.stuck(), "what is frozen stays"
        for child, parents in reference.joins:
            assert child in unit or not unit & set(parents), "a join goes with each of its parents"
        for handle in unit:
            for way in reference.ways(handle):
                assert any(parent <= unit for parent in way), "a join goes with a parent only"
    if all(len(reference.ways(h)) <= 1 for h in range(len(handles))):
        assert found == reference.units()


@given(steps)
def test_roots_are_classes(todo: list[tuple[str, Any]]) -> None:
    labels, handles, _ = play([step for step in todo if step[0] in ("tie", "join")])
    roots = labels.roots(handles)
    assert [labels.root(h) for h in handles.tolist()] == roots.tolist()
    plain = [step for step in todo if step[0] == "tie"]
    labels, handles, reference = play(plain)
    roots = labels.roots(handles)
    for a in range(len(handles)):
        for b in range(len(handles)):
            assert (roots[a] == roots[b]) == (reference.of(a) == reference.of(b))


@given(st.permutations([(0, 1), (2, 3), (1, 2), (4, 5), (3, 0)]), st.integers(1, 5))
def test_the_order_of_ties_and_how_they_are_batched_do_not_matter(order: list[tuple[int, int]], batch: int) -> None:
    labels = Labels()
    handles = labels.fresh(6)
    for k in range(0, len(order), batch):
        some = order[k : k + batch]
        labels.tie(handles[[a for a, _ in some]], handles[[b for _, b in some]])
    roots = labels.roots(handles).tolist()
    assert len(set(roots[:4])) == 1 and len(set(roots[4:])) == 1 and roots[0] != roots[4]


def test_labels_of_their_own_go_alone() -> None:
    labels = Labels()
    handles = labels.fresh(3)
    assert units_of(labels, handles) == {frozenset({0}), frozenset({1}), frozenset({2})}
    assert len(labels) == 4  # and the rigid one


def test_more_labels_than_there_was_room_for() -> None:
    labels = Labels()
    first, many = labels.fresh(2), labels.fresh(5000)
    labels.tie(many[:2500], many[2500:])
    assert labels.roots(many).tolist() == [*many[:2500]] * 2
    assert labels.roots(first).tolist() == first.tolist()


def test_a_grid_goes_by_rows_and_by_columns() -> None:
    labels = Labels()
    rows, columns = labels.fresh(2), labels.fresh(3)
    grid = labels.join(np.repeat(rows, 3), np.tile(columns, 2))
    assert len(np.unique(grid)) == 6
    found = units_of(labels, grid)
    assert found == {frozenset({0, 1, 2}), frozenset({3, 4, 5}), *(frozenset({j, 3 + j}) for j in range(3))}


def test_a_join_of_the_same_parents_is_the_same_label() -> None:
    labels = Labels()
    a, b, c = (labels.fresh(1) for _ in range(3))
    assert labels.join(a, b) == labels.join(b, a) == labels.join(a, b, a)
    assert labels.join(a, a) == a
    labels.tie(b, c)
    assert labels.join(a, c) == labels.join(a, b)
    assert labels.parents(int(labels.join(a, c)[0])) == [frozenset({labels.root(int(a[0])), labels.root(int(b[0]))})]
    assert labels.parents(int(a[0])) == []


def test_the_first_reason_is_kept() -> None:
    labels = Labels()
    a, b, c = (labels.fresh(1) for _ in range(3))
    labels.freeze(b, "first")
    labels.freeze(b, "second")
    labels.tie(a, b)
    assert labels.frozen[labels.root(int(b[0]))] == "first"
    labels.tie(c, np.array([RIGID]))
    assert "channels" in labels.frozen[labels.root(int(c[0]))]


def test_a_frozen_join_holds_its_parents() -> None:
    labels = Labels()
    handles = labels.fresh(3)
    made = labels.join(handles[:1], handles[1:2])
    labels.freeze(made, "read elsewhere")
    assert units_of(labels, np.concatenate([handles, made])) == {frozenset({2})}


def test_what_is_made_in_two_ways_needs_a_parent_in_each() -> None:
    labels = Labels()
    handles = labels.fresh(4)
    made = labels.join(handles[:1], handles[1:2])
    labels.tie(made, labels.join(handles[2:3], handles[3:4]))
    found = units_of(labels, np.concatenate([handles, made]))
    assert found and all(4 in unit and unit & {0, 1} and unit & {2, 3} for unit in found)
