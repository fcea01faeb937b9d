"""Early exits: what leaves is answered as it would be alone, and later blocks run on the rest."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from typer.testing import CliRunner

import secateur
from secateur.cli import app
from secateur.errors import ModelError, RecipeError
from secateur.measure.flops import flops
from secateur.registry import get
from secateur.runtime.between import find_places
from secateur.runtime.exits import Exits, early_exit, joint
from secateur.runtime.threshold import sweep
from secateur.tasks.base import cross_entropy
from secateur.tasks.nets import resnet, vgg

from .models import classifier, images, vectors, vit

NETS: dict[str, tuple[Any, Any]] = {
    "resnet": (lambda: resnet(4, 1), images),
    "vgg": (lambda: vgg(2), images),
    "vit": (vit, images),
    "tokens": (lambda: classifier(depth=4), vectors),
}


def made(name: str, **knobs: Any) -> tuple[Exits, Tensor]:
    """A network with exits that say something, and inputs for it."""
    torch.manual_seed(0)
    net, inputs = NETS[name]
    gates = early_exit(net().eval(), inputs(2), **knobs).eval()
    for p in gates.exits.parameters():
        nn.init.normal_(p, generator=torch.Generator().manual_seed(1))
    return gates, inputs(12)


def entropies(gates: Exits, x: Tensor) -> Tensor:
    with torch.no_grad():
        said = gates.through(x)[1]
    return torch.stack([torch.distributions.Categorical(logits=z).entropy() for z in said], 1)


def test_the_criteria_are_their_formulas() -> None:
    z = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    p = z.softmax(-1)
    torch.testing.assert_close(get("criterion", "exit-entropy")({"exit_logits": z}), -(p * p.log()).sum(-1))
    first, second = p.sort(-1, descending=True).values[:, :2].unbind(1)
    torch.testing.assert_close(get("criterion", "softmax-response")({"exit_logits": z}), 1 - (first - second))
    a, b = z, z.roll(1, 0)
    cosine = (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
    torch.testing.assert_close(get("criterion", "state-saturation")({"state_before": a, "state_after": b}), 1 - cosine)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 3), st.integers(0, 999), st.booleans())
def test_a_sweep_is_every_threshold_by_brute_force(inputs: int, exits: int, seed: int, ties: bool) -> None:
    g = torch.Generator().manual_seed(seed)
    doubt = torch.rand(inputs, exits, generator=g)
    doubt = (4 * doubt).round() / 4 + 0.1 if ties else doubt
    right = torch.rand(inputs, exits + 1, generator=g) > 0.5
    costs = (torch.rand(exits + 1, generator=g).cumsum(0)).tolist()

    def at(threshold: float) -> tuple[float, int, tuple[int, ...]]:
        where = [next((k for k in range(exits) if doubt[i, k] < threshold), exits) for i in range(inputs)]
        left = tuple(where.count(k) for k in range(exits + 1))
        return sum(costs[k] for k in where) / inputs, sum(bool(right[i, k]) for i, k in enumerate(where)), left

    points = sweep(doubt, right, costs)
    for p in points:
        cost, hits, left = at(p.threshold)
        assert (p.right, p.left) == (hits, left) and p.cost == pytest.approx(cost)
    every = {at(t)[2] for t in [0.0, *(float(v) + 1e-7 for v in doubt.flatten())]}
    assert {p.left for p in points} == every
    assert [p.cost for p in points] == sorted((p.cost for p in points), reverse=True)


@pytest.mark.parametrize("name", NETS)
def test_a_batch_is_its_inputs_one_at_a_time(name: str) -> None:
    gates, x = made(name)
    doubt = entropies(gates, x)
    gates.threshold = float(doubt.quantile(0.3))
    out, where = gates.run(x)
    wanted = [next((k for k in range(doubt.shape[1]) if d[k] < gates.threshold), doubt.shape[1]) for d in doubt]
    assert where.tolist() == wanted and len(set(wanted)) > 1
    alone = [gates.run(row) for row in x.split(1)]
    assert [int(w) for _, w in alone] == wanted
    torch.testing.assert_close(out, torch.cat([o for o, _ in alone]), rtol=1e-4, atol=1e-5)
    stays = [i for i, k in enumerate(wanted) if k == doubt.shape[1]]
    torch.testing.assert_close(out[stays], gates.model(x)[stays], rtol=1e-4, atol=1e-5)
    # what is executed in a batch is what each costs by itself
    assert flops(gates, x).total == sum(gates.record["costs"][k] for k in wanted)


def test_when_all_have_left_nothing_more_runs() -> None:
    gates, x = made("resnet")
    gates.threshold = math.log(10) + 1
    ran: list[str] = []
    for name in ("4", "5", "8"):
        gates.model.get_submodule(name).register_forward_hook(lambda *_, n=name: ran.append(n))
    out, where = gates.run(x)
    assert gates.places[0] == "3" and ran == [] and where.tolist() == [0] * 12 and out.shape == (12, 10)
    gates.threshold = None
    torch.testing.assert_close(gates(x), gates.model(x))
    assert len(ran) == 6


def test_an_encoder_with_padding() -> None:
    t = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    net = t.BertForSequenceClassification(t.BertConfig(vocab_size=40, num_labels=4, **sizes)).eval()
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 40, (9, 12), generator=g)
    mask = (torch.arange(12) < torch.randint(4, 13, (9, 1), generator=g)).long()
    gates = early_exit(net, {"input_ids": ids, "attention_mask": mask}).eval()
    assert gates.places == ("bert.encoder.layer.0", "bert.encoder.layer.1")
    for p in gates.exits.parameters():
        nn.init.normal_(p, std=0.3, generator=g)
    with torch.no_grad():
        said = gates.through(input_ids=ids, attention_mask=mask)[1]
    gates.threshold = float(torch.stack([torch.distributions.Categorical(logits=z).entropy() for z in said]).median())
    out, where = gates.run(input_ids=ids, attention_mask=mask)
    assert len(set(where.tolist())) > 1
    assert torch.equal(gates.run(ids, mask)[1], where)  # by position
    for i, length in enumerate(mask.sum(1).tolist()):  # alone, and without its padding
        one, at = gates.run(input_ids=ids[i : i + 1, :length])
        assert int(at) == int(where[i])
        torch.testing.assert_close(out.logits[i], one.logits[0], rtol=1e-3, atol=1e-4)


def test_the_joint_loss_is_that_of_every_exit() -> None:
    gates, x = made("resnet", weight=0.3)
    y = torch.arange(12) % 10
    gates.train()
    got = joint(cross_entropy, gates, (x, y))
    wanted = cross_entropy(gates.model, (x, y)) + 0.3 * sum(nn.functional.cross_entropy(z, y) for z in gates.answers)
    torch.testing.assert_close(got, wanted)
    got.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in gates.parameters())
    assert float(gates.penalty()) == 0.0 and len(gates.answers) == len(gates.places)


def batches(gates: Exits, x: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [(part, gates.model(part).argmax(1)) for part in x.split(5)]


def test_the_threshold_is_the_least_that_reaches_the_target() -> None:
    gates, x = made("vit", target="flops 20%")
    gates.settle(batches(gates, x))
    before, after = gates.record["flops"]["before"], gates.record["flops"]["after"]
    assert after <= 0.8 * before and flops(gates, x).total == pytest.approx(12 * after)
    doubt = entropies(gates, x)
    assert gates.threshold is not None
    for lower in doubt[doubt < gates.threshold].tolist():  # at any lower one that leaves less, the target is missed
        where = [next((k for k, d in enumerate(row) if d < lower), 2) for row in doubt.tolist()]
        cost = sum(gates.record["costs"][k] for k in where) / 12
        assert cost > 0.8 * before or cost == after


def test_a_threshold_that_other_inputs_would_not_keep_is_told() -> None:
    def told(jump: float) -> Exits:
        gates = early_exit(
            nn.Sequential(_Block(), _Block(), nn.Linear(4, 3)).eval(), torch.zeros(2, 4), target="flops 20%"
        )
        x = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
        x[::2, 0] += jump  # one half of the data is clear, the other is not
        with torch.no_grad():
            gates.eval().exits["0"].norm = nn.Identity()  # type: ignore[union-attr]
            gates.exits["0"].linear.weight[0, 0] = 1.0  # type: ignore[union-attr, operator, index]
        gates.settle([(x, torch.zeros(200, dtype=torch.long))])
        return gates

    sure, unsure = told(0.0), told(9.0)
    for gates in (sure, unsure):
        assert gates.record["flops"]["after"] <= 0.8 * gates.record["flops"]["before"]
    assert sure.record["notes"] == []
    assert "is not sure: a threshold for 8" in unsure.told() or "is not sure: a threshold for 7" in unsure.told()


def test_a_drop_is_kept_and_what_is_saved_is_the_most() -> None:
    gates, x = made("resnet", drop=0.25)
    data = batches(gates, x)
    gates.settle(data)
    costs, doubt = gates.record["costs"], entropies(gates, x)
    best = 12 * costs[-1]
    for t in [0.0, *(float(v) + 1e-6 for v in doubt.flatten())]:
        gates.threshold = t
        out, where = gates.run(x)
        if int((out.argmax(1) == torch.cat([y for _, y in data])).sum()) >= 9:
            best = min(best, sum(costs[k] for k in where.tolist()))
    assert gates.record["flops"]["after"] == pytest.approx(best / 12)
    assert gates.record["accuracy"]["exits"] >= gates.record["accuracy"]["last"] - 0.25


def test_thresholds_that_do_nothing_or_everything_are_told() -> None:
    gates, x = made("resnet", threshold=1e-9)
    gates.settle(batches(gates, x))
    assert gates.record["left"][-1] == 1.0 and "no input leaves: the threshold 1e-09 is below" in gates.told()
    gates, x = made("resnet", threshold=2.3)
    for p in gates.exits.parameters():
        nn.init.normal_(p, std=5.0, generator=torch.Generator().manual_seed(0))
    gates.settle(batches(gates, x))
    assert gates.record["left"][0] == 1.0 and "every input leaves at the first exit" in gates.told()
    gates, x = made("resnet", drop=0.0)
    truth = gates.model(x).argmax(1)
    never = next(c for c in range(10) if c not in truth.tolist())
    with torch.no_grad():  # exits that are certain, and always wrong
        for exit in gates.exits.values():
            exit.linear.weight.zero_()  # type: ignore[union-attr, operator]
            exit.linear.bias.copy_(50.0 * nn.functional.one_hot(torch.tensor(never), 10))  # type: ignore[union-attr]
    gates.settle([(x, truth)])
    assert gates.record["left"][-1] == 1.0 and gates.record["accuracy"]["exits"] == 1.0
    assert "costs more than the drop of 0" in gates.told()


class _Mixing(nn.Module):
    """Takes the mean over the batch away between its blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = _Block(), _Block(), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.head(self.b(x - x.mean(0)))


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x).relu()


