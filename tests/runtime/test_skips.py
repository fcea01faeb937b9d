"""Gates on residual blocks: what is skipped does not run, a batch is its inputs, the target is met."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur
from secateur.errors import ModelError, RecipeError
from secateur.measure.flops import flops
from secateur.runtime.skips import Skips, skipnet, straight_through
from secateur.tasks.nets import resnet, vgg

from .models import images, vit

NETS: dict[str, Any] = {"resnet": lambda: resnet(4, 2), "vit": vit}


def made(name: str, seed: int = 0, **knobs: Any) -> tuple[Skips, Tensor]:
    """A network whose gates look at the input, and inputs for it."""
    torch.manual_seed(seed)
    x = images(6)
    gates = skipnet(NETS[name]().eval(), x[:1], **knobs).eval()
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for gate in gates.gates.values():
            gate.out.weight.copy_(torch.randn(1, 16, generator=g))  # type: ignore[union-attr, operator]
            gate.out.bias.copy_(torch.randn(1, generator=g))  # type: ignore[union-attr, operator]
    return gates, x


@pytest.mark.parametrize("name", NETS)
def test_a_batch_is_its_inputs_one_at_a_time(name: str) -> None:
    gates, x = made(name)
    with torch.no_grad():
        out, ran = gates.run(x)
        alone = [gates.run(row) for row in x.split(1)]
    assert ran.shape == (6, len(gates.places)) and 0 < int(ran.sum()) < ran.numel()
    assert torch.equal(ran, torch.cat([r for _, r in alone]))
    torch.testing.assert_close(out, torch.cat([o for o, _ in alone]), rtol=1e-4, atol=1e-5)
    costs = torch.tensor(gates.record["costs"])
    assert flops(gates, x).total == 6 * gates.record["fixed"] + int((ran * costs).sum())


def test_skipping_is_identity_and_executed() -> None:
    """Against a plain loop over the blocks, which calls those that are open, for each input."""
    gates, x = made("resnet", seed=1)
    with torch.no_grad():
        out, ran = gates.run(x)
        for i, row in enumerate(x.split(1)):
            for name, module in gates.model.named_children():
                if name not in gates.places or ran[i, gates.places.index(name)]:
                    row = module(row)
            torch.testing.assert_close(out[i : i + 1], row, rtol=1e-4, atol=1e-5)
    gates.shift = 1e9
    calls: list[int] = []
    gates.model.get_submodule("4.body").register_forward_hook(lambda *_: calls.append(1))
    assert not bool(gates.run(x)[1].any()) and calls == []
    gates.shift = -1e9
    torch.testing.assert_close(gates(x), gates.model(x))


def test_training_weighs_as_evaluation_leaves_out() -> None:
    gates, x = made("vit")
    with torch.no_grad():
        out, ran = gates.run(x)
        weighed, open_ = gates.train().run(x)
    assert torch.equal(ran, open_)
    torch.testing.assert_close(out, weighed, rtol=1e-4, atol=1e-5)


def test_the_gradient_is_that_of_the_sigmoid() -> None:
    logit = torch.tensor([-2.0, -0.1, 0.3, 4.0], requires_grad=True)
    gate = straight_through(logit)
    assert gate.tolist() == pytest.approx([0.0, 0.0, 1.0, 1.0])
    (gate * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum().backward()
    s = logit.detach().sigmoid()
    assert logit.grad is not None
    torch.testing.assert_close(logit.grad, torch.tensor([1.0, 2.0, 3.0, 4.0]) * s * (1 - s))


def test_the_penalty_is_the_squared_distance_to_the_target() -> None:
    gates, x = made("resnet", target="flops 40%", cost=7.0)
    gates.train()
    gates.advance(0.25)  # half way down
    ran = gates.run(x)[1].double().mean(0)
    record = gates.record
    share = (record["fixed"] + float((ran * torch.tensor(record["costs"])).sum())) / record["flops"]["before"]
    penalty = gates.penalty()
    assert float(penalty.detach()) == pytest.approx(7.0 * (share - 0.8) ** 2, rel=1e-4)
    penalty.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in gates.gates.parameters() if p.shape == (1,))


def test_the_target_is_reached_on_the_data() -> None:
    gates, x = made("vit", target="flops 35%")
    gates.settle([(x, torch.zeros(6, dtype=torch.long))])
    record = gates.record
    assert record["flops"]["after"] <= 0.65 * record["flops"]["before"]
    assert flops(gates, x).total == pytest.approx(6 * record["flops"]["after"])
    gates.shift -= 1e-3
    assert gates.told().startswith("skipnet, blocks run for: blocks.0")


def test_gates_that_do_not_look_are_told() -> None:
    gates, x = made("resnet")
    with torch.no_grad():
        for k, gate in enumerate(gates.gates.values()):
            gate.out.weight.zero_()  # type: ignore[union-attr, operator]
            gate.out.bias.fill_(float(k))  # type: ignore[union-attr, operator]
    gates.settle([x])
    assert set(gates.record["rates"]) == {0.0, 1.0} and "decide alike for every input" in gates.told()


def test_refusals() -> None:
    x = images(1)
    with pytest.raises(ModelError, match="does not give back its input"):
        skipnet(vgg(2), x)
    with pytest.raises(ModelError, match="has no blocks"):
        skipnet(nn.Linear(4, 3), torch.zeros(2, 4))
    with pytest.raises(RecipeError, match="out of reach: without every block"):
        skipnet(resnet(4, 2), x, target="flops 99%")
    with pytest.raises(RecipeError, match="in FLOPs"):
        skipnet(resnet(4, 2), x, target="params 30%")
    with pytest.raises(RecipeError, match="cost is 0"):
        skipnet(resnet(4, 2), x, cost=0)


def test_trained_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secateur.runtime.measured.SINGLES", 4)
    made = secateur.train(
        "digits", "skipnet", target="flops 10%", epochs=0.25, length=1.0, options={"images": 400}, out=tmp_path / "out",
        seed=0,
    )  # fmt: skip
    record = made.run
    assert record["flops"]["after"] <= 0.9 * record["flops"]["before"] and record["method"] == "skipnet"
    again: Any = secateur.load(tmp_path / "out", resnet(8, 1))
    x = torch.randn(5, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(again(x), made.model(x))
    assert again.shift == record["chosen"]
