"""Experts that do not run: against plain loops over tokens, counted, and exact on the data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import secateur
from secateur.errors import ModelError, RecipeError
from secateur.measure.flops import flops
from secateur.runtime.routing import Mass, Share, one_by_one

from .. import tiny

pytest.importorskip("transformers")
FAMILIES: dict[str, dict[str, Any]] = {"mixtral": {}, "qwen3-moe": {"num_experts": 6, "num_experts_per_tok": 3}}


def plain(net: Any, ids: Tensor, runs: Any) -> tuple[Tensor, int, list[list[float]]]:
    """The model with its experts as loops over tokens; how many experts ran; the shares of the lesser ones."""
    ran, seen, handles = [0], [], []

    def experts(number: int, module: Any, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        shares: list[float] = []
        for t in range(len(x)):
            w = weight[t].tolist()
            best = max(range(len(w)), key=lambda j: w[j])
            shares += [w[j] / w[best] for j in range(len(w)) if j != best]
            keep = runs(w, number)
            total = sum(w) / sum(w[j] for j in keep)
            for j in keep:
                gate, up = (module.gate_up_proj[index[t, j]] @ x[t]).chunk(2)
                out[t] += w[j] * total * (module.down_proj[index[t, j]] @ (module.act_fn(gate) * up))
                ran[0] += 1
        seen.append(shares)
        return out

    paths = [p for p, _ in net.named_modules() if p.endswith(".experts")]
    for number, path in enumerate(paths):
        module = net.get_submodule(path)
        module.__dict__["forward"] = lambda *a, m=module, n=number: experts(n, m, *a)
        handles.append(module)
    with torch.no_grad():
        logits = net(ids).logits
    for module in handles:
        del module.__dict__["forward"]
    return logits, ran[0], seen


@pytest.mark.parametrize("family", FAMILIES)
def test_skipping_against_plain_loops(family: str) -> None:
    net, ids = tiny.build(family, num_hidden_layers=2, **FAMILIES[family]), tiny.ids(2, 9)
    fast = secateur.prune(net, "expert-skipping", example=ids, data=ids, skip=0.5)
    least = fast.record["least"]
    wanted, ran, shares = plain(net, ids, lambda w, n: [j for j in range(len(w)) if w[j] / max(w) >= least[n]])
    k = net.config.num_experts_per_tok
    # What is skipped in the first layer changes no routing in front of it: exactly half of the lesser experts.
    assert sum(s < least[0] for s in shares[0]) == 18 * (k - 1) // 2
    with torch.no_grad():
        torch.testing.assert_close(fast(ids).logits, wanted, rtol=1e-4, atol=1e-5)
    assert (fast.ran, fast.chosen, fast.seen) == (ran, 2 * 18 * k, 36)


@pytest.mark.parametrize("mass", [0.5, 0.7, 1.0])
def test_mass_against_plain_loops(mass: float) -> None:
    net, ids = tiny.build("qwen3-moe", num_hidden_layers=2, **FAMILIES["qwen3-moe"]), tiny.ids(2, 9)
    fast = secateur.prune(net, "expert-mass", example=ids, mass=mass)

    def fewest(w: list[float], number: int) -> list[int]:
        kept: list[int] = []
        for j in sorted(range(len(w)), key=lambda j: -w[j]):
            if not kept or sum(w[i] for i in kept) < mass * sum(w) - 1e-6:
                kept.append(j)
        return kept

    wanted, ran, _ = plain(net, ids, fewest)
    with torch.no_grad():
        torch.testing.assert_close(fast(ids).logits, wanted, rtol=1e-4, atol=1e-5)
        if mass == 1.0:
            torch.testing.assert_close(fast(ids).logits, net(ids).logits, rtol=1e-4, atol=1e-5)
    fast.reset()
    with torch.no_grad():
        together = fast(ids).logits
        assert fast.ran == ran
        torch.testing.assert_close(together, torch.cat([fast(x).logits for x in ids.split(1)]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_that_are_left_out_do_not_run(family: str) -> None:
    net, ids = tiny.build(family, **FAMILIES[family]), tiny.ids(2, 9)
    fast = secateur.prune(net, "expert-mass", example=ids, mass=1e-3)
    with one_by_one(net):
        dense = flops(net, ids).total
    layers, k = 3, net.config.num_experts_per_tok
    size = net.config.hidden_size * (net.config.moe_intermediate_size if k == 3 else net.config.intermediate_size)
    assert dense - flops(fast, ids).total == layers * 18 * (k - 1) * 2 * 3 * size
    assert fast.record["flops"] == {"before": dense, "after": flops(fast, ids).total}
    assert fast.told().endswith(f"1.00 of {k} experts run for a token")


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5), st.integers(1, 6), st.floats(0.01, 1), st.integers(0, 1000))
def test_rules(tokens: int, k: int, level: float, seed: int) -> None:
    """The largest always runs; an expert that runs has none above it that does not; a lower level runs no more."""
    weight = torch.rand(tokens, k, generator=torch.Generator().manual_seed(seed)) + 1e-3
    for rule, less in ((Mass(level), Mass(level / 2)), (Share([1 - level]), Share([1 - level / 2]))):
        runs = rule(weight, 0)
        assert bool(runs.gather(1, weight.argmax(1, keepdim=True)).all())
        assert bool((weight.masked_fill(~runs, 9).amin(1) >= weight.masked_fill(runs, 0).amax(1)).all())
        assert not bool((less(weight, 0) & ~runs).any())
    kept = (weight * Mass(level)(weight, 0)).sum(1)
    assert bool((kept >= (level - 1e-5) * weight.sum(1)).all())


def test_the_first_expert_of_a_token_runs_always() -> None:
    net, ids = tiny.build("mixtral"), tiny.ids(2, 9)
    fast = secateur.prune(net, "expert-skipping", example=ids, data=ids, skip=1.0)
    assert fast.record["ran"] == 1.0


def test_saved_and_loaded(tmp_path: Path) -> None:
    net, ids = tiny.build("mixtral"), tiny.ids(2, 9)
    for method, knobs in (("expert-skipping", {"data": ids}), ("expert-mass", {"mass": 0.6})):
        fast = secateur.prune(net, method, example=ids, **knobs)
        secateur.save(fast, tmp_path / method)
        again = secateur.load(tmp_path / method)
        assert again.record == fast.record
        with torch.no_grad():
            assert torch.equal(again(ids).logits, fast(ids).logits)
        assert again.generate(ids, max_new_tokens=3, attention_mask=torch.ones_like(ids)).shape == (2, 12)


def test_refused() -> None:
    net, ids = tiny.build("mixtral"), tiny.ids(1, 9)
    with pytest.raises(ModelError, match="has no mixture of experts"):
        secateur.prune(tiny.build(), "expert-mass", example=ids)
    with pytest.raises(ModelError, match="has no mixture of experts"):
        secateur.prune(nn.Linear(2, 2), "expert-mass", example=torch.zeros(1, 2))
    with pytest.raises(RecipeError, match="skip is 2"):
        secateur.prune(net, "expert-skipping", example=ids, data=ids, skip=2)
    with pytest.raises(RecipeError, match="mass is 0"):
        secateur.prune(net, "expert-mass", example=ids, mass=0)
    with pytest.raises(RecipeError, match="pass data"):
        secateur.prune(net, "expert-skipping", example=ids)


def test_padding_is_no_evidence() -> None:
    net, ids = tiny.build("mixtral", num_hidden_layers=2), tiny.ids(2, 9)
    mask = nn.functional.pad(torch.ones_like(ids), (4, 0))
    batch = {
        "input_ids": nn.functional.pad(ids, (4, 0)), "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
    }  # fmt: skip
    one, other = (secateur.prune(net, "expert-skipping", example=ids, data=[d]).record["least"] for d in (ids, batch))
    assert one == pytest.approx(other, rel=1e-4)
