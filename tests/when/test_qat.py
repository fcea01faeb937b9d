"""Quantization-aware training: against a plain loop, with zeros that stay, and resumed in the middle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateur import attach, load, train
from secateur.errors import RecipeError
from secateur.formats import grid
from secateur.layers import find_layers
from tests.tasks.tiny import TASK

MASK = torch.rand(4, 8, generator=torch.Generator().manual_seed(5)) < 0.5


def data(step: int) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(step)
    return torch.randn(16, 8, generator=rng), torch.randn(16, 4, generator=rng)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 4, bias=False)

    @property
    def weight(self) -> Tensor:
        return self.layer.weight.detach()

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layer(x)
        return found


def net() -> Net:
    torch.manual_seed(1)
    return Net()


def steps(model: Net, optimizer: torch.optim.Optimizer, session: Any, first: int, last: int) -> None:
    for k in range(first, last):
        x, y = data(k)
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
        session.step()


@pytest.mark.parametrize(("bits", "group"), [(8, 0), (3, 4), (2, 0)])
def test_against_a_plain_loop(bits: int, group: int) -> None:
    """Momentum and weight decay on floats; the gradient is of the rounded weights; nothing is gone but what was."""
    floats, speed = net().weight * MASK, torch.zeros(4, 8)
    for k in range(12):
        x, y = data(k)
        q = grid(floats, bits, group, clip="absmax").round(floats)
        slope = 2 / y.numel() * (x @ q.t() - y).t() @ x
        speed = 0.9 * speed + (slope * MASK + 0.01 * floats)
        floats = floats - 0.1 * speed
    expected = grid(floats, bits, group, clip="absmax").round(floats)
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    knobs = {"hold": {"bits": bits, "group": group}}
    session = attach(model, optimizer=optimizer, masks={"layer": MASK}, hold="integers", knobs=knobs)
    steps(model, optimizer, session, 0, 12)
    session.finish()
    torch.testing.assert_close(model.weight, expected, rtol=1e-4, atol=1e-5)
    assert not bool(model.weight[~MASK].any())
    back = grid(model.weight, bits, group, clip="absmax")
    assert int(back.codes(model.weight).unique().numel()) <= 2**bits


def test_a_session_goes_on_where_it_was() -> None:
    def begin(state: dict[str, Any] | None = None) -> tuple[Net, torch.optim.Optimizer, Any]:
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        if state is not None:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
        more = {"state": state["session"]} if state is not None else {}
        return model, optimizer, attach(
            model, optimizer=optimizer, masks={"layer": MASK}, hold="integers", knobs={"hold": {"bits": 3}}, **more
        )  # fmt: skip

    whole, optimizer, session = begin()
    steps(whole, optimizer, session, 0, 5)
    state = {"model": whole.state_dict(), "optimizer": optimizer.state_dict(), "session": session.state_dict()}
    state = torch.utils._pytree.tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, state)
    steps(whole, optimizer, session, 5, 9)
    again, optimizer, other = begin(state)
    steps(again, optimizer, other, 5, 9)
    session.finish(), other.finish()
    assert torch.equal(whole.weight, again.weight)


def test_as_a_recovery_of_a_task(tmp_path: Path) -> None:
    knobs = {"recovery": {"bits": 4}}
    more: dict[str, Any] = {"sparsity": 0.7, "epochs": 0.5, "recovery": "qat", "knobs": knobs}
    made = train(TASK, "magnitude-finetune", out=tmp_path / "o", storage="smallest", **more)
    assert made.sparsity == pytest.approx(0.7, abs=0.01)
    told = json.loads((tmp_path / "o" / "stored.json").read_text())["weights"]
    for name, mask in made.masks.items():
        weight = made.model.get_submodule(name).weight.detach().reshape(mask.shape)
        assert not bool(weight[~mask].any()) and bool(weight.any())
        assert all(len(row.unique()) <= 16 for row in weight)
        assert told[f"{name}.weight"]["form"].endswith("integers") and told[f"{name}.weight"]["bits"] <= 4
    again = load(tmp_path / "o", TASK.model(0))
    assert all(torch.equal(a, b) for a, b in zip(made.model.parameters(), again.parameters(), strict=True))


def test_a_smaller_model_is_rounded_too() -> None:
    more: dict[str, Any] = {"sparsity": 0.5, "epochs": 0.5, "recovery": "qat", "steps": 1}
    made = train(TASK, "l1-norm", knobs={"recovery": {"bits": 3}}, **more)
    for layer in find_layers(made.model)[0]:
        assert all(len(row.unique()) <= 8 for row in layer.weight())


def test_what_cannot_be() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(RecipeError, match="is not a divisor of the 8 inputs"):
        attach(model, optimizer=optimizer, masks={"layer": MASK}, hold="integers", knobs={"hold": {"group": 3}})
    with pytest.raises(RecipeError, match="bits must be a whole number from 2 to 8"):
        attach(model, optimizer=optimizer, masks={"layer": MASK}, hold="integers", knobs={"hold": {"bits": 1}})
