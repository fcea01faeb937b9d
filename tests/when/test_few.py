"""Training of models whose weights take few values: shared values, grids that stay, rounded activations."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateur import attach, load, prune, train
from secateur.compression.modules import SparseLinear
from secateur.errors import RecipeError
from secateur.formats import Grid, grid, pack
from secateur.kernels.library import library
from secateur.recipe import Recipe
from secateur.when.rounded import Tied, eight_bits
from tests.tasks.tiny import TASK

from .test_qat import MASK, data, net, steps


def shared(bits: int = 2) -> Any:
    """A network whose survivors share few values, and its masks."""
    model = net()
    return model, prune(model, "deep-compression", sparsity=0.5, knobs={"solver": {"bits": bits}}).masks


def test_the_gradient_of_a_shared_value_is_the_slope_of_the_loss_along_it() -> None:
    """By finite differences: all weights of a value move together."""
    model, masks = shared()
    x, y = data(0)
    weight = model.layer.weight
    start = weight.detach().double().clone()
    values = start[start != 0].unique()
    assert 2 <= len(values) <= 4

    def loss(w: Tensor) -> Tensor:
        return (x.double() @ w.t() - y.double()).square().mean()

    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    session = attach(model, optimizer=optimizer, masks=masks, hold="shared")
    (model(x) - y).square().mean().backward()
    optimizer.step()
    session.step()
    moved = weight.detach().double()
    for value in values:
        of = start == value
        step = 1e-6
        slope = (loss(start + step * of) - loss(start - step * of)) / (2 * step)
        assert len(moved[of].unique()) == 1, "they share one value still"
        assert float(value - moved[of][0]) == pytest.approx(float(slope), rel=1e-3, abs=1e-6)
    assert not bool(moved[start == 0].any())
    session.finish()


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_values_are_trained_as_a_table_would_be(kind: str, average: bool) -> None:
    """Against a plain loop over the table itself, with momentum, decay and Adam's moments."""
    model, masks = shared()
    start = model.weight.clone()
    values, place = start[start != 0].unique(return_inverse=True)
    count = torch.bincount(place)
    table = nn.Parameter(values.clone())

    def made(parameters: Any) -> torch.optim.Optimizer:
        if kind == "sgd":
            return torch.optim.SGD(parameters, lr=0.02, momentum=0.9, weight_decay=0.01)
        return torch.optim.AdamW(parameters, lr=0.02)

    plain = made([table])
    for k in range(6):
        x, y = data(k)
        plain.zero_grad()
        whole = torch.zeros_like(start)
        whole[start != 0] = table[place]
        (x @ whole.t() - y).square().mean().backward()
        if average:
            assert table.grad is not None
            table.grad /= count
        plain.step()
    optimizer = made(model.parameters())
    knobs = {"hold": {"average": average}}
    with attach(model, optimizer=optimizer, masks=masks, hold="shared", knobs=knobs) as session:
        steps(model, optimizer, session, 0, 6)
    torch.testing.assert_close(model.weight[start != 0], table.detach()[place], rtol=1e-4, atol=1e-6)
    assert len(model.weight[start != 0].unique()) == len(values) and not bool(model.weight[start == 0].any())


