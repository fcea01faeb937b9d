"""Gates that press on easy inputs and compare inputs: the losses by hand, thresholds, targets, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import conv2d, cross_entropy, relu

import secateur
from secateur.errors import RecipeError
from secateur.measure.flops import flops
from secateur.runtime import ManifoldGates, manidp
from secateur.runtime.manidp import joint, unlike
from secateur.runtime.settling import saved, whole
from secateur.tasks import Task, find
from secateur.tasks.base import cross_entropy as task_loss

from .cnns import odd, pictures, plain, residual, taught


def between(score: Tensor) -> float:
    """In the middle of two of the positive scores, so that rounding decides nothing."""
    found = score.detach()[score > 0].unique()
    return float(found[len(found) // 2 - 1 :][:2].mean())


def test_a_layer_by_the_equations() -> None:
    """Saliencies, masks and what comes out, channel by channel."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 3, 1), nn.Flatten()).eval()
    net = nn.Sequential(*net, nn.LazyLinear(2))
    x = torch.randn(3, 2, 6, 6)
    net(x)
    gated = taught(manidp(net, x[:1], density=0.6))
    conv, norm, gate = net[0], net[1], gated.gates[0].requires_grad_(False)
    seen: list[Tensor] = []
    net[3].register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with torch.no_grad():
        level = between(gate(x).score)
        gate.threshold.fill_(level)
        gated(x)
        decided = gated.decisions(x)["0"]
    some = set()
    for b in range(3):
        inner = [max(0.0, float(sum(gate.inner.weight[j, c] * x[b, c].mean() for c in range(2)))) for j in range(5)]
        for o in range(5):
            p = max(0.0, float(sum(gate.predict.weight[o, j] * inner[j] for j in range(5)) + gate.predict.bias[o]))
            z = conv2d(x[b : b + 1], conv.weight[o : o + 1], conv.bias[o : o + 1])[0, 0].detach()
            z = (z - norm.running_mean[o]) / (norm.running_var[o] + norm.eps).sqrt() * norm.weight[o] + norm.bias[o]
            some.add(p >= level)
            assert bool(decided[b, o]) == (p >= level)
            wanted = relu(p * z.detach()) if p >= level else torch.zeros_like(z)
            torch.testing.assert_close(seen[0][b, o], wanted.detach(), rtol=1e-4, atol=1e-5)
    assert some == {True, False}


def test_the_loss_by_hand() -> None:
    """Weights of inputs by their losses, mean saliencies, and similarities, in plain loops."""
    net, x, y = plain(), pictures(5), torch.tensor([0, 1, 2, 3, 4])
    gated = manidp(net, x[:1], density=0.5, lasso=0.3, alike=0.7, easy=0.5).train()
    scores: list[Tensor] = []
    for gate in gated.gates:
        gate.register_forward_hook(lambda m, a, out: scores.append(out.score.detach().clone()))
    made: list[Tensor] = []
    gated.see = lambda number, z: made.append(z.detach())
    gated.level.fill_(5.0)
    logits: list[Tensor] = []
    gated.register_forward_hook(lambda m, a, out: logits.append(out.detach()))
    loss = joint(task_loss, gated, (x, y))
    losses = [float(cross_entropy(logits[0][i : i + 1], y[i : i + 1])) for i in range(5)]
    torch.testing.assert_close(loss.detach(), torch.tensor(sum(losses) / 5))
    weights = [max(0.0, (2.5 - loss) / 2.5) for loss in losses]
    assert any(weights)
    wanted = 0.3 * sum(w * float(s[i].mean()) for s in scores for i, w in enumerate(weights)) / 5
    for s, z in zip(scores, made, strict=True):
        features = z.relu().mean((2, 3))
        for a in range(5):
            for b in range(5):
                ours = s[a] @ s[b] / (s[a].norm() * s[b].norm())
                theirs = features[a] @ features[b] / (features[a].norm() * features[b].norm())
                wanted += 0.7 * float(ours - theirs) ** 2 / 25
    torch.testing.assert_close(gated.penalty().detach(), torch.tensor(wanted))
    assert float(gated.penalty()) == 0.0  # it is of the last pass alone
    torch.testing.assert_close(gated.level, torch.tensor(5.0 + 0.1 * (sum(losses) / 5 - 5.0)))


