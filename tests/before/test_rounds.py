"""Rounds whose masks are nested or not, controls of a mask, sessions, the command line, and units."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import secateur
from secateur.control import shuffled
from secateur.errors import RecipeError, UnknownName
from secateur.layers import find_layers
from secateur.recipe import Recipe
from secateur.schedule import sparsity_at
from tests.before.nets import features, images, loss, made, mlp
from tests.conftest import Run

DATA = [features()]


def flat(model: nn.Module) -> Tensor:
    return torch.cat([x.weight().reshape(-1) for x in find_layers(model)[0]])


def pruned(method: str, **more: Any) -> tuple[nn.Module, Tensor]:
    net = made(mlp)
    masks = secateur.prune(net, method, **{"sparsity": 0.9, "data": DATA, "loss": loss, **more}).masks
    return net, torch.cat([m.reshape(-1) for m in masks.values()])


@pytest.mark.parametrize("nested", [True, False])
def test_rounds_by_hand(nested: bool) -> None:
    """FORCE scores all weights by the pruned network's gradient and the values they had, SNIP's rounds what is left."""
    net, dense, steps = made(mlp), flat(made(mlp)), 4
    mask = torch.ones_like(dense, dtype=torch.bool)
    returned = 0
    for k in range(1, steps + 1):
        masked = copy.deepcopy(net)
        with torch.no_grad():
            for layer, part in zip(
                find_layers(masked)[0], mask.split([x.numel for x in find_layers(net)[0]]), strict=True
            ):
                layer.stored.mul_(part.view_as(layer.stored))
        loss(masked, DATA[0]).backward()
        g = torch.cat([x.gradient().reshape(-1) for x in find_layers(masked)[0]])
        score = (dense * g).abs()
        if nested:
            score = score.masked_fill(~mask, -1)
        keep = round((1 - sparsity_at("geometric", k / steps, 0.9)) * len(dense))
        new = torch.zeros_like(mask)
        new[score.topk(keep).indices] = True
        returned += int((new & ~mask).sum())
        mask = new
    done, found = pruned("iterative-snip" if nested else "force", steps=steps)
    assert torch.equal(found, mask) and (returned > 0) == (not nested)
    assert torch.equal(flat(done), dense * mask)


def test_weights_come_back_with_any_criterion_and_granularity() -> None:
    for more in ({"criterion": "magnitude"}, {"criterion": "grasp"}, {"granularity": "row", "allocation": "uniform"}):
        net, mask = pruned("force", steps=3, **more)
        assert torch.equal(flat(net), flat(made(mlp)) * mask)
    # The scores of magnitude do not depend on the rounds.
    one, two = (pruned("force", criterion="magnitude", steps=3, nested=n)[1] for n in (True, False))
    assert torch.equal(one, two)
    with pytest.raises(RecipeError, match="do not come back"):
        Recipe.of("force", granularity="coupled")
    with pytest.raises(RecipeError, match="true or false"):
        Recipe.of("force", nested=1)


def test_controls() -> None:
    """The same counts at other places; other weights at the same places; the other end of the ranking."""
    net, mask = pruned("snip")
    dense = flat(made(mlp))
    sizes = [x.numel for x in find_layers(net)[0]]
    other, shuffle = pruned("snip", control="shuffle")
    assert not torch.equal(shuffle, mask) and torch.equal(flat(other), dense * shuffle)
    assert [int(p.sum()) for p in mask.split(sizes)] == [int(p.sum()) for p in shuffle.split(sizes)]
    fresh, same = pruned("snip", control="reinitialize")
    assert (
        torch.equal(same, mask)
        and not bool(flat(fresh)[~mask].any())
        and bool((flat(fresh)[mask] != dense[mask]).all())
    )
    _, inverted = pruned("snip", control="invert", sparsity=0.5)
    assert torch.equal(inverted, ~pruned("snip", sparsity=0.5)[1])
    again = pruned("snip", control="reinitialize")
    assert torch.equal(flat(again[0]), flat(fresh))
    assert not torch.equal(flat(pruned("snip", control="reinitialize", seed=1)[0]), flat(fresh))
    with pytest.raises(UnknownName, match="did you mean 'shuffle'"):
        Recipe.of("snip", control="shufle")
    for wrong in ({"granularity": "coupled"}, {"solver": "sparsegpt", "allocation": "uniform"}, {"driver": "gradual"}):
        with pytest.raises(RecipeError, match="one mask of weights"):
            Recipe.of("snip", control="shuffle", **wrong)


def test_new_weights_are_spread_as_the_old_ones() -> None:
    net = nn.Linear(200, 100)
    before = net.weight.detach().clone()
    secateur.prune(net, "magnitude", sparsity=0.1, control="reinitialize")
    kept = net.weight.detach()[net.weight != 0]
    assert float(kept.square().mean().sqrt()) == pytest.approx(float(before.square().mean().sqrt()), rel=0.03)
    assert abs(float(kept.mean())) < 0.002 and float(kept.abs().max()) > float(
        before.abs().max()
    )  # normal, not uniform


@given(st.sampled_from(["element", "row", "2:4", "block(2,4)"]), st.integers(0, 99), st.integers(0, 2**31))
def test_a_shuffled_mask_keeps_every_count(pattern: str, seed: int, draw: int) -> None:
    from secateur import granularity, select

    cut = granularity.parse(pattern)
    score = torch.rand(8, 16, generator=torch.Generator().manual_seed(seed))
    mask = cut.unpool(select.select(cut.pool(score), cut.keep or 0.3), (8, 16))
    moved = shuffled(mask, pattern, torch.Generator().manual_seed(draw))
    assert moved.dtype == torch.bool and torch.equal(cut.split(mask)[..., 0].sum(1), cut.split(moved)[..., 0].sum(1))
    whole = cut.split(moved)
    assert bool((whole == whole[..., :1]).all())


@pytest.mark.parametrize("method", ["force", "grasp", "synflow", "prospr", "ntk-sap"])
def test_a_session_holds_the_mask_through_training(method: str) -> None:
    net = made(mlp)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2)
    rounds = secateur.Recipe.of(method, sparsity=0.8, control="shuffle")
    with secateur.attach(net, rounds, optimizer=optimizer, data=DATA, loss=loss) as session:
        first = session.masks
        for _ in range(3):
            optimizer.zero_grad()
            (loss(net, DATA[0]) + session.penalty()).backward()
            optimizer.step()
            session.step()
    gone = torch.cat([~first[x.name].reshape(-1) for x in session.layers])
    assert not bool(flat(net)[gone].any()) and abs(session.sparsity - 0.8) < 0.01


@pytest.mark.parametrize("method", ["snap", "3sp"])
def test_gates_on_channels(method: str) -> None:
    """SNAP's score is |dL/dc| of a gate c on what a channel carries; 3SP's is that over the operations it takes."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 24, 3, padding=1)
            self.head = nn.Linear(24, 10)
            self.gates: list[Tensor] = []

        def forward(self, x: Tensor) -> Tensor:
            a = self.first(x).relu()
            a = a * self.gates[0].view(-1, 1, 1) if self.gates else a
            b = self.second(a).relu()
            b = b * self.gates[1].view(-1, 1, 1) if self.gates else b
            found: Tensor = self.head(b.mean((2, 3)))
            return found

    net, data = made(Gated), [images(size=6)]
    twin = copy.deepcopy(net)
    twin.gates = [torch.ones(n, requires_grad=True) for n in (16, 24)]
    loss(twin, data[0]).backward()
    score = [g.grad.abs() for g in twin.gates]
    if method == "3sp":  # two per weight and position, in the layer that computes the channel and in what reads it
        flops = (2 * 36 * 9 * (3 + 24), 2 * 36 * 9 * 16 + 2 * 10)
        score = [s / f for s, f in zip(score, flops, strict=True)]
    plan = secateur.plan(net, method, target="flops 40%", example=data[0][0][:1], data=data, loss=loss, multiple=1)
    assert plan.recipe.recovery == "none" and plan.proof.proven
    kept = [torch.tensor(plan.kept[n][0].tolist()) for n in ("first.weight", "second.weight")]
    for s, k in zip(score, kept, strict=True):  # the best of each layer stay
        assert set(k.tolist()) == set(s.topk(len(k)).indices.tolist()) and len(k) < len(s)
    cut = [torch.ones(len(s), dtype=torch.bool).index_fill(0, k, False) for s, k in zip(score, kept, strict=True)]
    worst, best = (
        min(float(s[k].min()) for s, k in zip(score, kept, strict=True)),
        max(float(s[c].max()) for s, c in zip(score, cut, strict=True)),
    )
    assert worst >= best  # one threshold for both layers
    assert plan.after["flops"] <= 0.6 * plan.before["flops"]


