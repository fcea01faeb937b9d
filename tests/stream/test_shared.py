"""Processes that share the calibration windows of a language model find the masks of one that has them all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.test_prune import ids, llama

import secateur
from secateur import prune
from secateur.errors import DataError, RecipeError

METHODS: dict[str, dict[str, Any]] = {
    "wanda": {"sparsity": 0.5},
    "wanda by owl": {"sparsity": 0.6, "allocation": "owl"},  # which looks at data too
    "sparsegpt": {"granularity": "2:4"},
    "sparsegpt in passes": {"sparsity": 0.5, "memory": 20_000},
    "ria": {"sparsity": 0.5, "propagate": "block"},
}


def made(name: str) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model = llama()
    method, _, _ = name.partition(" ")
    return model, prune(model, method, data=ids(7), shared=True, **METHODS[name])


def member(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    for name in METHODS:
        model, found = made(name)
        save_file({k: v.contiguous().clone() for k, v in model.state_dict().items()}, Path(folder, f"{name}.{rank}"))
        found.masks.save(Path(folder, f"{name}.{rank}.masks"))
    said = []
    for data, method in ((ids(1), "wanda"), (ids(4), "snip")):
        try:
            prune(llama(), method, data=data, loss=lambda m, b: m(b).logits.sum(), sparsity=0.5, shared=True)
        except (DataError, RecipeError) as error:
            said.append(str(error))
    Path(folder, f"said{rank}").write_text("\n".join(said))
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch has no gloo here")
def test_masks_of_two_processes_are_those_of_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(member, (2, str(tmp_path)), nprocs=2)
    for name in METHODS:
        model, alone = made(name)
        first, second = (load_file(tmp_path / f"{name}.{rank}") for rank in range(2))
        assert all(torch.equal(first[k], second[k]) for k in first), name
        for key, value in model.state_dict().items():
            torch.testing.assert_close(first[key], value, rtol=1e-3, atol=1e-5, msg=f"{name} {key}")
        masks = secateur.Masks.load(tmp_path / f"{name}.0.masks")
        assert all(torch.equal(masks[k], m) for k, m in alone.masks.items()), name
    said = (tmp_path / "said1").read_text()
    assert "1 calibration windows cannot be shared by 2 processes" in said and "which cannot be shared" in said
