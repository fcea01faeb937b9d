"""Granularities cut a matrix into units, each element once, and put it together again."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from secateur.errors import RecipeError, UnknownName
from secateur.granularity import parse
from secateur.select import keep_count, select


@st.composite
def cuts(draw: st.DrawFn) -> tuple[str, tuple[int, int]]:
    """A granularity and a shape that it divides."""
    kind = draw(st.sampled_from(["element", "row", "nm", "block"]))
    o, i = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    if kind == "nm":
        m = draw(st.integers(1, 8))
        return f"{draw(st.integers(1, m))}:{m}", (o, i * m)
    if kind == "block":
        r, c = draw(st.integers(1, 4)), draw(st.integers(1, 4))
        return f"block({r},{c})", (o * r, i * c)
    return kind, (o, i)


@given(cuts())
def test_split_and_join_are_inverse_and_a_partition(cut: tuple[str, tuple[int, int]]) -> None:
    text, shape = cut
    granularity = parse(text)
    number = torch.arange(shape[0] * shape[1]).reshape(shape)
    units = granularity.split(number)
    assert tuple(units.shape) == granularity.pool_shape(*shape)
    assert sorted(units.reshape(-1).tolist()) == list(range(number.numel()))
    assert torch.equal(granularity.join(units, shape), number)
    assert torch.equal(granularity.split(number.t().contiguous().t()), units)
    assert parse(granularity.name).name == granularity.name


@given(cuts(), st.floats(0, 1))
def test_the_mask_has_the_count_that_kept_says(cut: tuple[str, tuple[int, int]], keep: float) -> None:
    text, shape = cut
    granularity = parse(text)
    keep = keep if granularity.keep is None else granularity.keep
    mask = granularity.unpool(select(granularity.pool(torch.rand(shape)), keep), shape)
    assert int(mask.sum()) == granularity.kept(shape, keep)
    pools, units, elements = granularity.pool_shape(*shape)
    assert granularity.split(mask).sum((1, 2)).tolist() == [keep_count(keep, units) * elements] * pools


@given(st.integers(1, 8), st.integers(1, 5), st.integers(1, 5), st.data())
def test_n_of_every_m_neighbors_along_the_input(m: int, o: int, runs: int, data: st.DataObject) -> None:
    n = data.draw(st.integers(1, m))
    granularity = parse(f"{n}:{m}")
    score = torch.rand(o, runs * m)
    mask = granularity.unpool(select(granularity.pool(score), n / m), (o, runs * m))
    for row in range(o):
        for run in range(runs):
            window = slice(run * m, (run + 1) * m)
            assert int(mask[row, window].sum()) == n
            kept, gone = score[row, window][mask[row, window]], score[row, window][~mask[row, window]]
            assert not gone.numel() or kept.min() >= gone.max()
    assert granularity.keep == n / m and granularity.run == m


def test_row_keeps_the_same_number_in_every_row() -> None:
    score = torch.arange(24.0).reshape(4, 6)
    row = parse("row")
    assert row.unpool(select(row.pool(score), 0.5), (4, 6)).sum(1).tolist() == [3, 3, 3, 3]
    element = parse("element")
    assert element.unpool(select(element.pool(score), 0.5), (4, 6)).sum(1).tolist() == [0, 0, 6, 6]


def test_block_is_scored_by_its_sum_and_goes_as_a_whole() -> None:
    score = torch.zeros(4, 6)
    score[0:2, 3:6] = 1.0  # the second block: sum 6
    score[3, 0] = 5.0  # the third: sum 5, with the largest single score
    block = parse("block(2,3)")
    assert block.pool(score).tolist() == [[0.0, 6.0, 5.0, 0.0]]
    mask = block.unpool(select(block.pool(score), 1), (4, 6))
    assert torch.equal(mask, score == 1.0)


@pytest.mark.parametrize(
    "text,name",
    [
        ("element", "element"),
        (" row ", "row"),
        ("2:4", "2:4"),
        (" 4 : 8 ", "4:8"),
        ("nm(1,4)", "1:4"),
        ("nm", "2:4"),
        ("block", "block(4,4)"),
        ("block( 2, 8 )", "block(2,8)"),
    ],
)
def test_what_is_read(text: str, name: str) -> None:
    assert parse(text).name == name


@pytest.mark.parametrize(
    "text,error,message",
    [
        ("elemnt", UnknownName, "no granularity named 'elemnt'; did you mean 'element'"),
        ("rows", UnknownName, "did you mean 'row'"),
        ("blok(2,2)", UnknownName, "did you mean 'block'"),
        ("2/4", UnknownName, "did you mean '2:4'"),
        ("124", UnknownName, r"'124'; did you mean '2:4'\? \(secateur methods\)"),
        ("", UnknownName, r"no granularity named '' \(secateur methods\)"),
        ("4:2", RecipeError, "'4:2' must keep between 1 and M"),
        ("0:4", RecipeError, "'0:4' must keep between 1 and M"),
        ("block(0,4)", RecipeError, "at least 1"),
        ("row(3)", RecipeError, "takes at most 0 numbers"),
        ("block(1,2,3)", RecipeError, "takes at most 2 numbers"),
    ],
)
def test_what_is_refused(text: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        parse(text)


def test_a_matrix_that_does_not_divide_is_named_with_the_way_out() -> None:
    with pytest.raises(RecipeError) as error:
        parse("2:4").check((8, 27), "layers.0.conv1")
    assert str(error.value) == (
        "granularity '2:4' needs an input size that is a multiple of 4; "
        "layers.0.conv1 has 27 (skip it with --skip layers.0.conv1)"
    )
    with pytest.raises(RecipeError, match="multiple of 4 .* net has 10 and 8 .*--skip net"):
        parse("block(4,4)").check((10, 8), "net")
    parse("2:4").check((7, 8), "fine")
