"""Two processes that share every batch are one process with the whole batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import secateur
from secateur.supernet import goal
from tests.tasks.shared import METHODS, clock, made, member

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch has no gloo here")


def test_two_processes_end_with_the_weights_and_masks_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.multiprocessing.spawn(member, (2, str(tmp_path)), nprocs=2)
    monkeypatch.setattr(goal, "latency", clock(0))
    for name in METHODS:
        alone = made(name)
        first, second = (load_file(tmp_path / f"{name}.{rank}.safetensors") for rank in range(2))
        assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first), name
        for key, value in alone.model.state_dict().items():
            exact = value.dtype == torch.float64  # gates are in single precision
            near = {"rtol": 1e-6, "atol": 1e-8 if exact else 1e-6}
            torch.testing.assert_close(first[key], value, **near, msg=lambda m, at=f"{name} {key}": f"{at}: {m}")
        for rank in range(2) if alone.masks else ():
            masks = secateur.Masks.load(tmp_path / f"{name}.{rank}.masks.safetensors")
            assert all(torch.equal(masks[k], m) for k, m in alone.masks.items()), name
        assert (tmp_path / name / "run.json").is_file() and not (tmp_path / f"{name}.run").exists()
