"""Each method during training against a plain loop of its own, written from its paper."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import secateur
from secateur.granularity import parse
from tests.when.runs import attached, backward, batch, mlp, run, sgd

LR, MOMENTUM, DECAY = 0.1, 0.9, 1e-2


def top(score: Tensor, count: int) -> Tensor:
    """A mask of the largest, ties to the earlier."""
    order = sorted(range(score.numel()), key=lambda i: (-float(score.reshape(-1)[i]), i))
    mask = torch.zeros(score.numel(), dtype=torch.bool)
    mask[order[:count]] = True
    return mask.view_as(score)


def names(model: nn.Module) -> list[str]:
    return [n for n, p in model.named_parameters() if p.dim() == 2]


class Reference:
    """Plain SGD with momentum on dense weights; the model reads masked ones, and a rule turns its gradients."""

    def __init__(self, rule: Callable[[Tensor, Tensor, Tensor], Tensor], decay: float = 0.0) -> None:
        self.model = mlp()
        self.rule, self.decay = rule, decay
        self.weights = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        self.buffers: dict[str, Tensor] = {}
        self.masks = {n: torch.ones_like(self.weights[n], dtype=torch.bool) for n in names(self.model)}

    def gradients(self, k: int) -> dict[str, Tensor]:
        """At the masked weights."""
        x, y = batch(k)
        read = {n: (w * self.masks[n] if n in self.masks else w).requires_grad_() for n, w in self.weights.items()}
        loss = nn.functional.cross_entropy(functional_call(self.model, read, (x,)), y)
        return dict(zip(read, torch.autograd.grad(loss, list(read.values())), strict=True))

    def step(self, gradients: dict[str, Tensor]) -> None:
        for n, g in gradients.items():
            if n in self.masks:
                g = self.rule(self.weights[n], g, self.masks[n])
            g = g + self.decay * self.weights[n]
            self.buffers[n] = MOMENTUM * self.buffers[n] + g if n in self.buffers else g
            self.weights[n] = self.weights[n] - LR * self.buffers[n]

    def read(self) -> dict[str, Tensor]:
        return {n: w * self.masks[n] if n in self.masks else w for n, w in self.weights.items()}


def compared(method: str, reference: Reference, change: Callable[[Reference, int], None], **more: Any) -> None:
    """Run both; ``change`` makes the reference's masks after a step."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=reference.decay)
    session = attached(model, method, optimizer, **more)
    change(reference, 0)
    for k in run(model, optimizer, session):
        reference.step(reference.gradients(k - 1))
        change(reference, k)
        expected = reference.read()
        for n, p in model.named_parameters():
            assert torch.allclose(p, expected[n], atol=1e-5), (method, k, n)
        assert all(torch.equal(session.masks[n.removesuffix(".weight")], m) for n, m in reference.masks.items())
    assert any(not bool(m.all()) for m in reference.masks.values())


def test_sr_ste_is_straight_through_with_decay() -> None:
    def change(r: Reference, k: int) -> None:
        for n, w in r.weights.items():
            if n in r.masks:
                rows = w.abs().reshape(-1, 4)
                r.masks[n] = torch.stack([top(x, 2) for x in rows]).view_as(w)

    compared("sr-ste", Reference(lambda w, g, m: g + 0.3 * w * ~m), change, knobs={"hold": {"decay": 0.3}})


def test_dpf_moves_dense_weights_by_the_gradient_at_the_pruned_point() -> None:
    def change(r: Reference, k: int) -> None:
        if k % 4 == 0:
            share = 0.75 * (1 - (1 - min(1.0, k / 18)) ** 3)
            everything = torch.cat([r.weights[n].abs().reshape(-1) for n in r.masks])
            mask = top(everything, round((1 - share) * len(everything)))
            parts = mask.split([m.numel() for m in r.masks.values()])
            r.masks = {n: p.view_as(r.masks[n]) for n, p in zip(r.masks, parts, strict=True)}

    compared("dpf", Reference(lambda w, g, m: g), change)