def test_only_easy_inputs_are_pressed() -> None:
    net, x = plain(), pictures(4)
    gated = manidp(net, x[:1], density=0.5, lasso=1.0, alike=0.0).train()
    gated.level.fill_(2.0)
    gated(x)
    gated.hear(torch.tensor([0.0, 0.5, 1.0, 7.0]))
    assert gated.weight is not None and gated.weight.tolist() == [1.0, 0.5, 0.0, 0.0]
    pressed = gated.penalty()
    gated(x[:2])
    gated.hear(torch.tensor([1.5, 3.0]))
    assert float(gated.penalty().detach()) == 0.0 < float(pressed.detach())
    gated(x)
    assert float(gated.penalty().detach()) > float(pressed.detach())  # no losses were heard: all count
    pressed.backward()
    assert all(p.grad is not None for g in gated.gates for p in g.predict.parameters())


@given(st.integers(1, 12), st.floats(0.01, 1.0), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_an_input_like_the_mean_keeps_exactly_the_share(channels: int, share: float, seed: int) -> None:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(1, 1 + channels, 1), nn.ReLU(), nn.Conv2d(1 + channels, 2, 1), nn.Flatten())
    gate = manidp(nn.Sequential(*net, nn.Linear(8, 2)).eval(), torch.zeros(1, 1, 2, 2), density=share).gates[0]
    gate.mean.copy_(torch.rand(1 + channels) + 0.1)  # no two are the same
    gate.aim(share)
    exact = share * (1 + channels)
    if abs(exact % 1 - 0.5) > 1e-3:
        assert int((gate.mean >= gate.threshold).sum()) == max(1, round(exact))
    gate.aim(share / 2)
    lower = gate.threshold.clone()
    gate.aim(share)
    assert gate.threshold <= lower


def test_unlike_is_zero_for_what_is_alike() -> None:
    x = torch.rand(4, 3)
    assert float(unlike(x, 5 * x)) < 1e-12 < float(unlike(x, x.flip(0)))
    assert torch.isfinite(unlike(torch.zeros(2, 3), x[:2]))


@pytest.mark.parametrize("make", [plain, residual, odd])
def test_executed_is_masked_counted_and_a_batch_is_its_inputs(make: Any) -> None:
    net, x = make(), pictures(4)
    gated = taught(manidp(net, x[:1], density=0.5))

    def half(gate: nn.Module, args: Any, out: Any) -> None:
        gate.threshold.copy_(between(out.score))

    for gate in gated.gates:  # about half of what each decides on passes
        handle = gate.register_forward_hook(half)
        gated(x)
        handle.remove()
    out = gated(x)
    one_by_one = [flops(gated, one).total for one in x.split(1)]
    assert len(set(one_by_one)) > 1  # inputs differ in their work
    of_all, dense = whole(gated, ((x,), {}))
    assert [of_all - saved(gated, ((one,), {})) for one in x.split(1)] == pytest.approx(one_by_one)
    assert of_all - saved(gated, ((x,), {})) == pytest.approx(sum(one_by_one) / 4)
    assert dense == flops(net, x[:1]).total and gated.executes
    gated.executes = False
    torch.testing.assert_close(gated(x), out, rtol=1e-4, atol=1e-5)
    gated.executes = True
    torch.testing.assert_close(torch.cat([gated(one) for one in x.split(1)]), out, rtol=1e-4, atol=1e-5)


def test_training_begins_at_the_dense_network_and_its_density_falls() -> None:
    net, x = plain(10), pictures(4)
    gated = manidp(net, x[:1], density=0.5, ramp=0.5)
    for gate in gated.gates:
        nn.init.zeros_(gate.predict.weight)
    torch.testing.assert_close(gated(x), net(x))
    seen = []
    for k in range(21):
        gated.advance(k / 20)
        seen.append(gated.gates[0].keep)
    assert seen[0] == 1.0 and seen[5] == pytest.approx(0.75) and seen[10:] == [0.5] * 11
    assert seen == sorted(seen, reverse=True)


