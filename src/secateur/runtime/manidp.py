"""Manifold-regularized dynamic pruning: inputs that are alike keep like channels, and easy inputs fewer of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, normalize

from ..errors import RecipeError
from ..measure.flops import flops
from ..registry import get, register
from ..select import keep_count
from ..tasks.singles import losses_of_inputs
from .channels import ChannelGates, Decision, reaching, restored
from .places import Place, find
from .settling import settled
from .structure import call_of

#: How much of the way to a batch's means those of training go.
_FOLLOWS = 0.1
#: Channels from which on the inner layer of a gate is narrower.
_WIDE = 80


def unlike(saliency: Tensor, features: Tensor) -> Tensor:
    """How much the similarities of inputs by their channels' saliencies differ from those by their features.

    >>> round(float(unlike(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.eye(2))), 3)  # 1 and 1 where it is 0 and 0
    0.5
    """
    ours, theirs = (x @ x.T for x in (normalize(saliency), normalize(features)))
    return (theirs - ours).square().mean()


class Saliency(nn.Module):
    """Predicts how salient each channel will be; those above the layer's threshold are computed, and scaled by it.

    Attributes:
        inner, predict: two layers, on the mean of each channel that is read.
        mean: of each channel's saliency over inputs; it follows the batches of training.
        threshold: lets through as many channels as are wanted of an input whose saliencies are the means.
        density: the share of the channels that is wanted in the end; ``keep`` at this moment.
        fixed: so many channels whatever the input, where the cost alone is asked for.
        each: mean saliency for each input of the last batch of training.
    """

    mean: Tensor
    threshold: Tensor

    def __init__(self, place: Place, density: float, alike: float, ramp: float, squeeze: int, seed: int) -> None:
        super().__init__()
        width = max(1, place.outputs // max(1, squeeze if place.outputs >= _WIDE else squeeze // 2))
        self.inner = nn.Linear(place.inputs, width, bias=False)
        self.predict = nn.Linear(width, place.outputs)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            nn.init.kaiming_normal_(self.inner.weight, generator=generator)
            nn.init.trunc_normal_(self.predict.weight, std=0.01, a=-0.02, b=0.02, generator=generator)
            self.predict.bias.fill_(1.0)
        self.register_buffer("mean", torch.ones(place.outputs))
        self.register_buffer("threshold", torch.zeros(()))
        self.density, self.alike, self.ramp = density, alike, ramp
        self.keep = 1.0
        self.fixed: int | None = None
        self.each: Tensor | None = None

    def forward(self, x: Tensor) -> Decision:
        size = x.flatten(2).mean(2, dtype=torch.promote_types(x.dtype, torch.float32)).float()
        inner = linear(size, self.inner.weight.float()).relu()
        facts = {"channel_size": inner, "gate_weight": self.predict.weight, "gate_bias": self.predict.bias}
        score: Tensor = get("criterion", "predicted-saliency")(facts)
        if self.fixed is not None:
            mask = torch.arange(score.shape[1], device=x.device).expand(score.shape) < self.fixed
        else:
            mask = (score.detach() >= self.threshold) & (score.detach() > 0)
        return Decision(mask, score * mask, score)

    @torch.no_grad()
    def aim(self, share: float) -> None:
        """Set the threshold: between the means of ``round(share n)`` channels and the others; on a line in between."""
        ordered, at = self.mean.sort(descending=True).values, max(0.0, share * len(self.mean) - 0.5)
        if (k := int(at)) >= len(ordered) - 1:
            self.threshold.zero_()
        else:
            self.threshold.copy_(ordered[k].lerp(ordered[k + 1], at - k))

    def learn(self, decision: Decision, made: Tensor, rectified: bool) -> Tensor | None:
        self.each = decision.score.mean(1)
        with torch.no_grad():
            self.mean.lerp_(decision.score.mean(0).to(self.mean), _FOLLOWS)
        self.aim(self.keep)
        if not self.alike:
            return None
        fired = made.relu() if rectified else made
        return self.alike * unlike(decision.score, fired.flatten(2).float().mean(2))

    def advance(self, done: float) -> None:
        way = min(1.0, done / self.ramp) if self.ramp else 1.0
        self.keep = self.density + (1 - self.density) * (1 + math.cos(math.pi * way)) / 2


class ManifoldGates(ChannelGates):
    """`ChannelGates` that press on the saliencies of easy inputs.

    After training one density for all layers is looked for, with whose thresholds a target is just met.

    Attributes:
        level: mean loss of the inputs of training; it follows the batches.
    """

    level: Tensor

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.register_buffer("level", torch.zeros(()))
        self.weight: Tensor | None = None

    def hear(self, losses: Tensor) -> None:
        """The losses of the inputs of the last pass, from which their weights follow; see `penalty`."""
        limit = self.record["easy"] * self.level
        self.weight = (1 - losses / limit.clamp_min(1e-12)).clamp_min(0)
        mean = losses.mean().to(self.level)
        self.level.copy_(self.level.lerp(mean, _FOLLOWS) if float(self.level) else mean)

    def penalty(self) -> Tensor:
        """The similarities', and the mean saliencies of inputs by their weights; each counts 1 if no loss was heard."""
        found, each = super().penalty(), [gate.each for gate in self.saliencies() if gate.each is not None]
        weight, self.weight = self.weight, None
        for gate in self.saliencies():
            gate.each = None
        if not each:
            return found
        sizes = torch.stack(each).sum(0)
        lasso: Tensor = self.record["lasso"] * (sizes if weight is None else sizes * weight).mean()
        return found + lasso

    def settle(self, batches: Iterable[Any]) -> None:
        first = self.record["density"] if self.record["target"] is None else 1.0

        def move(way: float) -> None:
            for gate in self.saliencies():
                gate.aim(first * (1 - way))

        way = settled(self, batches, self.record["target"], move)
        self.record["settled"] = first * (1 - way)

    def saliencies(self) -> list[Saliency]:
        """The gates."""
        return [gate for gate in self.gates if isinstance(gate, Saliency)]