def test_top_kast_trains_a_larger_set_and_makes_it_pay() -> None:
    reach: dict[int, Tensor] = {}

    def rule(w: Tensor, g: Tensor, m: Tensor) -> Tensor:
        density = m.double().mean().item()
        return (g + 0.05 * torch.where(m, w, w / density)) * reach[m.numel()]

    def change(r: Reference, k: int) -> None:
        if k % 4 == 0:
            for n in r.masks:
                size = r.weights[n].abs()
                r.masks[n] = top(size, round(0.25 * size.numel()))
                reach[size.numel()] = top(size, round(0.5 * size.numel()))

    knobs = {"driver": {"every": 4}, "hold": {"penalty": 0.05}}
    compared("top-kast", Reference(rule), change, knobs=knobs)


@pytest.mark.parametrize("method", ["movement", "soft-movement"])
def test_movement_gathers_minus_weight_times_straight_through_gradient(method: str) -> None:
    reference = Reference(lambda w, g, m: g * m)
    scores = {n: torch.zeros_like(reference.weights[n]) for n in reference.masks}
    plain = reference.gradients

    def gradients(k: int) -> dict[str, Tensor]:
        found = plain(k)
        for n, score in scores.items():
            score -= reference.weights[n] * found[n]
        return found

    reference.gradients = gradients  # type: ignore[method-assign]

    def change(r: Reference, k: int) -> None:
        if k < 2:
            return
        share = 0.75 * (1 - (1 - min(1.0, (k - 2) / 15)) ** 3)
        if method == "movement":
            r.masks = {n: top(s, int((1 - share) * s.numel() + 0.5 + 1e-9)) for n, s in scores.items()}
            return
        everything = torch.cat([s.reshape(-1) for s in scores.values()])
        mask = top(everything, round((1 - share) * len(everything)))
        parts = mask.split([s.numel() for s in scores.values()])
        r.masks = {n: p.view_as(scores[n]) for n, p in zip(scores, parts, strict=True)}

    compared(method, reference, change)


def test_gsm_gives_the_gradient_to_the_most_salient_of_this_very_batch() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=DECAY)
    session = attached(model, "gsm", optimizer, knobs={"hold": {"fade": 0.0}})
    reference = Reference(lambda w, g, m: g, decay=DECAY)
    plain = reference.gradients

    def gradients(k: int) -> dict[str, Tensor]:
        found = plain(k)
        salient = torch.cat([(reference.weights[n] * found[n]).abs().reshape(-1) for n in reference.masks])
        parts = top(salient, round(0.25 * len(salient))).split([m.numel() for m in reference.masks.values()])
        for n, part in zip(reference.masks, parts, strict=True):
            found[n] = found[n] * part.view_as(found[n])
        return found

    for k in run(model, optimizer, session):
        reference.step(gradients(k - 1))
        assert all(torch.allclose(p, reference.weights[n], atol=1e-5) for n, p in model.named_parameters())
    session.finish()
    everything = torch.cat([reference.weights[n].abs().reshape(-1) for n in reference.masks])
    kept = torch.cat([session.masks[n.removesuffix(".weight")].reshape(-1) for n in reference.masks])
    assert torch.equal(kept, top(everything, round(0.25 * len(everything))))


def test_platon_ranks_smoothed_sensitivity_times_uncertainty() -> None:
    model = mlp()
    optimizer = sgd(model)
    session = attached(model, "platon", optimizer)
    mean, doubt = ({n: torch.zeros_like(model.get_parameter(n)) for n in names(model)} for _ in range(2))
    for k in range(24):
        backward(model, k)
        optimizer.step()
        for n in mean:
            now = (model.get_parameter(n) * model.get_parameter(n).grad).abs().detach()
            mean[n] = 0.85 * mean[n] + 0.15 * now
            doubt[n] = 0.95 * doubt[n] + 0.05 * (now - mean[n]).abs()
        session.step()
        if k + 1 >= 2:
            share = 0.75 * (1 - (1 - min(1.0, (k + 1 - 2) / 15)) ** 3)
            everything = torch.cat([(mean[n] * doubt[n]).reshape(-1) for n in mean])
            kept = torch.cat([session.masks[n.removesuffix(".weight")].reshape(-1) for n in mean])
            assert torch.equal(kept, top(everything, round((1 - share) * len(everything))))