def test_thresholds_are_raised_together_until_the_target_is_met(tmp_path: Path) -> None:
    net, x = residual(8), pictures(6)
    gated = taught(manidp(net, x[:1], target="flops 40%"))
    labels = torch.zeros(6, dtype=torch.long)
    for gate in gated.gates:
        gate.mean.uniform_(0.0, 2.0)
        gate.threshold.zero_()  # too much passes
    gated.settle([(x, labels)])
    found = sum(flops(gated, one).total for one in x.split(1)) / 6
    assert found <= 0.6 * gated.record["flops"]["before"]
    assert gated.record["flops"]["after"] == round(found) and gated.record["notes"] == []
    assert 0 < gated.record["settled"] < 1
    secateur.save(gated, tmp_path / "out")
    again = secateur.load(tmp_path / "out", residual(8, seed=3))
    assert isinstance(again, ManifoldGates) and torch.equal(again(x), gated(x))
    for gate in gated.gates:
        gate.mean.fill_(-1.0)  # every channel passes whatever the share is
        nn.init.ones_(gate.predict.bias)
        nn.init.zeros_(gate.predict.weight)
    gated.settle([(x, labels)])
    assert "not met" in gated.record["notes"][0] and "not met" in gated.told()
    gated.settle([])
    assert "no validation data" in gated.told()


def small(**more: Any) -> Any:
    given = {"target": "flops 50%", "epochs": 1.0, "length": 1.0, "every": 0.0, "knobs": {"rate": 1.0}}
    task = find("digits", images=150, width=4)
    torch.manual_seed(0)
    return secateur.train("digits", "manidp", model=task.model(0), options=task.options, **given | more)


class Stopped(Exception):
    pass


def test_a_run_is_resumed_and_meets_its_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secateur.runtime.measured.SINGLES", 4)
    once = small()

    def progress(leg: str, done: int, of: int) -> None:
        if (leg, done) == ("gates", 1):
            raise Stopped

    with pytest.raises(Stopped):
        small(out=tmp_path / "out", progress=progress)
    again = small(out=tmp_path / "out")
    left, right = once.model.state_dict(), again.model.state_dict()
    assert left.keys() == right.keys() and all(torch.equal(v, right[k]) for k, v in left.items())
    assert again.run["flops"]["after"] <= 0.5 * again.run["flops"]["before"] and float(again.model.level) > 0
    x = torch.randn(2, 1, 12, 12)
    fresh = find("digits", images=150, width=4).model(5)
    assert torch.equal(secateur.load(tmp_path / "out", fresh)(x), again.model(x))


def test_a_loss_that_has_none_for_each_input_is_refused_before_any_training() -> None:
    digits = find("digits", images=100, width=4)

    def contrast(model: nn.Module, batch: Any) -> Tensor:
        x = model(batch[0])
        return cross_entropy(x @ x.T, torch.arange(len(x)))

    def progress(leg: str, done: int, of: int) -> None:
        raise AssertionError("it trained")

    task = Task(digits.model, digits.batches, loss=contrast, name="contrast")
    with pytest.raises(RecipeError, match="neither the mean nor the sum.*choose a method"):
        secateur.train(task, "manidp", target="flops 50%", epochs=0.1, progress=progress)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({}, "one of them"), ({"density": 0.0}, "above 0"), ({"target": "params 50%"}, "not in params"),
        ({"target": "flops 99.99%"}, "out of reach"), ({"density": 0.5, "easy": 0.0}, "easy is above 0"),
        ({"density": 0.5, "squeeze": 0}, "squeeze 1"), ({"density": 0.5, "lasso": -1.0}, "0 or more"),
    ],
)  # fmt: skip
def test_bad_options(options: dict[str, Any], match: str) -> None:
    with pytest.raises(RecipeError, match=match):
        manidp(plain(), pictures(1), **options)
