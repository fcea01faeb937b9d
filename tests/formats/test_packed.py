"""Packed matrices: exact round trips, the bytes that a file keeps, and nothing damaged that is taken for a matrix."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from secateur.errors import ModelError, RecipeError
from secateur.formats import KINDS, Packed, grid, pack, restore
from secateur.formats.packed import PADDING
from secateur.kernels.quantized import quantize

PANELS = (64, 128, 192, 256)


@st.composite
def matrices(draw: st.DrawFn, most: int = 600) -> Tensor:
    """Of odd shapes and every density; some rows are empty."""
    rows, cols = draw(
        st.tuples(st.integers(1, 80), st.integers(1, most)) | st.sampled_from([(1, 257), (65, 1), (3, 64)])
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 32)))
    weight = torch.randn(rows, cols, generator=generator)
    kept = torch.rand(rows, cols, generator=generator) < draw(st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0]))
    if draw(st.booleans()):
        kept &= torch.rand(rows, 1, generator=generator) < 0.7
    return weight * kept


CUTS = st.fixed_dictionaries({"group": st.integers(1, 64), "panel": st.sampled_from(PANELS)}) | st.just({})


def sparse(rows: int = 20, cols: int = 300, density: float = 0.3) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, cols, generator=generator)
    return weight * (torch.rand(rows, cols, generator=generator) < density)


def same(a: Packed, b: Packed) -> bool:
    pairs = zip(vars(a).values(), vars(b).values(), strict=True)
    return all(
        torch.equal(x, y) if isinstance(x, Tensor) and isinstance(y, Tensor) else x is y or x == y for x, y in pairs
    )


@given(matrices(), CUTS)
def test_float32_comes_back_exactly(weight: Tensor, cut: dict[str, int]) -> None:
    packed = pack(weight, **cut)
    assert packed.check() is packed
    assert packed.dense().dtype == torch.float32 and torch.equal(packed.dense(), weight)
    assert packed.nonzeros == int(weight.count_nonzero()) == int(packed.density * weight.numel() + 0.5)
    assert not packed.values[packed.nonzeros :].any() and packed.values.numel() == packed.nonzeros + PADDING


@given(matrices(), CUTS)
def test_bfloat16_is_rounded_once(weight: Tensor, cut: dict[str, int]) -> None:
    found = pack(weight, "bfloat16", **cut).check().dense()
    assert found.dtype == torch.bfloat16 and torch.equal(found, weight.bfloat16())


@given(matrices(), CUTS)
def test_int8_is_within_half_a_step(weight: Tensor, cut: dict[str, int]) -> None:
    packed = pack(weight, "int8", **cut).check()
    assert packed.scale is not None
    found = packed.dense()
    assert bool(((found - weight).abs() <= 0.50001 * packed.scale[:, None]).all())
    assert not found[weight == 0].any() and packed.nonzeros == int(weight.count_nonzero())
    largest = weight.abs().amax(1)
    assert torch.allclose(found.abs().amax(1), largest, rtol=1e-6, atol=0)


@given(matrices(), st.sampled_from(list(KINDS)), CUTS)
def test_a_file_gives_it_back(weight: Tensor, kind: str, cut: dict[str, int]) -> None:
    packed = pack(weight, kind, **cut)
    tensors, facts = packed.stored()
    again = restore({n: t.clone() for n, t in tensors.items()}, facts)
    assert torch.equal(again.dense(), packed.dense())
    assert same(again.indexed(True, True), packed)


@given(matrices(), st.sampled_from(list(KINDS)), CUTS)
def test_any_index_says_the_same(weight: Tensor, kind: str, cut: dict[str, int]) -> None:
    packed = pack(weight, kind, **cut)
    assert packed.col is not None and packed.bits is not None
    for col, bits in ((True, False), (False, True)):
        one = packed.indexed(col, bits).check()
        assert (one.col is not None, one.bits is not None) == (col, bits)
        assert torch.equal(one.dense(), packed.dense()) and same(one.indexed(True, True), packed)


@given(matrices(), st.sampled_from(list(KINDS)), CUTS)
def test_a_file_keeps_the_smaller_index(weight: Tensor, kind: str, cut: dict[str, int]) -> None:
    packed = pack(weight, kind, **cut)
    tensors, _ = packed.stored()
    runs = weight.shape[0] * -(-weight.shape[1] // packed.panel)
    nonzeros = int(weight.count_nonzero())
    by_bits, by_columns = runs * packed.panel // 8, nonzeros + 2 * runs
    index = sum(tensors[n].numel() * tensors[n].element_size() for n in tensors.keys() - {"values", "scale"})
    assert index == min(by_bits, by_columns)
    size = KINDS[kind].itemsize
    assert tensors["values"].numel() * tensors["values"].element_size() == size * nonzeros
    scales = 4 * weight.shape[0] if size == 1 else 0
    assert sum(t.numel() * t.element_size() for t in tensors.values()) == size * nonzeros + index + scales
    assert packed.bytes() == size * (nonzeros + PADDING) + 4 * (runs + 1) + nonzeros + by_bits + scales


@given(matrices(), CUTS)
def test_quads_hold_the_values_once_more(weight: Tensor, cut: dict[str, int]) -> None:
    packed = pack(weight, "int8-dynamic", **cut).indexed(col=False, bits=False, quad=True)
    assert packed.check() is packed and packed.bits is not None and packed.quad is not None
    rows, panels = packed.rows, -(-packed.cols // packed.panel)
    words, runs = packed.quad.tolist(), rows * panels
    total, start, quads = words[:rows], words[rows : rows + runs + 1], words[rows + runs + 1 :]
    quads, places = quads[: start[-1]], packed.quad[rows + runs + 1 + start[-1] :].view(torch.uint8).tolist()
    assert len(words) == rows + runs + 1 + len(quads) + -(-len(quads) // 4) and not any(places[len(quads) :])
    dense, run = torch.zeros(rows, panels * packed.panel), 0
    for first in range(0, rows, packed.group):
        for p in range(panels):
            for r in range(first, min(rows, first + packed.group)):
                for k in range(start[run], start[run + 1]):
                    column = p * packed.panel + 4 * places[k]
                    dense[r, column : column + 4] = torch.tensor([quads[k]], dtype=torch.int32).view(torch.int8)
                run += 1
    assert packed.scale is not None and total == dense.sum(1).int().tolist()
    assert torch.equal(dense[:, : packed.cols] * packed.scale[:, None], packed.dense())
    padded = torch.nn.functional.pad(weight, (0, -weight.shape[1] % 4))
    assert len(quads) == int((padded.view(rows, -1, 4) != 0).any(2).sum())
    assert same(packed.indexed(True, True), pack(weight, "int8-dynamic", **cut))
    assert packed.stored()[0].keys() == packed.indexed(False, True).stored()[0].keys()  # not in a file
    assert packed.bytes() == packed.indexed(False, True).bytes() + 4 * len(words)


@given(matrices(300), CUTS, st.data())
def test_quads_that_are_not_those_of_the_values(weight: Tensor, cut: dict[str, int], data: st.DataObject) -> None:
    packed = pack(weight, "int8-dynamic", **cut).indexed(False, True, True)
    assert packed.quad is not None
    quad, values = packed.quad.clone(), packed.values.clone()
    quad[data.draw(st.integers(0, len(quad) - 1))] ^= 1 << data.draw(st.integers(0, 30))
    values[: packed.nonzeros] -= 1
    for damaged in ({"quad": quad}, {"quad": packed.quad[:-1]}, {"quad": packed.quad.long()}, {"bits": None}):
        with pytest.raises(ModelError):
            dataclasses.replace(packed, **damaged).check()
    if packed.nonzeros:
        with pytest.raises(ModelError, match="quads"):
            dataclasses.replace(packed, values=values).check()


def test_which_matrices_have_quads() -> None:
    for kind in ("float32", "bfloat16", "int8"):
        with pytest.raises(RecipeError, match="int8-dynamic"):
            pack(sparse(), kind).indexed(False, True, True)
    for cols in (1 << 16, (1 << 16) + 1):
        wide = pack(torch.ones(1, cols), "int8-dynamic")
        if cols == 1 << 16:
            wide.indexed(False, True, True).check()
            continue
        with pytest.raises(RecipeError, match="65,536 columns"):
            wide.indexed(False, True, True)


def test_counts_belong_to_the_columns() -> None:
    """Ten runs: a bit mask of 80 bytes, and columns with 20 bytes of counts beside them."""
    for nonzeros, index in ((59, {"col": 59, "counts": 10}), (61, {"bits": 80})):
        weight = torch.zeros(10, 64)
        weight.view(-1)[:nonzeros] = 1
        tensors, _ = pack(weight, panel=64).stored()
        assert {n: t.numel() for n, t in tensors.items() if n != "values"} == index


def test_the_order_of_runs() -> None:
    """Three rows in groups of two, 66 columns in two panels: group by group, panel by panel, row by row."""
    weight = torch.zeros(3, 66)
    weight[0, 3], weight[0, 65], weight[1, 0], weight[1, 9], weight[2, 64] = 1, 2, 3, 4, 5
    packed = pack(weight, group=2, panel=64)
    assert packed.values[:5].tolist() == [1, 3, 4, 2, 5]
    assert packed.start.tolist() == [0, 1, 3, 4, 4, 4, 5]
    assert packed.col is not None and packed.col.tolist() == [3, 0, 9, 1, 0]
    assert packed.bits is not None and packed.bits[:, :2].tolist() == [[8, 0], [1, 2], [2, 0], [0, 0], [0, 0], [1, 0]]
    tensors, facts = packed.stored()
    assert tensors["counts"].tolist() == [1, 2, 1, 0, 0, 1] and set(tensors) == {"values", "col", "counts"}
    assert facts == {"rows": 3, "cols": 66, "group": 2, "panel": 64}


def test_numbers_at_the_edge_of_a_format() -> None:
    tiny = torch.tensor([[1e-45, -0.0, 3e38, -1e-40]])
    assert pack(tiny).nonzeros == 3 and torch.equal(pack(tiny).dense(), tiny)
    assert torch.equal(pack(tiny, "bfloat16").dense(), tiny.bfloat16())
    assert pack(torch.tensor([[1e-45, 0.0]]), "int8").check().dense().abs().max() <= 1e-30
    assert pack(torch.randn(2, 3, dtype=torch.float64)).values.dtype == torch.float32


@pytest.mark.parametrize(
    "weight",
    [
        torch.tensor([[1.0, float("nan")]]), torch.tensor([[float("inf"), 1.0]]), torch.tensor([[1e300]]).double(),
        torch.ones(2, 3, dtype=torch.int32), torch.ones(2, 3, dtype=torch.complex64), torch.ones(3),
        torch.ones(1, 2, 3), torch.tensor(1.0), torch.ones(0, 3), torch.ones(3, 0),
    ],
    ids=lambda w: f"{tuple(w.shape)}-{w.dtype}",
)  # fmt: skip
def test_what_is_not_packed(weight: Tensor) -> None:
    with pytest.raises(RecipeError):
        pack(weight.double() * 1e300 if weight.dtype == torch.float64 else weight)


def test_what_else_is_not_packed() -> None:
    with pytest.raises(RecipeError, match="int4"):
        pack(torch.ones(2, 2), "int4")
    with pytest.raises(RecipeError, match="too large"):
        pack(torch.full((2, 2), 3.4e38), "bfloat16")  # rounds to infinity
    for cut in ({"group": 65}, {"group": -1}, {"panel": 32}, {"panel": 100}, {"panel": 320}, {"panel": -64}):
        with pytest.raises(RecipeError, match="at most 64"):
            pack(torch.ones(2, 400), **cut)


@given(matrices(300), CUTS, st.sampled_from(["start", "col", "bits"]), st.data())
def test_any_change_of_an_index_is_found(weight: Tensor, cut: dict[str, int], part: str, data: st.DataObject) -> None:
    packed = pack(weight, **cut)
    changed = getattr(packed, part).clone()
    flat = changed.view(-1)
    if flat.numel():
        at, limits = data.draw(st.integers(0, flat.numel() - 1)), torch.iinfo(changed.dtype)
        near = st.sampled_from([int(flat[at]) + 1, int(flat[at]) - 1])
        new = data.draw((near | st.integers(limits.min, limits.max)).filter(lambda n: n != int(flat[at])))
        flat[at] = min(max(new, limits.min), limits.max)
    damaged = dataclasses.replace(packed, **{part: changed})
    if torch.equal(changed, getattr(packed, part)):
        damaged.check()
        return
    with pytest.raises(ModelError):
        damaged.check()


@given(matrices(300), st.sampled_from(list(KINDS)), CUTS, st.data())
def test_a_changed_file_is_refused_or_another_matrix(
    weight: Tensor, kind: str, cut: dict[str, int], data: st.DataObject
) -> None:
    """A bit mask or a count cannot change alone; what a file says instead of its columns may be another matrix."""
    tensors, facts = pack(weight, kind, **cut).stored()
    part = data.draw(
        st.sampled_from([n for n in ("bits", "col", "counts") if n in tensors and tensors[n].numel()] or [""])
    )
    if not part:
        return
    changed = tensors[part].clone()
    flat, limits = changed.view(-1), torch.iinfo(changed.dtype)
    at = data.draw(st.integers(0, flat.numel() - 1))
    was = int(flat[at])
    # Of a mask a single bit: two could be another matrix with as many values.
    new = st.integers(0, 7).map(lambda bit: was ^ 1 << bit) if part == "bits" else st.integers(limits.min, limits.max)
    flat[at] = data.draw(new.filter(lambda n: n != was))
    try:
        found = restore({**tensors, part: changed}, facts)
    except ModelError:
        return
    assert part == "col"
    assert found.col is not None and torch.equal(found.col, changed)
    assert torch.equal(found.values[: found.nonzeros], tensors["values"])
    both = found.indexed(True, True).check()
    assert torch.equal(both.dense(), found.dense()) and same(both.indexed(True, False), found)


@given(st.integers(0, 1 << 32), st.booleans(), st.sampled_from(PANELS))
def test_noise_is_no_matrix(seed: int, by_bits: bool, panel: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    runs = 5 * -(-300 // panel)
    tensors = {"values": torch.randn(200, generator=generator)}
    if by_bits:
        tensors["bits"] = torch.randint(0, 256, (runs, panel // 8), generator=generator, dtype=torch.uint8)
    else:
        tensors["col"] = torch.randint(0, 256, (200,), generator=generator, dtype=torch.uint8)
        tensors["counts"] = torch.full((runs,), 200 // runs, dtype=torch.int16)
    with pytest.raises(ModelError):
        restore(tensors, {"rows": 5, "cols": 300, "group": 3, "panel": panel})


def test_the_order_of_columns_matters() -> None:
    """The same columns in another order would be another matrix to a kernel, and the same one to a mask."""
    packed = pack(sparse()).indexed(col=True, bits=False)
    assert packed.col is not None and packed.start[1] > 2
    with pytest.raises(ModelError, match="order"):
        dataclasses.replace(packed, col=torch.cat([packed.col[:2].flip(0), packed.col[2:]])).check()
    doubled = packed.col.clone()
    doubled[1] = doubled[0]
    with pytest.raises(ModelError):
        dataclasses.replace(packed, col=doubled).check()


def test_columns_past_the_last() -> None:
    weight = torch.zeros(2, 70)
    weight[:, 69] = 1
    packed = pack(weight, panel=64)
    assert packed.col is not None and packed.col.tolist() == [5, 5]
    for col, bits in ((True, False), (False, True)):
        one = packed.indexed(col, bits)
        beyond = one.col.clone() if one.col is not None else torch.where(packed.bits == 32, 64, 0).to(torch.uint8)
        if col:
            beyond[0] = 6
        with pytest.raises(ModelError):
            dataclasses.replace(one, **{"col" if col else "bits": beyond}).check()


def changes() -> dict[str, tuple[str, Callable[[Any], Any]]]:
    """What is done to one stored tensor or fact."""
    found: dict[str, tuple[str, Callable[[Any], Any]]] = {}
    for part in ("values", "bits", "col", "counts", "scale"):
        found |= {
            f"{part} one less": (part, lambda t: t[:-1]),
            f"{part} one more": (part, lambda t: torch.cat([t, t[:1]])),
            f"{part} flat": (part, lambda t: t.view(-1, 1, 1)),
            f"{part} double": (part, lambda t: t.double()),
            f"{part} wide": (part, lambda t: t.to(torch.int64)),
            f"{part} a number": (part, lambda t: t.view(-1)[0]),
            f"{part} none": (part, lambda t: t[:0]),
            f"{part} missing": (part, lambda t: None),
        }
    for number in (float("nan"), float("inf")):
        for part in ("values", "scale", "counts"):
            found[f"{part} {number}"] = (
                part,
                lambda t, number=number: t.float().index_fill(0, torch.tensor(0), number),
            )
    found["scale zero"], found["scale negative"] = ("scale", torch.zeros_like), ("scale", torch.neg)
    found["counts negative"] = ("counts", lambda t: torch.cat([t[:1] - 300, t[1:2] + 300, t[2:]]))
    for fact in ("rows", "cols", "group", "panel"):
        for wrong in (0, -1, -64, 1 << 40, 1 << 70, float("inf"), float("nan"), "x", None, [1]):
            found[f"{fact} {wrong}"] = (fact, lambda _, wrong=wrong: wrong)
    found |= {
        "panel 100": ("panel", lambda _: 100),
        "panel 320": ("panel", lambda _: 320),
        "group 65": ("group", lambda _: 65),
    }
    return found


@pytest.mark.parametrize("part, change", changes().values(), ids=changes())
def test_damaged_parts(part: str, change: Callable[[Any], Any]) -> None:
    tried = 0
    for kind, density in (("float32", 0.02), ("bfloat16", 0.3), ("int8", 0.02), ("int8", 0.3)):
        tensors, facts = pack(sparse(density=density), kind).stored()
        given = {**tensors, **facts}
        if part not in given:
            continue
        changed = {**given, part: change(given[part])}
        with pytest.raises(ModelError):
            restore({n: changed[n] for n in tensors if changed[n] is not None}, {n: changed[n] for n in facts})
        tried += 1
    assert tried


def test_parts_that_do_not_belong_together() -> None:
    floats, numbers = pack(sparse()), pack(sparse(), "int8")
    for damaged in (
        dataclasses.replace(floats, scale=numbers.scale),
        dataclasses.replace(numbers, scale=None),
        dataclasses.replace(floats, col=None, bits=None),
        dataclasses.replace(floats, values=floats.values[:-1]),
        dataclasses.replace(floats, values=floats.values[:100]),
        dataclasses.replace(floats, start=floats.start.long()),
        dataclasses.replace(floats, start=floats.start + 1),
        dataclasses.replace(floats, bits=pack(sparse(density=0.31)).bits),
        dataclasses.replace(floats, rows=19),
    ):
        with pytest.raises(ModelError):
            damaged.check()
    with pytest.raises(ModelError):
        restore({}, {"rows": 1, "cols": 1, "group": 1, "panel": 64})
    with pytest.raises(ModelError):
        restore(floats.stored()[0], {})


def test_strided_tensors_are_taken_as_they_read() -> None:
    """A kernel reads memory, not strides."""
    for density in (0.02, 0.3):
        packed = pack(sparse(density=density), "int8")
        tensors, facts = packed.stored()
        strided = {n: torch.stack([t, t.flip(0)], -1)[..., 0] for n, t in tensors.items()}
        assert not any(t.is_contiguous() for t in strided.values())
        again = restore(strided, facts)
        assert torch.equal(again.dense(), packed.dense())
        held = (again.values, again.start, again.col, again.bits, again.scale)
        assert all(t.is_contiguous() for t in held if t is not None)


@pytest.mark.parametrize("kind", ["int8", "int8-dynamic"])
def test_weights_that_are_integers_already_do_not_move(kind: str) -> None:
    """Pruned and quantized with one scale a row: packed with the same integers, whatever the largest of them is."""
    weight = torch.randn(48, 80)
    weight[torch.rand(48, 80) < 0.5] = 0
    for bits in (8, 5):
        values = grid(weight, bits, 0).round(weight)
        assert torch.equal(pack(values, kind).dense(), values)
        codes, scale = quantize(values)
        assert torch.equal(codes.float() * scale[:, None], values)