def exchanged(method: str, when: int, **driver: Any) -> tuple[nn.Module, secateur.Session, dict[str, Any]]:
    """A run up to one exchange: what was there, and weights, gradients and momentum as the exchange saw them."""
    model = mlp()
    optimizer = sgd(model, weight_decay=0.0)
    knobs = {"driver": {"every": when, **driver}}
    session = attached(model, method, optimizer, steps=100, knobs=knobs)
    for k in range(when):
        backward(model, k)
        optimizer.step()
        seen = {
            x.name: {
                "mask": session.masks[x.name], "weight": x.weight().clone() * session.masks[x.name],
                "gradient": x.gradient().clone(), "momentum": optimizer.state[x.stored]["momentum_buffer"].clone(),
            }
            for x in session.layers
        }  # fmt: skip
        session.step()
    return model, session, seen


def test_snfs_moves_weights_to_layers_of_large_momentum() -> None:
    _, session, seen = exchanged("snfs", 3, fraction=0.2)
    share = 0.2 * 0.5 * (1 + math.cos(math.pi * 3 / 100))
    stay, total, worth = {}, 0, {}
    for name, s in seen.items():
        count = int(s["mask"].sum())
        out = round(share * count)
        stay[name] = top(s["weight"].abs().masked_fill(~s["mask"], -1), count - out)
        total += out
        worth[name] = s["momentum"].abs()[stay[name]].mean().item()
    whole = sum(worth.values())
    for name, s in seen.items():
        new = session.masks[name]
        grown = int((new & ~stay[name]).sum())
        assert abs(grown - total * worth[name] / whole) < 1 and bool((new | ~stay[name]).all())
        assert torch.equal(new, stay[name] | top(s["momentum"].abs().masked_fill(stay[name], -1), grown))
    assert sum(int((session.masks[n] & ~stay[n]).sum()) for n in seen) == total
    assert len({round(session.masks[n].double().mean().item(), 3) for n in seen}) > 1  # layers differ now


def test_dsr_drops_the_smallest_of_all_layers_and_shares_out_by_what_is_left() -> None:
    _, session, seen = exchanged("dsr", 3, fraction=0.4)
    everything = torch.cat([s["weight"].abs().masked_fill(~s["mask"], -1).reshape(-1) for s in seen.values()])
    total = sum(int(s["mask"].sum()) for s in seen.values())
    parts = top(everything, total - round(0.4 * total)).split([s["mask"].numel() for s in seen.values()])
    left = {n: p.view_as(s["mask"]) for (n, s), p in zip(seen.items(), parts, strict=True)}
    assert len({round(int(left[n].sum()) / int(s["mask"].sum()), 3) for n, s in seen.items()}) > 1
    for name, mask in left.items():
        new = session.masks[name]
        grown = round(0.4 * total) * int(mask.sum()) / (total - round(0.4 * total))
        assert bool((new | ~mask).all()) and abs(int((new & ~mask).sum()) - grown) < 1


def test_mest_spares_what_moves_and_grows_on_top() -> None:
    _, session, seen = exchanged("mest", 3, fraction=0.4)
    share = 0.4 * 0.5 * (1 + math.cos(math.pi * 3 / 75))
    for name, s in seen.items():
        count = int(s["mask"].sum())
        new = session.masks[name]
        assert bool((new | ~s["mask"]).all())  # nothing has come on top yet, so nothing goes
        assert int(new.sum()) == count + min(round(share * count), new.numel() - count)
    model = mlp()
    optimizer = sgd(model, weight_decay=0.0)
    session = attached(model, "mest", optimizer, steps=100, knobs={"driver": {"every": 3}, "criterion": {"lam": 2.0}})
    base = {x.name: int(session.masks[x.name].sum()) for x in session.layers}
    for k in range(6):
        backward(model, k)
        optimizer.step()
        old = session.masks
        worth = {x.name: (x.weight() * old[x.name]).abs() + 2 * x.gradient().abs() for x in session.layers}
        session.step()
    for name, score in worth.items():
        stay = top(score.masked_fill(~old[name], -1), base[name])
        assert bool((session.masks[name] | ~stay).all())


