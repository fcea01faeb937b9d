"""What stands beside intervals: the pooled spread, draws that are most of a text, and the memory of a run."""

from __future__ import annotations

import sys

import pytest
import torch

from secateur.compare.page import render
from secateur.compare.page_data import Frame, frames
from secateur.compare.page_second import on_calibration, on_pooled, pooled
from secateur.compare.page_words import against_dense
from secateur.measure import Peak
from secateur.measure.size import give_back_memory, resident_bytes
from tests.compare.made import rows


def frame(alike: bool = True) -> Frame:
    made = rows({"dense": [0.90, 0.91, 0.92]}, target="")
    far = 1.0 if alike else 20.0
    made += rows({
        "a": [0.888, 0.880, 0.906], "b": [0.871, 0.879, 0.893],
        "c": [0.85 + 0.004 * far, 0.86, 0.87 - 0.003 * far], "d": [0.841, 0.850, 0.863],
    })  # fmt: skip
    return frames(made)[0]


def test_the_pooled_spread_is_a_second_opinion_and_says_when_it_holds() -> None:
    own, second = against_dense(frame()), pooled(frame())
    assert second.keys() == own.keys()
    first, other = own[("0.9", "a")], second[("0.9", "a")]
    assert first.estimate.value == pytest.approx(other.estimate.value) and first.estimate.low != other.estimate.low
    assert first.verdict == "no difference shown" and other.verdict == "worse", "it shows more at three seeds"
    (said,) = on_pooled(own, second)
    assert "varies up to" in said and "can be trusted only where methods vary alike" in said
    times = [
        float(on_pooled(against_dense(f), pooled(f))[0].split("up to ")[1].split()[0]) for f in (frame(), frame(False))
    ]
    assert times[1] > 5 * times[0]
    still = frames([*rows({"dense": [0.9] * 3}, target=""), *rows({"a": [0.8] * 3, "b": [0.81, 0.83, 0.82]})])[0]
    assert "1 result does not vary at all" in on_pooled(against_dense(still), pooled(still))[0]
    html = render({"study": "s"}, frame().rows)
    assert "Pooled says" in html and "second opinion" in html


@pytest.mark.parametrize(
    ("windows", "of", "said"),
    [
        (8, 100, None),
        (36, 100, "two seeds share 36"),
        (36, 100, "about 1.2 times as wide"),
        (100, 100, "the same text"),
    ],
)
def test_draws_that_are_most_of_a_text_are_said(windows: int, of: int, said: str | None) -> None:
    made = rows({"a": [9.0, 9.1]}, metric="perplexity", up=False, calibration={"windows": windows, "of": of})
    found = on_calibration(frames(made)[0])
    assert (found == []) if said is None else said in found[0]


@pytest.mark.skipif(sys.platform != "linux", reason="the system keeps no mark that can be set back")
def test_memory_is_of_the_run_and_not_of_what_came_before() -> None:
    big = torch.ones(50_000_000)
    del big
    before = give_back_memory()
    with Peak() as quiet:
        torch.ones(10)
    assert quiet.bytes - before < 50_000_000, "the 200 MB before it are not in it"
    with Peak() as peak:
        short = torch.ones(20_000_000)  # gone before a sample could see it
        del short
    assert peak.bytes - before > 70_000_000 and resident_bytes() < peak.bytes
