"""Recoveries that train: with the task's data and loss, masks held at every step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn

from ..errors import RecipeError
from ..registry import register

Loss = Callable[[nn.Module, Any], Tensor]


class Training(Protocol):
    """A pruned model with what it takes to train it.

    Attributes:
        model: pruned; its masks hold while `fit` runs.
        seed: of the run.
    """

    model: nn.Module
    seed: int

    @property
    def loss(self) -> Loss:
        """The task's."""

    def fit(
        self, length: float, *, begin: float = 0.0, rate: float = 1.0, loss: Loss | None = None, masks: bool = True,
        hold: str = "zero", **knobs: Any,
    ) -> None:  # fmt: skip
        """Train for ``length`` times the task's epochs, from a share of the schedule on, at a factor of its rate.

        Args:
            hold, knobs: what becomes of weights while the masks hold.
        """

    def rewind(self, to: float) -> None:
        """Give what stays the weights that it had at that share of the dense run."""

    def fresh(self, seed: int) -> None:
        """Give what stays new initial weights."""

    def teacher(self) -> nn.Module:
        """The dense model, trained, in evaluation mode."""

    def cost(self) -> float:
        """FLOPs of a forward pass without those of zeros, over the dense model's."""

    def masks(self) -> dict[str, Tensor]:
        """Layer name -> mask ``(o, i)``; True keeps."""


@register("recovery", paper="1506.02626", data="task")
def finetune(run: Training, *, length: float = 0.5, rate: float = 0.1) -> None:
    """Train on: the weights that stay, the task's loss, a smaller learning rate.

    The task's own schedule over ``length`` times its epochs, at ``rate`` times its learning rate.

    Choose it as the default after pruning, and to compare everything else with.

    Beware: rate and length decide the result as much as the method does; with ``rate`` 1 the schedule starts anew,
    which often ends higher.

    Source: Han et al., Learning both weights and connections, arXiv 1506.02626, section 3; Le and Hua, arXiv
    2105.03193, for the role of the rate.
    """
    run.fit(length, rate=rate)


@register("recovery", paper="1712.05877", data="task", survey="D1", trains="integers")
def qat(
    run: Training, *, bits: int = 8, group: int = 0, activations: int = 0, length: float = 0.5, rate: float = 0.1
) -> None:
    """Train on while the model reads weights rounded to integers; zeros stay zero (quantization-aware fine-tuning).

    Each step sees rounded weights and moves the floats behind them (hold integers). At the end the weights of the
    pruned layers, or of all layers of a smaller model, are integers of ``bits`` times a scale for each output, or for
    each ``group`` of inputs. A model that was quantized stays on its grids: its codes are trained. With ``activations``
    8 what linear layers read is rounded too, as int8-dynamic reads it.

    Choose it to prune and quantize a small network together, above all at 4 bits and less, where rounding after
    training costs most.

    Beware: weights stay floats that lie on a grid; ``--storage smallest`` and ``secateur compress`` make them small and
    fast.

    Source: Jacob et al., Quantization and training, arXiv 1712.05877, from the paper's description; see hold integers.
    """
    run.fit(length, rate=rate, hold="integers", bits=bits, group=group, activations=activations)


@register("recovery", paper="1510.00149", data="task", survey="D1", trains="shared")
def codebooks(run: Training, *, average: bool = True, length: float = 0.5, rate: float = 0.1) -> None:
    """Train the values that survivors share; which weight has which value stays, and zeros too (trained quantization).

    The gradient of a value is that of all weights that have it together (hold shared): their mean with ``average``, for
    the learning rates of tasks, else the sum, as in the paper.

    Choose it after ``--quantize shared:4`` and the like: the file stays as small as it was.

    Beware: with ``average`` false and plain SGD the rate must be smaller by the number of weights that share a value.

    Source: Han, Mao and Dally, Deep compression, arXiv 1510.00149, section 3.3; average is ours.
    """
    run.fit(length, rate=rate, hold="shared", average=average)


@register("recovery", paper="1912.05671", data="task", keeps="to")
def rewind(run: Training, *, to: float = 0.0, weights: bool = True) -> None:
    """Go back in the dense run, and train what stays from there to the end.

    :: w = mask * w_k, then train steps k to T; with ``weights`` false: w = mask * w_T, then train steps k to T

    ``to`` is the share k / T of the dense run; 0 is the initialization. With ``weights`` false only the schedule of the
    learning rate goes back. Momentum starts at zero, and each round sees the data in an order of its own.

    Choose it for lottery tickets, and learning-rate rewinding for the highest accuracy at a given sparsity.

    Beware: costs nearly a whole training run a round.

    Source: Frankle and Carbin, The lottery ticket hypothesis, arXiv 1803.03635; Frankle et al., Linear mode
    connectivity, arXiv 1912.05671, for late rewinding; Renda et al., arXiv 2003.02389, for learning-rate rewinding.
    """
    if not 0 <= to < 1:
        raise RecipeError(f"recovery 'rewind': to is a share of the dense run in [0, 1), not {to:g}")
    if weights:
        run.rewind(to)
    run.fit(1.0, begin=to)


@register("recovery", paper="1810.05270", data="task")
def scratch(run: Training, *, budget: str = "epochs", seed: int = 1) -> None:
    """Forget all weights: draw new ones, and train the sparse, or smaller, network as a dense one is trained.

    ``budget`` "epochs" trains as many epochs as the dense model had (scratch-E), "flops" as many more as the network
    is cheaper, but no more than twice as many (scratch-B). ``seed`` is added to the run's.

    Choose it as the control: what inheriting weights is worth.

    Source: Liu et al., Rethinking the value of network pruning, arXiv 1810.05270, section 3.
    """
    if budget not in ("epochs", "flops"):
        raise RecipeError(f"recovery 'scratch': budget is epochs or flops, not '{budget}'")
    length = 1.0 if budget == "epochs" else min(2.0, 1.0 / max(run.cost(), 1e-9))
    run.fresh(run.seed + seed)
    run.fit(length)
