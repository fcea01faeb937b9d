from __future__ import annotations

import threading

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
    before = threading.active_count()
    with pytest.raises(Parted):
        trace(paths, []).run()
    assert threading.active_count() == before


def test_an_error_in_a_lane_ends_all() -> None:
    before = threading.active_count()

    def bad() -> None:
        raise ZeroDivisionError

    lanes: Lanes[None] = Lanes([lambda: lanes.pause("a"), bad, lambda: None])
    with pytest.raises(ZeroDivisionError):
        lanes.run()
    assert threading.active_count() == before


def test_one_lane_runs_in_the_calling_thread() -> None:
    assert Lanes([threading.get_ident]).run() == [threading.get_ident()]


def test_lane_size_covers_the_tokens_a_lane_should_have() -> None:
    assert lane_size(64, 512) == 4
    assert lane_size(2, 4096) == 1
    assert lane_size(1000, 2048) >= 1000 / 256


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