def test_deep_r_is_a_walk_in_which_a_flipped_sign_is_death() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    knobs = {"hold": {"l1": 0.05, "temperature": 0.0}}
    session = attached(model, "deep-r", optimizer, knobs=knobs)
    deaths = 0
    for k in range(23):  # the last step exchanges nothing
        before = {x.name: x.weight().clone() for x in session.layers}
        signs = {n: v["sign"].clone() for n, v in session.state_dict()["history"].items()}
        masks = session.masks
        backward(model, k)
        optimizer.step()
        session.step()
        for x in session.layers:
            mask = masks[x.name]
            sign = signs[x.name] * 2.0 - 1
            after = before[x.name] - 0.1 * (x.gradient() + 0.05 * sign)
            alive = mask & (after * sign >= 0)
            new = session.masks[x.name]
            assert bool((new | ~alive).all()) and int(new.sum()) == int(mask.sum())
            assert torch.allclose(x.weight()[alive], after[alive], atol=1e-6)
            assert not bool(x.weight()[new & ~alive].any())  # born at zero
            deaths += int((mask & ~alive).sum())
    assert deaths > 20


def test_the_noise_of_deep_r_has_the_variance_of_its_temperature() -> None:
    torch.manual_seed(0)
    model = nn.Linear(200, 200, bias=False)
    start = model.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    knobs = {"hold": {"l1": 0.0, "temperature": 1e-10}}
    session = secateur.attach(model, "deep-r", optimizer=optimizer, steps=9, sparsity=0.5, knobs=knobs)
    model(torch.zeros(1, 200)).sum().backward()
    optimizer.step()
    mask = session.masks[""] if "" in session.masks else next(iter(session.masks.values()))
    moved = (model.weight.detach() - start)[mask]
    assert moved.var().item() == pytest.approx(2 * 0.5 * 1e-10, rel=0.1)
    assert not bool(model.weight.detach()[~mask].any())


def test_srigl_keeps_one_fan_in_and_ablates_by_brute_force() -> None:
    model, session, seen = exchanged("srigl", 3, fraction=0.9, ablate=0.6)
    assert model is session.model
    ablated = 0
    share = 0.9 * 0.5 * (1 + math.cos(math.pi * 3 / 75))
    for number, (name, s) in enumerate(seen.items()):
        mask, new = s["mask"], session.masks[name]
        count, rows = int(mask.sum()), mask.shape[0]
        fan = count // rows
        out = min(round(share * count), mask.numel() - count)
        stay = top(s["weight"].abs().masked_fill(~mask, -1), count - out)
        grow = top(s["gradient"].abs().masked_fill(mask, -1), out)
        go = [r for r in range(rows) if int((stay | grow)[r].sum()) < 0.6 * fan and number < 2]
        ablated += len(go)
        width = min(mask.shape[1], count // (rows - len(go)))
        for r in range(rows):
            if r in go:
                assert not bool(new[r].any())
                continue
            missing = width - int(stay[r].sum())
            grown = top(s["gradient"][r].abs().masked_fill(stay[r], -1), missing)
            assert torch.equal(new[r], stay[r] | grown)
    assert ablated > 0


@pytest.mark.parametrize("method", ["rigl", "gmp", "sr-ste", "srigl"])
def test_counts_hold_on_granularities(method: str) -> None:
    """Rows and N:M keep their exact counts in every step, whatever changes the masks."""
    text = {"srigl": "row", "sr-ste": "1:4"}.get(method, "2:4")
    model = mlp()
    optimizer = sgd(model)
    pattern = parse(text)
    more = {"allocation": "uniform", "sparsity": 1 - (pattern.keep or 0.25), "granularity": text}
    session = attached(model, method, optimizer, **more)
    for k in run(model, optimizer, session):
        for mask in session.masks.values():
            kept = pattern.split(mask).sum((1, 2))
            if method != "gmp" or k >= 18:
                assert len(kept[kept > 0].unique()) == 1
