"""DynamicViT: training masks what evaluation leaves out, exact counts, gradients, and the door of trained methods."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur
from secateur.errors import ModelError, RecipeError
from secateur.measure.flops import flops
from secateur.runtime import dynamicvit as method
from secateur.runtime.base import Learning
from secateur.runtime.predicted import DynamicViT, attend_to, drawn
from secateur.select import keep_count, select
from secateur.tasks import Task
from secateur.tasks.base import adamw
from secateur.tasks.nets import VisionTransformer

from .models import classifier, images, vectors, vit


def gates(special: int = 1, keep: float = 0.6, **knobs: Any) -> tuple[DynamicViT, Tensor]:
    net = vit() if special < 0 else classifier(special, pool=special == 0)
    x = images() if special < 0 else vectors()
    made = method(net, x, keep=keep, at=(0, 1), **knobs)
    for predictor in made.predictors:  # so that scores differ
        nn.init.normal_(predictor.out[-1].weight, generator=torch.Generator().manual_seed(3))
    return made, x


@pytest.mark.parametrize("special", [-1, 0, 1, 2])
def test_training_masks_what_evaluation_leaves_out(special: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the decisions of evaluation, the masked pass of training gives the same answer."""
    made, x = gates(special)
    free = made.structure.tokens - made.structure.protected
    counts = iter([keep_count(0.6, free), keep_count(0.36, free)])
    gone = torch.zeros(len(x), free, dtype=torch.bool)

    def highest(log: Tensor) -> Tensor:
        nonlocal gone
        stays = select(log[..., 0].masked_fill(gone, -1e9), next(counts))
        gone = ~stays
        return stays.float()

    monkeypatch.setattr("secateur.runtime.predicted.drawn", highest)
    left, tokens = made.eval().run(x)
    assert tokens == [made.structure.protected + keep_count(0.6**s, free) for s in (1, 2)]
    made.model.requires_grad_(False)
    masked = made.train()(x)
    torch.testing.assert_close(masked, left, rtol=1e-3, atol=1e-4)
    ratio = made.ratio / 2 * sum((keep_count(0.6**s, free) / free - 0.6**s) ** 2 for s in (1, 2))
    made.distill = 0.0
    counts = iter([keep_count(0.6, free), keep_count(0.36, free)])
    gone = torch.zeros(len(x), free, dtype=torch.bool)
    made(x)
    assert float(made.penalty().detach()) == pytest.approx(ratio, abs=1e-6)


def test_a_batch_is_its_inputs_one_at_a_time() -> None:
    made, x = gates(1)
    made.eval()
    torch.testing.assert_close(made(x), torch.cat([made(one) for one in x.split(1)]), rtol=1e-4, atol=1e-5)


def test_attention_by_a_plain_loop() -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, 5, 4, generator=g) for _ in range(3))
    there = (torch.rand(2, 5, generator=g) > 0.5).float()
    out = attend_to(q, k, v, there, None, 0.0)
    for b in range(2):
        for i in range(5):
            seen = [j for j in range(5) if there[b, j] or j == i]
            for h in range(2):
                weight = torch.softmax(torch.stack([q[b, h, i] @ k[b, h, j] / 2 for j in seen]), 0)
                wanted = sum(w * v[b, h, j] for w, j in zip(weight, seen, strict=True))
                torch.testing.assert_close(out[b, h, i], wanted, rtol=1e-4, atol=1e-4)


def test_draws_follow_the_probabilities_and_have_gradients() -> None:
    torch.manual_seed(0)
    log = torch.tensor([0.7, 0.3]).log().expand(1, 20000, 2).clone().requires_grad_()
    stays = drawn(log)
    assert set(stays.detach().unique().round(decimals=5).tolist()) == {0.0, 1.0}
    assert float(stays.mean().detach()) == pytest.approx(0.7, abs=0.02)
    stays.sum().backward()
    assert log.grad is not None and bool((log.grad[..., 0] > 0).all())


def test_every_part_of_the_loss_reaches_the_predictors() -> None:
    made, x = gates(0)
    assert isinstance(made, Learning)
    made.train()
    nn.functional.cross_entropy(made(x), torch.tensor([0, 1, 2])).backward()
    for predictor in made.predictors:
        assert float(predictor.out[-1].weight.grad.norm()) > 0
    made.zero_grad()
    made(x)
    made.penalty().backward()
    assert float(made.predictors[0].out[-1].weight.grad.norm()) > 0
    assert not any(p.requires_grad for p in made._teacher[0].parameters())


def test_the_target_is_met() -> None:
    net, x = vit(32, 4), images(1)
    made = method(net, x, target="flops 30%")
    dense = flops(net, x).total
    assert flops(made.eval(), x).total == made.record["flops"]["after"] <= 0.7 * dense
    free = made.structure.tokens
    more = method(net, x, keep=made.keep + 1 / free)
    assert more.record["flops"]["after"] > 0.7 * dense


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({}, "given: none"), ({"keep": 0.5, "target": "flops 30%"}, "given: keep, target"), ({"keep": 0.0}, "above 0"),
        ({"keep": 0.5, "at": (1, 0)}, "in their order"), ({"keep": 0.5, "at": ()}, "names no attention"),
        ({"keep": 0.5, "at": (9,)}, "attention 9"), ({"target": "flops 99%"}, "out of reach"),
        ({"keep": 0.5, "ratio": -1.0}, "weights"),
    ],
)  # fmt: skip
def test_bad_options(options: dict[str, Any], match: str) -> None:
    with pytest.raises(RecipeError, match=match):
        method(vit(), images(1), **options)


def task() -> Task:
    def batches(split: str, seed: int = 0, epoch: int = 0) -> Any:
        g = torch.Generator().manual_seed({"train": 0, "valid": 1, "test": 2}[split])
        for _ in range(3):
            y = torch.randint(4, (8,), generator=g)
            x = 0.3 * torch.randn(8, 1, 8, 8, generator=g)
            for k in range(8):
                r, c = divmod(int(y[k]), 2)
                x[k, 0, 4 * r : 4 * r + 4, 4 * c : 4 * c + 4] += 2
            yield x, y

    return Task(lambda seed: VisionTransformer(16, 3, 8, 4, patch=2), batches, optimizer=adamw, epochs=1)


def test_the_door(tmp_path: Path) -> None:
    made = secateur.train(task(), "dynamicvit", target="flops 25%", length=1.0, rate=1.0, out=tmp_path / "out")
    record = made.run
    assert record["flops"]["after"] <= 0.75 * record["flops"]["before"]
    again = secateur.load(tmp_path / "out", VisionTransformer(16, 3, 8, 4, patch=2))
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    assert torch.equal(again(x), made.model(x))
    assert again.run(x)[1] == record["tokens"][1:]


def test_refused() -> None:
    made = method(classifier(1), vectors(), keep=0.5)
    made.model.head = nn.Identity()
    made.model.forward = lambda x: (made.model.blocks(x),)
    with pytest.raises(ModelError):
        made.train()(vectors())
