"""TAS: a distribution over widths, its mixtures and what it leads to."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from torch import Tensor

import secateur
from secateur.calibrate import recalibrate
from secateur.errors import RecipeError
from secateur.learned import Gate, Now
from secateur.learned.widths import sizes_of, tas
from secateur.tasks import find
from secateur.testing import check_gate

from .test_units import trained, zero_channels

WEIGHT = torch.tensor([[0.1], [3.0], [2.0], [0.2], [5.0], [4.0], [0.3], [1.0], [0.4], [0.5]])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def made() -> Gate:
    return tas(WEIGHT, (1, 10), generator())


def test_what_gates_promise() -> None:
    check_gate("tas")


def test_the_mixture_by_its_definition() -> None:
    gate = made()
    assert gate.factor is not None and gate.density is not None
    a = torch.randn(1, 8, generator=generator(1))
    fixed = dict(gate.settle(WEIGHT, {"width": a}, Now(3, 10, 0.5, generator(2))))
    assert float(fixed["tau"]) == pytest.approx(10 - 0.3 * 9.9) and len(set(fixed["drawn"][0].tolist())) == 2
    logits = (a.log_softmax(-1) + fixed["gumbel"])[0] / fixed["tau"]
    sizes, largest = sizes_of(10), WEIGHT[:, 0].argsort(descending=True).tolist()
    wanted = torch.zeros(10)
    drawn = fixed["drawn"][0].tolist()
    total = sum(float(logits[k].exp()) for k in drawn)
    for k in drawn:
        for unit in largest[: sizes[k]]:
            wanted[unit] += float(logits[k].exp()) / total
    torch.testing.assert_close(gate.factor({"width": a}, fixed, True)[0], wanted)
    best = sizes[int(a.argmax())]
    assert gate.factor({"width": a}, fixed, False)[0].nonzero().flatten().tolist() == sorted(largest[:best])
    expected = float((a.softmax(-1)[0] * torch.tensor(sizes)).sum()) / 10
    assert float(gate.density(WEIGHT, {"width": a}, {}).mean()) == pytest.approx(expected)


def test_widths_are_drawn_as_often_as_the_distribution_says() -> None:
    """Near a temperature of 0 the first draw is the maximum under Gumbel noise, which the softmax distributes."""
    gate, a = tas(WEIGHT, (1, 10), generator(), hot=1e-3, cold=1e-3), torch.tensor([[2.0, 0, 0, 0, 0, 0, 0, 1.0]])
    first = torch.zeros(8)
    for k in range(800):
        fixed = dict(gate.settle(WEIGHT, {"width": a}, Now(0, 10, 0.5, generator(k))))
        first[int((a.log_softmax(-1) + fixed["gumbel"]).argmax())] += 1 / 800
        assert int((a + fixed["gumbel"]).argmax()) in fixed["drawn"][0].tolist()
    assert torch.allclose(first, a.softmax(-1)[0], atol=0.06)


def test_scores_keep_the_largest_units_first() -> None:
    gate = made()
    for seed in range(5):
        score = gate.score(WEIGHT, {"width": torch.randn(1, 8, generator=generator(seed))})[0]
        assert score.argsort(descending=True).tolist() == WEIGHT[:, 0].argsort(descending=True).tolist()


def test_gradients_follow_the_loss_of_the_two_widths() -> None:
    """Where the wider of two is better, its logit grows."""
    gate = made()
    assert gate.factor is not None
    a = torch.zeros(1, 8, requires_grad=True)
    fixed: dict[str, Tensor] = {
        "gumbel": torch.zeros(1, 8), "drawn": torch.tensor([[0, 7]]), "tau": torch.tensor([1.0])
    }  # fmt: skip
    (-gate.factor({"width": a}, fixed, True).sum()).backward()
    assert a.grad is not None and a.grad[0, 7] < 0 < a.grad[0, 0] and not a.grad[0, 1:7].abs().gt(1e-6).any()


def test_a_session_ends_at_the_target_with_units_at_zero() -> None:
    model, session = trained("tas", target="flops 50%", multiple=2)
    assert sum(zero_channels(model)) > 0
    small = session.shrink()
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())


def test_batch_norms_are_those_of_the_widths_that_are_left() -> None:
    """While it trains they see mixtures, on which statistics of a fixed width have no claim."""
    options = {"images": 200, "width": 4}
    made = secateur.train("digits", "tas", target="flops 30%", epochs=1, multiple=2, options=options)
    batches = list(islice(find("digits", **options).batches("train", 0, 0), 8))
    before = {k: v.clone() for k, v in made.model.named_buffers()}
    recalibrate(made.model, batches)
    assert len(before) > 3 and all(torch.equal(v, before[k]) for k, v in made.model.named_buffers())


@pytest.mark.parametrize("shape", [(2, 5), (1, 9)])
def test_only_units_have_widths(shape: tuple[int, int]) -> None:
    with pytest.raises(RecipeError, match="how many units stay"):
        tas(WEIGHT, shape, generator())
    with pytest.raises(RecipeError, match="temperature"):
        tas(WEIGHT, (1, 10), generator(), hot=0.1, cold=1.0)
