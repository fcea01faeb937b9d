"""What a loss says of single inputs: it is asked again, of each answer that the model gave in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..errors import RecipeError

#: How near the mean, or the sum, of the losses of inputs must be to that of the batch: types of few bits round.
_NEAR = 0.02


def losses_of_inputs(
    loss: Callable[[nn.Module, Any], Tensor], model: nn.Module, batch: Any
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The loss of a batch, to train with, and that of each of its inputs, ``(inputs,)``, without gradients.

    The model runs once. What it says of one input is what it said in the batch.

    Raises:
        RecipeError: the loss of the batch is neither the mean nor the sum of those.

    >>> from .base import cross_entropy
    >>> pair = torch.tensor([[0.0, 9.0], [0.0, 0.0]]), torch.tensor([1, 1])
    >>> [round(x, 2) for x in losses_of_inputs(cross_entropy, nn.Identity(), pair)[1].tolist()]
    [0.0, 0.69]
    """
    said: list[Any] = []
    handle = model.register_forward_hook(lambda module, args, out: said.append(out))
    try:
        whole = loss(model, batch)
    finally:
        handle.remove()
    if len(said) != 1:
        raise _refused(f"it asks the model {len(said)} times for a batch")
    rows = next((len(x) for x in tree_leaves(batch) if isinstance(x, Tensor) and x.dim()), 0)
    answers = [x for x in tree_leaves(said[0]) if isinstance(x, Tensor)]
    if not answers or any(_row(x, 0, rows) is x for x in answers if x.is_floating_point()):
        raise _refused("what the model says is not one answer for each input")
    found = []
    with torch.no_grad():
        for k in range(rows):
            with _saying(model, tree_map(lambda x, k=k: _row(x, k, rows), said[0])):
                try:
                    found.append(loss(model, tree_map(lambda x, k=k: _row(x, k, rows), batch)).float().reshape(()))
                except (RuntimeError, TypeError, ValueError, IndexError) as error:
                    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                    raise _refused(f"it cannot be asked of one input alone ({reason})") from None
        each, value = torch.stack(found), whole.detach().float()
        near = (torch.isclose(x, value, rtol=_NEAR, atol=1e-4) for x in (each.mean(), each.sum()))
        if bool(value.isfinite()) and not any(map(bool, near)):
            raise _refused("it is neither the mean nor the sum of the losses of its inputs")
    return whole, each


def _row(x: Any, k: int, rows: int) -> Any:
    """One row of what has as many as there are inputs."""
    return x[k : k + 1] if isinstance(x, Tensor) and x.dim() and len(x) == rows else x


@contextmanager
def _saying(model: nn.Module, answer: Any) -> Iterator[None]:
    """Inside, the model gives one answer whatever it is asked."""
    model.forward = lambda *args, **kwargs: answer
    try:
        yield
    finally:
        del model.forward


def _refused(why: str) -> RecipeError:
    return RecipeError(
        f"this method weighs inputs by their losses, and the task's loss has none for each input: {why}; choose a "
        "method that does not, such as fbs"
    )
