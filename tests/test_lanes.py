from __future__ import annotations

import contextvars
import gc
import weakref

import pytest
import torch

import secateur
from secateur.lanes import Lanes, Parted, lane_size
from secateur.stream import engine
from tests import tiny


def trace(paths: list[str], log: list[str]) -> Lanes[int]:
    def job(lane: int) -> int:
        for key in paths[lane]:
            log.append(f"{key}{lane}")
            lanes.pause(key)
        return lane

    lanes: Lanes[int] = Lanes([lambda i=i: job(i) for i in range(len(paths))])  # type: ignore[misc]
    return lanes


def test_every_lane_arrives_before_any_goes_on() -> None:
    log: list[str] = []
    assert trace(["ab", "ab", "ab"], log).run() == [0, 1, 2]
    assert log == ["a0", "a1", "a2", "b0", "b1", "b2"]


@pytest.mark.parametrize("paths", [["ab", "ac"], ["a", "ab"], ["ab", "a"]])
def test_lanes_that_part_are_abandoned(paths: list[str]) -> None:
    left: list[int] = []

    def job(lane: int) -> None:
        try:
            for key in paths[lane]:
                lanes.pause(key)
        finally:
            left.append(lane)

    lanes: Lanes[None] = Lanes([lambda: job(0), lambda: job(1)])
    with pytest.raises(Parted):
        lanes.run()
    assert sorted(left) == [0, 1]  # each gave back what it held


def test_an_error_in_a_lane_ends_all() -> None:
    left: list[str] = []

    def waits() -> None:
        try:
            lanes.pause("a")
        finally:
            left.append("waits")

    def bad() -> None:
        raise ZeroDivisionError

    def never() -> None:
        left.append("never")

    lanes: Lanes[None] = Lanes([waits, bad, never])
    with pytest.raises(ZeroDivisionError):
        lanes.run()
    assert left == ["waits"]


@pytest.mark.parametrize("outside", [True, False])
def test_whether_gradients_are_recorded_is_a_lanes_own_affair(outside: bool) -> None:
    seen: list[bool] = []

    def job(records: bool) -> None:
        with torch.set_grad_enabled(records):
            lanes.pause("a")
            seen.append(torch.is_grad_enabled())

    lanes: Lanes[None] = Lanes([lambda: job(True), lambda: job(False), lambda: job(True)])
    with torch.set_grad_enabled(outside):
        lanes.run()
        assert torch.is_grad_enabled() == outside
    assert seen == [True, False, True]


def test_context_variables_reach_the_lanes_and_stay_there() -> None:
    number = contextvars.ContextVar("number", default=0)
    number.set(1)
    seen: list[int] = []

    def job() -> None:
        number.set(number.get() + 1)
        lanes.pause("a")
        seen.append(number.get())

    lanes: Lanes[None] = Lanes([job, job])
    lanes.run()
    assert seen == [2, 2] and number.get() == 1


def test_lane_size_covers_the_tokens_a_lane_should_have() -> None:
    assert lane_size(512) == 4
    assert lane_size(4096) == 1
    assert lane_size(600) == 4


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon", "mamba"])
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_lanes_prune_as_one_batch_does(family: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    models = []
    for size in (100, 2):
        monkeypatch.setattr(engine, "lane_size", lambda *_, size=size: size)
        torch.manual_seed(0)
        models.append(tiny.build(family).double())
        secateur.prune(models[-1], method, sparsity=0.5, data=tiny.ids())
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a == 0, b == 0)
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_where_lanes_part_the_block_is_gone_through_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that only some lanes reach has no common point; the result is that of one batch all the same."""

    class Sometimes(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner, self.extra = inner, torch.nn.Linear(32, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.inner(x)
            chosen = x[..., 0].mean(1) > 0  # some windows
            if chosen.any():
                y = torch.index_add(y, 0, chosen.nonzero()[:, 0], self.extra(x[chosen]))
            return y

    models = []
    for size in (100, 1):
        monkeypatch.setattr(engine, "lane_size", lambda *_, size=size: size)
        torch.manual_seed(0)
        models.append(tiny.build("llama").double())
        for layer in models[-1].model.layers:
            layer.mlp = Sometimes(layer.mlp).double()
        secateur.prune(models[-1], "wanda", sparsity=0.5, data=tiny.ids())
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a == 0, b == 0)


def test_what_lanes_held_is_free_when_they_end() -> None:
    """Not when the garbage collector next looks: a block's activations are large, and blocks are many."""

    class Activation:
        pass

    held: list[weakref.ref[Activation]] = []

    def once() -> None:
        reading: list[Activation] = []

        def job() -> None:
            reading.append(Activation())
            held.append(weakref.ref(reading[-1]))
            lanes.pause("a")

        lanes: Lanes[None] = Lanes([job, job])
        lanes.run()

    gc.collect()
    gc.disable()
    try:
        once()
        assert [r() for r in held] == [None, None]
    finally:
        gc.enable()


def test_autocast_is_a_lanes_own_affair_and_inference_mode_parts() -> None:
    seen: list[bool] = []

    def job(cast: bool) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=cast):
            lanes.pause("a")
            seen.append(torch.is_autocast_enabled("cpu"))

    lanes: Lanes[None] = Lanes([lambda: job(True), lambda: job(False), lambda: job(True)])
    lanes.run()
    assert seen == [True, False, True] and not torch.is_autocast_enabled("cpu")

    def frozen() -> None:
        with torch.inference_mode():
            lanes.pause("a")

    lanes = Lanes([frozen, frozen])
    with pytest.raises(Parted):
        lanes.run()
    assert not torch.is_inference_mode_enabled()
