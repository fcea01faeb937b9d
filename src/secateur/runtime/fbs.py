"""Feature boosting and suppression: the channels that will be salient are computed, the others are not."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RecipeError
from ..layers import evaluating
from ..measure.flops import flops
from ..registry import get, register
from ..select import keep_count, select
from .channels import ChannelGates, Decision, reaching, restored, sizes_of
from .places import Place, find
from .structure import call_of


class Winners(nn.Module):
    """Predicts how salient each channel will be, and lets an exact number of the most salient ones through, scaled.

    Attributes:
        predict: from the sizes of the channels that are read.
        density: the share of the channels that wins in the end; ``keep`` at this moment.
    """

    def __init__(self, place: Place, density: float, lasso: float, ramp: float, seed: int) -> None:
        super().__init__()
        self.predict = nn.Linear(place.inputs, place.outputs)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            nn.init.trunc_normal_(self.predict.weight, std=0.01, a=-0.02, b=0.02, generator=generator)
            self.predict.bias.fill_(1.0)
        self.density, self.lasso, self.ramp = density, lasso, ramp
        self.keep = density

    def winners(self) -> int:
        """How many channels win."""
        return max(1, keep_count(self.keep, self.predict.out_features))

    def forward(self, x: Tensor) -> Decision:
        facts = {"channel_size": sizes_of(x), "gate_weight": self.predict.weight, "gate_bias": self.predict.bias}
        score: Tensor = get("criterion", "predicted-saliency")(facts)
        mask = select(score.detach(), self.winners())
        return Decision(mask, score * mask, score)

    def learn(self, decision: Decision, made: Tensor, rectified: bool) -> Tensor | None:
        return self.lasso * decision.score.sum(1).mean() if self.lasso else None

    def advance(self, done: float) -> None:
        steps = math.ceil(10 * (1 - self.density) - 1e-9)
        passed = steps if done >= self.ramp else math.floor(steps * done / self.ramp)
        self.keep = self.density if passed == steps else 1 - (1 - self.density) * passed / steps


def _restored(model: nn.Module, saved: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ChannelGates:
    r = saved["record"]
    numbers = float(r["density"]), float(r["lasso"]), float(r["ramp"])
    return restored(model, saved, tensors, lambda place: Winners(place, *numbers, seed=0))


@register(
    "transform", paper="1810.05331", survey=("B4", "E1"), when="runtime", restore=_restored, trained=True, alone=True
)
def fbs(
    model: nn.Module,
    example: Any,
    *,
    density: float | None = None,
    target: str | None = None,
    lasso: float = 1e-8,
    ramp: float = 0.5,
    seed: int = 0,
) -> ChannelGates:
    """Feature boosting and suppression: predict which channels of a convolution will be salient, and compute those.

    :: y = (pi(x) (norm(conv(x)) + beta))_+,  pi = wta_k(g),  g = (ss(x) phi + rho)_+,  loss + lasso sum |g|_1

    Each convolution of the model that can have one gets a gate; ``density`` of its channels win, the same share
    everywhere, or the largest share that meets a ``target`` such as ``"flops 50%"``. While it trains, the density goes
    from 1 down in steps of at most a tenth, until the share ``ramp`` of the run.

    Choose it for convolutional networks that answer one input at a time, where the work counts and the size does not.

    Beware: the weights stay as many. Inputs of a batch that disagree run one by one, so large batches gain nothing.

    >>> from secateur.tasks.nets import vgg
    >>> gated = fbs(vgg(width=4).eval(), torch.zeros(1, 1, 28, 28), density=0.5)
    >>> [int(m.sum()) for m in gated.decisions(torch.rand(1, 1, 28, 28)).values()][:4]
    [2, 2, 4, 4]

    Source: Gao et al., Dynamic channel pruning: feature boosting and suppression, arXiv 1810.05331, equations 3 to 6
    and section 4, and the official code (mayo), whose start of phi and rho it has. A norm keeps its scale, so that
    training begins at the dense network, where theirs gives it to pi; round(d C) channels win, where theirs rounds up.
    """
    if (density is None) == (target is None):
        raise RecipeError("fbs: say how many channels win by density or by target, one of them")
    if density is not None and not 0 < density <= 1:
        raise RecipeError(f"fbs: density is {density:g}: it is the share of the channels that wins, above 0, at most 1")
    if not 0 <= ramp <= 1 or lasso < 0:
        raise RecipeError("fbs: ramp is a share of the run, from 0 to 1, and lasso is 0 or more")
    call = call_of(example)
    places = find(model, call)
    gates = [Winners(p, density or 1.0, lasso, ramp, 1009 * seed + k) for k, p in enumerate(places)]
    made = ChannelGates(model, places, gates, {}).to(next(model.parameters()).device)
    before = flops(model, *call[0], **call[1]).total

    def cost(share: float) -> int:
        for gate in gates:
            gate.density = gate.keep = share
        return made.cost(call)

    share = density if density is not None else reaching(str(target), before, cost, "fbs")
    after = cost(share)
    with evaluating(made), torch.no_grad():
        counts = {p.conv: [gate.winners(), p.outputs] for p, gate in zip(places, gates, strict=True)}
    made.record = {
        "method": "fbs", "density": share, "lasso": lasso, "ramp": ramp, "channels": counts,
        "flops": {"before": before, "after": after},
    }  # fmt: skip
    return made
