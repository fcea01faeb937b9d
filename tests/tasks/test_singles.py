"""The losses of single inputs: against the loss of each alone, and the losses that have none."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from secateur.errors import RecipeError
from secateur.tasks.base import cross_entropy as plain
from secateur.tasks.singles import losses_of_inputs

X, Y = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 1, 0])


class Counted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm, self.calls = nn.Linear(3, 3), nn.BatchNorm1d(3), 0

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        return self.norm(self.layer(x))


def summed(model: nn.Module, batch: Any) -> Tensor:
    return cross_entropy(model(batch[0]), batch[1], reduction="sum")


def by_words(model: nn.Module, batch: Any) -> Tensor:
    device = next(model.parameters()).device  # the model itself can be asked
    return mse_loss(model(x=batch["x"].to(device)), batch["y"])


@pytest.mark.parametrize(
    ("loss", "batch"),
    [(plain, (X, Y)), (summed, (X, Y)), (by_words, {"x": X, "y": X.flip(0), "scale": torch.ones(())})],
)
def test_each_loss_is_that_of_the_answer_alone(loss: Any, batch: Any) -> None:
    """In training mode: what the model says of an input depends on the batch, and is asked for once."""
    torch.manual_seed(0)
    model = Counted().train()
    whole, each = losses_of_inputs(loss, model, batch)
    assert model.calls == 1 and "forward" not in vars(model) and not model._forward_hooks
    assert whole.requires_grad and not each.requires_grad and each.shape == (5,)
    out = Counted.forward(model, X).detach()
    for k in range(5):
        wanted = mse_loss(out[k], X.flip(0)[k]) if isinstance(batch, dict) else cross_entropy(out[k], Y[k])
        torch.testing.assert_close(each[k], wanted)
    one = (X[:1], Y[:1])
    if not isinstance(batch, dict):
        assert losses_of_inputs(loss, model.eval(), one)[1].shape == (1,)


def test_losses_that_have_none_for_each_input_are_refused() -> None:
    def twice(model: nn.Module, batch: Any) -> Tensor:
        return plain(model, batch) + plain(model, batch)

    def beside(model: nn.Module, batch: Any) -> Tensor:
        return cross_entropy(model.layer(batch[0]), batch[1])  # type: ignore[operator]

    def pairs(model: nn.Module, batch: Any) -> Tensor:
        x = model(batch[0])
        return cross_entropy(x @ x.T, torch.arange(len(x)))

    def whole(model: nn.Module, batch: Any) -> Tensor:
        return cross_entropy(model(batch[0]).view(5, 3), batch[1])

    for loss, why in (
        (twice, "asks the model 2 times"), (beside, "asks the model 0 times"), (pairs, "neither the mean nor the sum"),
        (whole, "one input alone"),
    ):  # fmt: skip
        model = Counted()
        with pytest.raises(RecipeError, match=why):
            losses_of_inputs(loss, model, (X, Y))
        assert "forward" not in vars(model)


def test_a_model_that_makes_its_own_loss_is_refused() -> None:
    class Own(Counted):
        def forward(self, x: Tensor) -> Any:
            out = super().forward(x)
            return {"logits": out, "loss": cross_entropy(out, Y)}

    with pytest.raises(RecipeError, match="not one answer for each input"):
        losses_of_inputs(lambda model, batch: model(batch[0])["loss"], Own(), (X, Y))

    class Closed(Counted):
        def forward(self, x: Tensor) -> Any:
            return SimpleNamespace(logits=super().forward(x))

    with pytest.raises(RecipeError, match="not one answer for each input"):
        losses_of_inputs(lambda model, batch: cross_entropy(model(batch[0]).logits, batch[1]), Closed(), (X, Y))
