"""Two processes that share every batch are one process with the whole batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import secateur
from secateur import train
from tests.tasks.shared import METHODS, TASK, member

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch has no gloo here")


def test_two_processes_end_with_the_weights_and_masks_of_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(member, (2, str(tmp_path)), nprocs=2)
    for name, given in METHODS.items():
        alone = train(TASK, **given)
        first, second = (load_file(tmp_path / f"{name}.{rank}.safetensors") for rank in range(2))
        assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first), name
        for key, value in alone.model.state_dict().items():
            torch.testing.assert_close(first[key], value, rtol=1e-6, atol=1e-8, msg=f"{name} {key}")
        for rank in range(2) if alone.masks else ():
            masks = secateur.Masks.load(tmp_path / f"{name}.{rank}.masks.safetensors")
            assert all(torch.equal(masks[k], m) for k, m in alone.masks.items()), name
        assert (tmp_path / name / "run.json").is_file() and not (tmp_path / f"{name}.run").exists()