def test_refusals() -> None:
    x, net = images(1), resnet(4, 1)
    with pytest.raises(ModelError, match="Linear has no blocks"):
        early_exit(nn.Linear(4, 3), torch.zeros(2, 4))
    torch.manual_seed(0)
    with pytest.raises(ModelError, match="answers otherwise when other inputs have left"):
        early_exit(_Mixing(), torch.randn(2, 4))
    with pytest.raises(ModelError, match="gives no logits"):
        early_exit(nn.Sequential(_Block(), _Block(), nn.Linear(4, 1)), torch.zeros(2, 4))
    for knobs, words in (
        ({"threshold": 0.0}, "no entropy is below 0"),
        ({"threshold": 2.5}, "no entropy of 10 classes is above 2.3"),
        ({"threshold": 1.0, "drop": 0.1}, "one of target, drop, threshold: drop and threshold are given"),
        ({"drop": -0.1}, "drop is -0.1"),
        ({"target": "params 30%"}, "in FLOPs"),
        ({"target": "flops 99%"}, "out of reach: an input that leaves behind 3 has taken"),
        ({"at": (2,)}, "blocks 0 to 1"),
        ({"exits": 0}, "one at least"),
        ({"weight": 0.0}, "weight is 0"),
    ):
        with pytest.raises(RecipeError, match=words):
            early_exit(net, x, **knobs)  # type: ignore[arg-type]