NET = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))

def images():
    for _ in range(2):
        yield torch.randn(8, 3, 8, 8), torch.randn(8, 4)

def loss(model, batch):
    return nn.functional.mse_loss(model(batch[0]), batch[1])
"""


def test_the_command_line(run: Run, tmp_path: Path) -> None:
    file, out = tmp_path / "given.py", tmp_path / "out"
    file.write_text(NET)
    words = [f"{file}:net", "--sparsity", "0.9", "--out", out]
    status, printed, err = run("prune", *words, "--method", "synflow", "--example", "1x3x8x8")
    assert status == 0, err
    assert "2 layers pruned" in printed and "0.89" in printed
    masks = secateur.Masks.load(out / "masks.safetensors")
    assert abs(masks.sparsity - 0.9) < 1e-3 and (out / "report.html").exists() and (out / "model.safetensors").exists()
    status, printed, err = run("prune", *words, "--method", "synflow", "--example", "1x3x8x8")
    assert status == 2 and "exists" in err
    status, printed, err = run("prune", *words, "--force", "--method", "snip", "--data", f"{file}:images", "--json")
    assert status == 0, err  # with the file's own loss
    status, printed, err = run("prune", *words, "--force", "--method", "synflow")
    assert status == 2 and "--example" in err
    status, printed, err = run("prune", *words, "--force", "--method", "snip")
    assert status == 2 and "pass --data" in err


def test_methods_are_listed_before_training() -> None:
    names = {p.name for p in secateur.list_methods(when="before")}
    assert {"snip", "iterative-snip", "force", "grasp", "synflow", "prospr", "ntk-sap", "snap", "3sp"} <= names
    assert {"synflow", "ntk-sap"} <= {p.name for p in secateur.list_methods(needs="nothing")}
    assert "grasp" in {p.name for p in secateur.list_methods(needs="gradients")}
