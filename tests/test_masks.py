"""Masks as bits: they come back from memory and disk as they were, and zero exactly what they say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from secateur import Masks
from secateur.errors import ModelError


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**31))
def test_bits_round_trip(o: int, i: int, seed: int) -> None:
    mask = torch.rand(o, i, generator=torch.Generator().manual_seed(seed)) < 0.5
    masks = Masks({"a": mask})
    assert torch.equal(masks["a"], mask) and masks["a"].dtype == torch.bool
    assert masks.sparsity == pytest.approx(1 - int(mask.sum()) / mask.numel())


def test_as_a_mapping() -> None:
    masks = Masks({"a": torch.ones(2, 3, dtype=torch.bool), "b": torch.zeros(2, 3, dtype=torch.bool)})
    assert list(masks) == ["a", "b"] and len(masks) == 2 and masks.sparsity == 0.5
    assert Masks().sparsity == 0.0
    with pytest.raises(KeyError):
        masks["c"]


def test_save_and_load(tmp_path: Path, rng: torch.Generator) -> None:
    masks = Masks({n: torch.rand(o, i, generator=rng) < 0.3 for n, o, i in [("x.0", 3, 5), ("y", 8, 8), ("z", 1, 1)]})
    masks.save(tmp_path / "m.safetensors")
    again = Masks.load(tmp_path / "m.safetensors")
    assert set(again) == set(masks) and all(torch.equal(again[n], masks[n]) for n in masks)
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def _layer_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 6, 3, groups=2), nn.ConvTranspose2d(6, 4, 3, groups=2), nn.Linear(5, 7), nn.Embedding(6, 5)
    )


def test_apply_zeroes_exactly_what_the_masks_remove(rng: torch.Generator) -> None:
    net = _layer_net()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    masks = Masks({n: torch.rand(s, generator=rng) < 0.5 for n, s in {"0": (6, 18), "2": (7, 5), "3": (5, 6)}.items()})
    with torch.no_grad():
        net[2].weight[~masks["2"]] = torch.inf  # infinity times zero would be NaN
    masks.apply(net)
    after = net.state_dict()
    assert after.keys() == before.keys()
    for key, mask in (
        ("0.weight", masks["0"].view(6, 2, 3, 3)),
        ("2.weight", masks["2"]),
        ("3.weight", masks["3"].t()),
    ):
        assert torch.equal(after[key], torch.where(mask, before[key], torch.zeros(())))
        assert not torch.signbit(after[key][~mask]).any()
    for key in ("0.bias", "1.weight", "1.bias", "2.bias"):
        assert torch.equal(after[key], before[key])


def test_of_zeros_is_the_inverse_of_apply(rng: torch.Generator) -> None:
    net = _layer_net()
    masks = Masks({"1": torch.rand(4, 27, generator=rng) < 0.5, "2": torch.rand(7, 5, generator=rng) < 0.5})
    masks.apply(net)
    assert all(torch.equal(Masks.of_zeros(net, ["1", "2"])[n], masks[n]) for n in masks)


@pytest.mark.parametrize(
    "name,shape,message", [("9", (2, 2), "name 9, which the model does not have"), ("3", (7, 5), r"the mask of 3 is")]
)
def test_masks_of_another_model_are_refused_and_nothing_changes(
    name: str, shape: tuple[int, int], message: str
) -> None:
    net = _layer_net()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    masks = Masks({"2": torch.zeros(7, 5, dtype=torch.bool), name: torch.zeros(shape, dtype=torch.bool)})
    with pytest.raises(ModelError, match=message):
        masks.apply(net)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize(
    "bits,shapes",
    [
        (torch.zeros(2, dtype=torch.uint8), {"a": "8,8"}),  # too short
        (torch.zeros(9, dtype=torch.uint8), {"a": "8,8"}),  # too long
        (torch.zeros(8), {"a": "8,8"}),  # not bits
        (torch.zeros(4, 2, dtype=torch.uint8), {"a": "8,8"}),
        (torch.zeros(8, dtype=torch.uint8), {"b": "8,8"}),
        (torch.zeros(8, dtype=torch.uint8), {"a": "-8,-8"}),
        (torch.zeros(8, dtype=torch.uint8), {"a": "8x8"}),
        (torch.zeros(8, dtype=torch.uint8), {"a": "8,8,1"}),
        (torch.zeros(8, dtype=torch.uint8), None),
        (torch.zeros(8, dtype=torch.uint8), {"a": "8,8", "b": "8,8"}),  # one was taken away
    ],
)
def test_a_tampered_file_is_refused(tmp_path: Path, bits: torch.Tensor, shapes: dict[str, str] | None) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"a": bits}, path, metadata=shapes)
    with pytest.raises(ModelError, match="m.safetensors"):
        Masks.load(path)


def test_a_file_that_is_not_safetensors_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(b"not a file of tensors, surely")
    with pytest.raises(ModelError, match="is not a file of masks"):
        Masks.load(path)
    with pytest.raises(ModelError, match="there is no file"):
        Masks.load(tmp_path / "none")


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    Masks({"a": torch.ones(64, 64, dtype=torch.bool)}).save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError):
        Masks.load(path)