def test_blocks_are_found() -> None:
    def found(net: nn.Module, x: Tensor) -> tuple[str, ...]:
        return find_places(net.eval(), ((x,), {})).paths

    assert found(resnet(4, 2), images(2)) == ("3", "4", "5", "6", "7", "8")
    assert found(vit(), images(2)) == ("blocks.0", "blocks.1", "blocks.2")
    plain = found(vgg(2), images(2))
    assert len(plain) == 13 and all(isinstance(vgg(2).get_submodule(n), nn.ReLU) for n in plain)


def test_trained_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained on a task with labels, kept, and the same after it is loaded."""
    monkeypatch.setattr("secateur.runtime.measured.SINGLES", 4)
    out = tmp_path / "out"
    words = ["train", "digits", "--method", "early-exit", "--set", "early-exit.drop=0.05", "--epochs", "0.4"]
    done = CliRunner().invoke(app, [*words, "--set", "task.images=250", "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert "early-exit behind 3, 4, below" in done.output and "same answer" in done.output
    again: Any = secateur.load(out, resnet(8, 1))
    x = torch.randn(20, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    assert isinstance(again, Exits) and again.threshold == again.record["chosen"]
    assert sum(again.record["left"]) == pytest.approx(1.0)
    assert again.record["accuracy"]["exits"] >= again.record["accuracy"]["last"] - 0.05
    assert again(x).shape == (20, 10)


def test_one_block_is_named_by_its_number() -> None:
    """As --set early-exit.at=1 does."""
    assert made("resnet", at=1)[0].places == made("resnet", at=(1,))[0].places
    with pytest.raises(RecipeError, match="numbers of blocks"):
        made("resnet", at="0,1")
