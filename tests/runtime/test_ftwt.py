"""Gates that foretell what fires: wanted masks, what they learn from, thresholds, targets."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import binary_cross_entropy_with_logits

import secateur
from secateur.errors import DataError, RecipeError
from secateur.measure.flops import flops
from secateur.runtime import ftwt
from secateur.runtime.ftwt import mass_mask

from .cnns import pictures, plain, residual, taught


@given(st.integers(1, 6), st.integers(0, 99), st.sampled_from([0.05, 0.3, 0.8, 1.0]))
@settings(max_examples=30, deadline=None)
def test_wanted_masks_against_a_plain_loop(channels: int, seed: int, mass: float) -> None:
    peak = torch.rand(3, channels, generator=torch.Generator().manual_seed(seed)).relu()
    peak[0, 0] = 0.0
    for row, found in zip(peak, mass_mask(peak, mass), strict=True):
        share = (row / row.sum().clamp_min(1e-12)).tolist()
        wanted, held = set(), 0.0
        for c in sorted(range(channels), key=lambda c: -share[c]):
            held += share[c]
            if not wanted or (held - mass <= 1e-5 if mass < 1 else share[c] > 1e-5):
                wanted.add(c)
        assert set(found.nonzero().flatten().tolist()) == wanted


def test_gates_learn_from_what_fires_and_from_nothing_else() -> None:
    """The loss is the paper's, and it reaches the gates alone; the task's does not reach them."""
    net, x = plain(), pictures(4)
    gated = ftwt(net, x[:1], [x], mass=0.7, pace=1.0).train()
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    for _k, gate in enumerate(gated.gates):
        gate.register_forward_hook(lambda m, a, out: kept.append((out.score, torch.zeros(()))))
    seen: dict[int, torch.Tensor] = {}
    gated.see = lambda number, z: seen.__setitem__(number, z.detach())
    task = gated(x).square().sum()
    loss = gated.penalty()
    wanted = [mass_mask(seen[k].relu().flatten(2).amax(2), 0.7).float() for k in range(4)]
    by_hand = sum(binary_cross_entropy_with_logits(kept[k][0], wanted[k], reduction="none").sum(1).mean() for k in range(4))  # fmt: skip  # noqa: E501
    torch.testing.assert_close(loss, by_hand / 4)
    loss.backward(retain_graph=True)
    assert all(p.grad is None for p in net.parameters())
    assert all(p.grad is not None for p in gated.gates.parameters())
    before = [p.grad.clone() for p in gated.gates.parameters() if p.grad is not None]
    task.backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(before, gated.gates.parameters(), strict=True))  # type: ignore[arg-type]
    gated.advance(0.6)  # after the cooldown they are left alone
    gated(x)
    assert float(gated.penalty()) == 0.0


def test_as_many_pass_as_are_wanted() -> None:
    net, x = plain(), pictures(6)
    gated = ftwt(net, x[:1], [x], mass=0.6).train()
    gate = gated.gates[0]
    for _ in range(80):
        gated(x)
        gated.penalty()
    z = net[2](net[1].train()(net[0](x))).detach()
    wanted = mass_mask(z.flatten(2).amax(2), 0.6).sum()
    passed = gate(x).mask.sum()
    assert abs(int(wanted) - int(passed)) <= 2


def test_executed_is_masked_and_inputs_differ_in_their_work() -> None:
    net, x = residual(), pictures(4)
    gated = taught(ftwt(net, x[:1], [x], mass=0.7))
    executed = gated(x)
    gated.executes = False
    torch.testing.assert_close(gated(x), executed, rtol=1e-4, atol=1e-5)
    gated.executes = True
    torch.testing.assert_close(torch.cat([gated(one) for one in x.split(1)]), executed, rtol=1e-4, atol=1e-5)
    assert len({flops(gated, one).total for one in x.split(1)}) > 1


def test_thresholds_are_raised_to_the_target_and_never_lowered(tmp_path: Path) -> None:
    net, x = plain(8), pictures(6)
    gated = taught(ftwt(net, x[:1], [x], target="flops 60%"))
    limit = 0.4 * gated.record["flops"]["before"]
    for gate in gated.gates:
        gate.threshold.fill_(-5.0)  # too much passes
    assert flops(gated, x).total / 6 > limit
    gated.settle([(x[:1], torch.zeros(1)), (x[1:], torch.zeros(5))])  # all batches count
    found = flops(gated, x).total / 6
    assert found <= limit and gated.record["raised"] > 0 and gated.record["flops"]["after"] == round(found)
    for gate in gated.gates:
        gate.threshold.fill_(-200.0)  # too much passes, however far they are raised
    gated.settle([(x, torch.zeros(6))])
    assert "target 'flops 60%' is not met: with the highest thresholds" in gated.record["notes"][0]
    assert gated.record["notes"][0] in gated.told()
    for gate in gated.gates:
        gate.threshold.fill_(11.0)  # nothing passes: the answer is one for all
    gated.settle([(x, torch.zeros(6))])
    assert gated.record["raised"] == 0.0 and torch.isfinite(gated(x)).all()
    secateur.save(gated, tmp_path / "out")
    assert torch.equal(secateur.load(tmp_path / "out", plain(8, seed=3))(x), gated(x))


def test_bad_options() -> None:
    net, x = plain(), pictures(1)
    for options, match in (({}, "one of them"), ({"mass": 1.5}, "at most 1"), ({"mass": 0.5, "pace": 0.0}, "pace")):
        with pytest.raises(RecipeError, match=match):
            ftwt(net, x, [x], **options)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="out of reach"):
        ftwt(net, x, [x], target="flops 99.99%")
    with pytest.raises(DataError, match="there is no batch"):
        ftwt(net, x, [], mass=0.5)
