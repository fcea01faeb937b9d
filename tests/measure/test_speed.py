"""Speeds on a clock of the test's own, and generation against a forward pass over everything."""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests import tiny
from torch import nn

from secateur.errors import ModelError
from secateur.measure import speed
from secateur.measure.interval import interval, ratio
from secateur.measure.speed import Forward, Generation, can_generate, run_once, speeds


class Clock:
    """Stands still, but when a model works."""

    def __init__(self) -> None:
        self.now = 0.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(time, "perf_counter", lambda: made.now)
    return made


class Slow(nn.Module):
    """Takes as long as the test says, call by call."""

    def __init__(self, clock: Clock, times: Iterator[float]) -> None:
        super().__init__()
        self.clock, self.times = clock, times

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.clock.now += next(self.times)
        return x


def test_figures_are_those_of_the_kept_turns(clock: Clock) -> None:
    early = [1e6, 1e6, 1e6]  # a trial, two turns to warm up
    dense, fast = [2.0, 4.0, 6.0, 8.0, 2.0, 2.0, 9.0], [1.0, 1.0, 2.0, 2.0, 4.0, 0.5, 3.0]
    models = {name: Slow(clock, iter(early + times)) for name, times in (("fast", fast), ("dense", dense))}
    found = speeds(models, [Forward("batch", (torch.zeros(5, 1),), count=5)], repeats=7, warmup=2)
    for name, times in (("fast", fast), ("dense", dense)):
        row = dict(found[name]["batch"])
        assert row.pop("rate") == 5 / sorted(times)[3]
        assert row.pop("ratio") == (ratio(dense, fast).to_dict() if name == "fast" else None)
        assert row == interval(times).to_dict()
    assert found["fast"]["batch"]["ratio"]["median"] == 3.0  # of 2, 4, 3, 4, 0.5, 4 and 3: not 4 / 2
    assert all(next(m.times, None) is None for m in models.values())


def test_generation_computes_what_one_pass_over_everything_does() -> None:
    model, seen = tiny.build(), []
    ids = tiny.ids(1, 12)
    original = model.forward

    def watched(**given: Any) -> Any:
        out = original(**given)
        seen.append((given["input_ids"], out.logits))
        return out

    model.forward = watched
    times = Generation(ids[:, :8], ids[:, 8:])
    with torch.inference_mode():
        found = times(model)
        whole = original(input_ids=ids).logits
    assert set(found) == set(times.items) == {"first token", "per token"}
    assert [x.shape[1] for x, _ in seen] == [8, 1, 1, 1, 1]  # the cache holds the rest
    assert torch.equal(torch.cat([x for x, _ in seen], 1), ids)
    torch.testing.assert_close(torch.cat([y for _, y in seen], 1), whole, rtol=1e-4, atol=1e-5)


def test_time_per_token_is_the_mean_over_the_answer(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    def step(_: nn.Module, ids: torch.Tensor, cache: int | None) -> int:
        position = (cache or 0) + ids.shape[1]
        clock.now += position  # attention to all that came before
        return position

    monkeypatch.setattr(speed, "_step", step)
    found = Generation(torch.zeros(1, 10), torch.zeros(1, 4))(nn.Identity())
    assert found == {"first token": 10.0, "per token": (11 + 12 + 13 + 14) / 4}


def test_who_can_generate() -> None:
    assert can_generate(tiny.build("llama")) and can_generate(tiny.build("gpt2"))
    assert not can_generate(nn.Linear(2, 2))
    mamba = tiny.build("mamba")  # its state is a cache like others where transformers gives it that name
    assert can_generate(mamba) == ("cache" in inspect.signature(mamba.forward).parameters)


def test_a_workload_that_does_not_fit_is_one_sentence() -> None:
    with pytest.raises(ModelError, match=r"^net does not run on the workload '3x4': RuntimeError .*--example") as told:
        run_once(Forward("3x4", (torch.zeros(3, 4),)), nn.Linear(5, 1), "net")
    assert "\n" not in str(told.value)
    with pytest.raises(ModelError, match="wide does not run"):
        speeds({"fits": nn.Linear(4, 1), "wide": nn.Linear(5, 1)}, [Forward("3x4", (torch.zeros(3, 4),))])
