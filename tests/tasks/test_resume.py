"""A run that is stopped and goes on ends as one that was never stopped, bit by bit; equal seeds give equal runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import secateur
from secateur import Task, Trained, train
from secateur.errors import ModelError, OutputError
from secateur.tasks.base import adamw
from tests.tasks.tiny import TASK, batches, network

GMP = {"method": "gmp", "sparsity": 0.8, "knobs": {"driver": {"every": 2}}}
RUNS: dict[str, dict[str, Any]] = {
    "dense": {},
    "gmp": GMP,
    "rigl": {"method": "rigl", "sparsity": 0.8, "knobs": {"driver": {"every": 2}}},
    "snip": {"method": "snip", "sparsity": 0.8, "when": "before"},
    "lth-rewind": {"method": "lth-rewind", "sparsity": 0.6, "steps": 2, "knobs": {"recovery": {"to": 0.2}}},
    "lr-rewind": {"method": "lr-rewind", "sparsity": 0.6, "steps": 2},
    "magnitude-distill": {"method": "magnitude-distill", "sparsity": 0.6},
    "scratch": {"method": "magnitude-finetune", "sparsity": 0.6, "recovery": "scratch"},
    "early-bird": {
        "method": "early-bird", "sparsity": 0.5, "granularity": "element", "criterion": "magnitude",
        "knobs": {"driver": {"window": 2, "below": 0.5}},
    },
}  # fmt: skip


class Stop(Exception):
    pass


def same(a: Trained, b: Trained) -> None:
    one, two = a.model.state_dict(), b.model.state_dict()
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    assert a.masks.keys() == b.masks.keys() and all(torch.equal(a.masks[n], b.masks[n]) for n in a.masks)
    for key in ("curves", "rounds"):
        assert a.run[key] == b.run[key]
    assert a.metric == b.metric


def stopped_after(limit: int, out: Path, every: float, task: Task = TASK, **given: Any) -> bool:
    """Whether the run was stopped by then."""
    left = [limit]

    def count(*_: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise Stop

    try:
        train(task, out=out, every=every, progress=count, **given)
    except Stop:
        return True
    return False


@pytest.mark.parametrize("name", RUNS)
def test_stopped_and_gone_on_with_equals_never_stopped(name: str, tmp_path: Path) -> None:
    whole = train(TASK, seed=3, **RUNS[name])
    out = tmp_path / "out"
    stops = 0
    while stopped_after(7 + stops % 3, out, every=0.0 if stops % 2 else 1e9, seed=3, **RUNS[name]):
        stops += 1
        assert stops < 50 and not out.exists()
    assert stops >= 1
    assert not (tmp_path / "out.run").exists()
    again = secateur.Recipe.load(out / "recipe.yaml")
    assert again == whole.recipe
    model = network(0)
    from safetensors.torch import load_model

    load_model(model, out / "model.safetensors")
    state = whole.model.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    file = out / "masks.safetensors"
    masks = secateur.Masks.load(file) if whole.masks else {}
    assert file.exists() == bool(whole.masks)
    assert all(torch.equal(masks[n], whole.masks[n]) for n in whole.masks)


def test_each_step_is_a_place_to_stop(tmp_path: Path) -> None:
    task = Task(network, batches, optimizer=adamw, epochs=1, name="tiny")
    whole = train(task, **GMP)
    for step in range(1, 6):
        out = tmp_path / str(step)
        assert stopped_after(step, out, 0.0, task, **GMP)
        same(train(task, out=out, **GMP), whole)


@pytest.mark.parametrize("name", ["dense", "gmp", "lth-rewind"])
def test_equal_seeds_are_equal_and_others_differ(name: str) -> None:
    first = train(TASK, seed=1, **RUNS[name])
    torch.rand(5)  # what the caller draws in between does not matter
    same(first, train(TASK, seed=1, **RUNS[name]))
    other = train(TASK, seed=2, **RUNS[name])
    assert not torch.equal(next(first.model.parameters()), next(other.model.parameters()))


def test_the_callers_generators_are_left_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    train(TASK, epochs=0.5)
    assert torch.equal(before, torch.get_rng_state())


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    assert stopped_after(3, tmp_path / "out", 0.0, **GMP)
    with pytest.raises(ModelError, match="is of another run: choose another --out, or delete it"):
        train(TASK, out=tmp_path / "out", **{**GMP, "sparsity": 0.7})


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    assert stopped_after(3, tmp_path / "out", 0.0, **GMP)
    (file,) = (tmp_path / "out.run").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ModelError, match="is not a checkpoint of a run .* delete it to start anew"):
        train(TASK, out=tmp_path / "out", **GMP)


def test_what_exists_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="exists: choose another directory"):
        train(TASK, out=tmp_path)
