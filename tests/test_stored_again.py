"""What was written as codes keeps them when it is pruned once more and written in the fewest bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import secateur
from secateur.directory import prune_directory
from secateur.formats.stored import read_record
from secateur.recipe import Recipe
from tests import tiny


@pytest.mark.parametrize("storage", ["stock", "smallest"])
def test_groups_of_a_directory_in_bfloat16(storage: str, tmp_path: Path) -> None:
    """Weights in bfloat16 are no whole multiples of their scales any more; the directory still knows the grids."""
    tiny.build("llama").to(torch.bfloat16).save_pretrained(tmp_path / "m")
    first = Recipe.of("magnitude", sparsity=0.0).quantized("int4:16", {"symmetric": False})
    prune_directory(tmp_path / "m", first, tmp_path / "four", storage=storage)
    prune_directory(tmp_path / "four", Recipe.of("magnitude", sparsity=0.5), tmp_path / "half", storage="smallest")
    told: dict[str, Any] = read_record(tmp_path / "half")["weights"]
    layers = [n for n in told if ".layers." in n]
    assert len(layers) == 21 and {told[n]["form"] for n in layers} == {"bitmask+integers"}
    assert {(told[n]["bits"], told[n]["group"]) for n in layers} == {(4, 16)}
    four, half = secateur.load(tmp_path / "four"), secateur.load(tmp_path / "half")
    for name, weight in half.state_dict().items():
        gone = weight == 0
        assert torch.equal(weight[~gone], four.state_dict()[name][~gone])