def joint(loss: Callable[[nn.Module, Any], Tensor], gates: ManifoldGates, batch: Any) -> Tensor:
    """The task's loss; the gates hear what it is for each input."""
    whole, each = losses_of_inputs(loss, gates, batch)
    gates.hear(each)
    return whole


def _restored(model: nn.Module, saved: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ManifoldGates:
    r = saved["record"]
    numbers = float(r["density"]), float(r["alike"]), float(r["ramp"]), int(r["squeeze"])
    made = restored(model, saved, tensors, lambda place: Saliency(place, *numbers, seed=0))
    return ManifoldGates(made.model, made.places, list(made.gates), made.record)


@register(
    "transform", paper="2103.05861", survey=("B4", "E1"), when="runtime", restore=_restored, trained=True, alone=True,
    joint=joint,
)  # fmt: skip
def manidp(
    model: nn.Module,
    example: Any,
    *,
    density: float | None = None,
    target: str | None = None,
    lasso: float = 5e-3,
    alike: float = 0.1,
    easy: float = 0.5,
    squeeze: int = 2,
    ramp: float = 0.5,
    seed: int = 0,
) -> ManifoldGates:
    """Manifold-regularized dynamic pruning: easy inputs are pressed to use few channels, like inputs to use like ones.

    :: y = p 1[p >= t] norm(conv(x)),  p = (phi_2 (phi_1 mean(x))_+ + rho)_+,
       loss + lasso sum_l mean_i w_i mean(p_i) + alike sum_l |S(p) - S(y)|^2 / n^2,  w_i = (1 - loss_i / C)_+

    S are the cosines of the inputs of a batch with one another: by the saliencies p of their channels, and by the means
    of what the convolution made. An input is easy where its loss is below C, ``easy`` times the mean loss. Thresholds t
    follow the mean saliencies of training, such that ``density`` of the channels is above them; it falls from 1 along a
    cosine until the share ``ramp`` of the run. With a ``target`` such as ``"flops 50%"`` it is the largest density that
    meets it, and after training the thresholds of all layers are moved together to where validation data just meets it.

    Choose it where inputs differ in how hard they are, and each should use as many channels as it needs.

    Beware: it wants long training (the official code has 400 epochs); in short runs fbs loses less. The task's loss has
    to be a mean over inputs, or a sum; what is not is refused. How much is executed is an average. The weights stay as
    many; inputs of a batch run one by one.

    >>> from secateur.tasks.nets import vgg
    >>> gated = manidp(vgg(width=4).eval(), torch.zeros(1, 1, 28, 28), target="flops 50%")
    >>> gated.record["flops"]["after"] <= 0.5 * gated.record["flops"]["before"]
    True

    Source: Tang et al., Manifold regularized dynamic network pruning, arXiv 2103.05861, read in the official code
    (huawei-noah/Pruning), whose gates, losses and weights it has; the paper's text could not be read. Deviations: phi_2
    begins small, so that training begins at the dense network; the mean loss and the mean saliencies follow batches,
    where theirs are those of the last epoch; w is a weight alone, where theirs has a gradient, which raises the losses
    of easy inputs; round(d C) channels have a mean above the threshold, where theirs rounds up and takes the least of
    those means as the threshold; the density is reached earlier than at the end of the run. A target in FLOPs is ours.
    """
    if (density is None) == (target is None):
        raise RecipeError("manidp: say how many channels stay by density or by target, one of them")
    if density is not None and not 0 < density <= 1:
        raise RecipeError(f"manidp: density is {density:g}: it is a share of the channels, above 0 and at most 1")
    if not 0 <= ramp <= 1 or lasso < 0 or alike < 0 or easy <= 0 or squeeze < 1:
        raise RecipeError(
            "manidp: ramp is a share of the run, from 0 to 1, lasso and alike are 0 or more, easy is above 0, and "
            "squeeze 1 or more"
        )
    call = call_of(example)
    places = find(model, call)
    gates = [Saliency(p, density or 1.0, alike, ramp, squeeze, 1009 * seed + k) for k, p in enumerate(places)]
    made = ManifoldGates(model, places, gates, {}).to(next(model.parameters()).device)
    before = flops(model, *call[0], **call[1]).total

    def cost(share: float) -> int:
        for gate, place in zip(gates, places, strict=True):
            gate.fixed = max(1, keep_count(share, place.outputs))
        return made.cost(call)

    share = density if density is not None else reaching(str(target), before, cost, "manidp")
    after = cost(share)
    for gate in gates:
        gate.density, gate.fixed = share, None
    made.record = {
        "method": "manidp", "density": share, "target": target, "lasso": lasso, "alike": alike, "easy": easy,
        "squeeze": squeeze, "ramp": ramp, "flops": {"before": before, "after": after},
    }  # fmt: skip
    return made