def test_codebooks_of_a_task_are_trained_and_the_file_stays_as_small(tmp_path: Path) -> None:
    more: dict[str, Any] = {"epochs": 1.0, "sparsity": 0.6, "knobs": {"solver": {"bits": 3}}, "dense": tmp_path / "d"}
    before = train(TASK, "deep-compression", out=tmp_path / "a", **more)
    more["knobs"]["recovery"] = {"length": 1.0}
    after = train(TASK, "deep-compression", recovery="codebooks", out=tmp_path / "b", **more)
    sizes = []
    for name, mask in before.masks.items():
        old, new = (m.model.get_submodule(name).weight.detach().reshape(mask.shape) for m in (before, after))
        values = old[mask].unique()
        assert torch.equal(old != 0, new != 0) and not torch.equal(old, new)
        assert all(len(new[old == v].unique()) == 1 for v in values), "indices stay"
    for folder in ("a", "b"):
        told = json.loads((tmp_path / folder / "stored.json").read_text())["weights"]
        forms = [told[f"{n}.weight"]["form"] for n in before.masks]  # of the smallest layers it is the bit mask
        assert "shared" in forms and set(forms) <= {"shared", "bitmask"}
        sizes.append(sum(f.stat().st_size for f in (tmp_path / folder).glob("stored-*.safetensors")))
    assert sizes[0] == sizes[1]
    again = load(tmp_path / "b", TASK.model(0))
    assert all(torch.equal(a, b) for a, b in zip(after.model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize(("bits", "group", "symmetric"), [(4, 4, True), (3, 0, False)])
def test_codes_are_trained_on_the_grids_that_a_model_has(bits: int, group: int, symmetric: bool) -> None:
    model = net()
    recipe = Recipe.of("magnitude", sparsity=0.5).quantized(f"int{bits}:{group}", {"symmetric": symmetric})
    made = prune(model, recipe)
    found = made.grids["layer"]
    assert isinstance(found, Grid)
    start = model.weight.clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with attach(model, optimizer=optimizer, masks=made.masks, grids=made.grids, hold="integers") as session:
        assert torch.equal(model.weight, start), "nothing moves before the first step"
        steps(model, optimizer, session, 0, 8)
    assert torch.equal(found.round(model.weight), model.weight) and not torch.equal(model.weight, start)
    assert not bool(model.weight[~made.masks["layer"]].any())


def test_a_quantizing_recipe_is_healed_on_its_own_grids() -> None:
    more: dict[str, Any] = {"epochs": 0.5, "sparsity": 0.5, "solver": "round", "criterion": "magnitude"}
    knobs = {"solver": {"bits": 3, "group": 0}}
    made = train(TASK, "magnitude-finetune", recovery="qat", steps=1, schedule="one-shot", knobs=knobs, **more)
    for name, mask in made.masks.items():
        weight = made.model.get_submodule(name).weight.detach().reshape(mask.shape)
        assert not bool(weight[~mask].any()) and all(len(row.unique()) <= 8 for row in weight)
    with pytest.raises(RecipeError, match="leave recovery.bits out"):
        train(TASK, "magnitude-finetune", recovery="qat", steps=1, knobs=knobs | {"recovery": {"bits": 8}}, **more)


def test_activations_are_rounded_as_the_kernels_round_them() -> None:
    """The same numbers as packed values of kind int8-dynamic give, and the gradient of floats."""
    if not library():
        pytest.skip("the kernels are not built here")
    torch.manual_seed(0)
    x = torch.randn(5, 64) * torch.tensor([[1e-3], [1.0], [50.0], [0.0], [2.0]])
    weight = grid(torch.randn(32, 64), 8, 0).round(torch.randn(32, 64)) * (torch.rand(32, 64) < 0.4)
    packed = SparseLinear(pack(weight, "int8-dynamic").indexed(col=False, bits=True), None)
    torch.testing.assert_close(eight_bits(x) @ weight.t(), packed(x), rtol=1e-4, atol=1e-4)
    leaf = x.clone().requires_grad_()
    eight_bits(leaf).sum().backward()
    assert leaf.grad is not None and bool((leaf.grad == 1).all())
    assert eight_bits(torch.zeros(0, 4)).shape == (0, 4) and eight_bits(x.bfloat16()).dtype == torch.bfloat16


def test_activations_in_a_session_and_no_longer() -> None:
    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.Flatten(1), nn.Linear(24, 3)).eval()
    x = torch.randn(6, 2, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    knobs = {"hold": {"activations": 8}}
    masks = {"0": torch.ones(4, 6).bool(), "2": torch.ones(3, 24).bool()}
    session = attach(model, optimizer=optimizer, masks=masks, hold="integers", knobs=knobs)
    rounded = copy.deepcopy(model)
    wanted = rounded[2](eight_bits(rounded[1](rounded[0](x))))
    assert torch.equal(model(x), wanted)
    session.finish()
    assert not any(m._forward_pre_hooks for m in model.modules()) and not torch.equal(model(x), wanted)
    with pytest.raises(RecipeError, match="8 rounds them to int8"):
        attach(model, optimizer=optimizer, masks=masks, hold="integers", knobs={"hold": {"activations": 4}})


def test_what_cannot_share() -> None:
    wide = nn.Sequential(nn.Linear(64, 16))
    optimizer = torch.optim.SGD(wide.parameters(), lr=0.1)
    with pytest.raises(RecipeError, match="has 1,024 values, and at most 256 can be shared"):
        attach(wide, optimizer=optimizer, masks={"0": torch.ones(16, 64).bool()}, hold="shared")
    with pytest.raises(RecipeError, match="add --quantize shared:5"):
        Recipe.of("magnitude-finetune", recovery="codebooks").check(())
    with pytest.raises(RecipeError, match="or codebooks on a task"):
        Recipe.of("deep-compression", recovery="finetune").check(())


def test_values_that_meet_zero_stay_in_place() -> None:
    """A value that is zero for a moment moves on; what is gone does not come back with it."""
    model, masks = shared(1)
    tied = Tied(attach(model, masks=masks).layers)
    which = tied.cluster["layer"]
    with torch.no_grad():
        model.layer.weight[which == 0] = 0.0
    tied.write()
    with torch.no_grad():
        model.layer.weight[which == 0] = 0.5
    tied.write()
    assert bool((model.weight[which == 0] == 0.5).all()) and not bool(model.weight[~MASK & (which < 0)].any())
