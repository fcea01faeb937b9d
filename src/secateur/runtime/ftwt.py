"""Fire together, wire together: gates learn to foretell which channels will fire, and the others are not computed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, linear
from torch.utils._pytree import tree_map

from ..errors import DataError, RecipeError
from ..layers import evaluating
from ..measure.flops import flops
from ..processes import together
from ..registry import get, register
from .channels import ChannelGates, Decision, inputs_of, reaching, restored
from .places import Place, find
from .settling import settled
from .structure import call_of

#: Batches that peaks are measured on.
_BATCHES = 2
#: By so much thresholds are raised at most.
_EDGE = 12.0
#: How much of the way to a batch's threshold a gate's goes.
_FOLLOWS = 0.1


def mass_mask(peak: Tensor, mass: float) -> Tensor:
    """The channels that fire most and hold at most this share of all firing, at least one: ``(batch, channels)``.

    >>> mass_mask(torch.tensor([[5.0, 1.0, 3.0, 1.0]]), 0.8).tolist()
    [[True, False, True, False]]
    """
    share = peak.float() / peak.float().sum(1, keepdim=True).clamp_min(1e-12)
    ordered, at = share.sort(dim=1, descending=True, stable=True)
    stays = ordered.cumsum(1) - mass <= 1e-5 if mass < 1 else ordered > 1e-5
    stays[:, 0] = True
    return torch.zeros_like(stays).scatter_(1, at, stays)


class Foretold(nn.Module):
    """Predicts which channels will be among those that fire most; they are computed, as they are.

    Attributes:
        predict: logits from the mean of each channel that is read.
        threshold: a logit above it lets a channel through; it follows the batches of training, so that as many pass as
            should.
        fixed: so many channels whatever the input, where the cost alone is asked for.
    """

    threshold: Tensor

    def __init__(self, place: Place, mass: float, share: float, cooldown: float, softmax: bool, seed: int) -> None:
        super().__init__()
        self.predict = nn.Linear(place.inputs, place.outputs)
        generator, edge = torch.Generator().manual_seed(seed), place.inputs**-0.5
        with torch.no_grad():
            self.predict.weight.uniform_(-edge, edge, generator=generator)
            self.predict.bias.uniform_(-edge, edge, generator=generator)
        self.register_buffer("threshold", torch.zeros(()))
        self.mass, self.share, self.cooldown, self.softmax = mass, share, cooldown, softmax
        self.weight = 1.0
        self.fixed: int | None = None

    def forward(self, x: Tensor) -> Decision:
        found = x.detach().flatten(2).mean(2, dtype=torch.promote_types(x.dtype, torch.float32)).float()
        if self.softmax:
            found = found.softmax(1)
        logit = linear(found, self.predict.weight.float(), self.predict.bias.float())
        if self.fixed is not None:
            mask = torch.arange(logit.shape[1], device=x.device).expand(logit.shape) < self.fixed
        else:
            mask = logit.detach() > self.threshold
        return Decision(mask, None, logit)

    def learn(self, decision: Decision, made: Tensor, rectified: bool) -> Tensor | None:
        fired = made.detach().relu() if rectified else made.detach()
        wanted = mass_mask(get("criterion", "channel-peak")({"channel_map": fired.flatten(2)}), self.mass)
        ordered = together(decision.score.detach()).flatten().sort(descending=True).values
        count = int(together(wanted.float()).sum())  # as many pass, on average, as are wanted
        edge = ordered[count - 1 : count + 1].mean()
        self.threshold.lerp_(edge.to(self.threshold), _FOLLOWS)
        if not self.weight:
            return None
        loss = binary_cross_entropy_with_logits(decision.score, wanted.float(), reduction="none").sum(1).mean()
        return self.weight * self.share * loss

    def advance(self, done: float) -> None:
        self.weight = float(done < self.cooldown)


class FiringGates(ChannelGates):
    """`ChannelGates` whose thresholds are raised after training, where more than the target is executed.

    They are never lowered: channels that were left out in training are no help.
    """

    def settle(self, batches: Iterable[Any]) -> None:
        own = [gate.threshold.clone() for gate in self.foretold()]

        def move(way: float) -> None:
            for gate, threshold in zip(self.foretold(), own, strict=True):
                gate.threshold.copy_(threshold + _EDGE * way)

        self.record["raised"] = _EDGE * settled(self, batches, self.record["target"], move)

    def foretold(self) -> list[Foretold]:
        """The gates."""
        return [gate for gate in self.gates if isinstance(gate, Foretold)]


def _restored(model: nn.Module, saved: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> FiringGates:
    r = saved["record"]
    numbers = float(r["mass"]), float(r["share"]), float(r["cooldown"]), bool(r["softmax"])
    made = restored(model, saved, tensors, lambda place: Foretold(place, *numbers, seed=0))
    return FiringGates(made.model, made.places, list(made.gates), made.record)


@register(
    "transform", paper="2110.08232", survey=("B4", "E1"), when="runtime", restore=_restored, trained=True, alone=True
)
def ftwt(
    model: nn.Module,
    example: Any,
    data: Any,
    *,
    mass: float | None = None,
    target: str | None = None,
    pace: float = 10.0,
    cooldown: float = 0.5,
    softmax: bool = False,
    seed: int = 0,
) -> FiringGates:
    """Fire together, wire together: gates are taught by the network's own activations which channels will fire.

    :: wanted = the largest peaks max|a_c| that hold the share r of their sum;  loss + pace/L sum BCE(phi(x), wanted)

    Each convolution of the model that can have one gets a gate, which reads the mean of each channel.
    Gates learn from the wanted masks alone (no gradient of the task), and stop at the share ``cooldown`` of the run.
    ``mass`` is r; with a ``target`` such as ``"flops 50%"`` the largest that meets it on data, with wanted masks, and
    after training the thresholds of the gates are raised until validation data meets it.

    Choose it where inputs should differ in how much they compute, and one loss is not to be weighed against another.

    Beware: how much is executed is an average. The weights stay as many; inputs of a batch run one by one.

    >>> from secateur.tasks.nets import vgg
    >>> gated = ftwt(vgg(width=4).eval(), torch.zeros(1, 1, 28, 28), [torch.rand(4, 1, 28, 28)], target="flops 50%")
    >>> gated.record["flops"]["after"] <= 0.5 * gated.record["flops"]["before"]
    True

    Source: Elkerdawy et al., Fire together wire together, arXiv 2110.08232, the official code (decoupled training,
    masks by mass, in residual blocks before the sum). Its gates have an optimizer of their own, at ten times the rate:
    here that is ``pace``. It reads means through a softmax (``softmax=True``), which wants long training, and lets
    through what has a logit above 0; ours has a threshold that follows training, so that a gate lets through as many
    as are wanted, on average, also while it knows little. A target in FLOPs and raised thresholds are ours; so is that
    the strongest channel always counts.
    """
    if (mass is None) == (target is None):
        raise RecipeError("ftwt: say which share of the firing stays by mass, or a target, one of them")
    if mass is not None and not 0 < mass <= 1:
        raise RecipeError(f"ftwt: mass is {mass:g}: it is the share of the firing that stays, above 0 and at most 1")
    if not 0 <= cooldown <= 1 or pace <= 0:
        raise RecipeError("ftwt: cooldown is a share of the run, from 0 to 1, and pace is above 0")
    call = call_of(example)
    places = find(model, call)
    share = pace / len(places)
    gates = [Foretold(p, mass or 1.0, share, cooldown, softmax, 1009 * seed + k) for k, p in enumerate(places)]
    made = FiringGates(model, places, gates, {}).to(next(model.parameters()).device)
    before = flops(model, *call[0], **call[1]).total
    peaks = _peaks(made, data)

    def cost(r: float) -> int:
        for gate, peak in zip(gates, peaks, strict=True):
            gate.fixed = max(1, round(float(mass_mask(peak, r).sum(1).float().mean())))
        return made.cost(call)

    r = mass if mass is not None else reaching(str(target), before, cost, "ftwt")
    after = cost(r)
    for gate in gates:
        gate.mass, gate.fixed = r, None
    made.record = {
        "method": "ftwt", "mass": r, "target": target, "share": share, "cooldown": cooldown, "softmax": softmax,
        "flops": {"before": before, "after": after},
    }  # fmt: skip
    return made


def _peaks(made: FiringGates, data: Any) -> list[Tensor]:
    """How strongly each channel of each place fires in the dense network, for some inputs."""
    found: list[list[Tensor]] = [[] for _ in made.places]

    def see(number: int, z: Tensor) -> None:
        fired = z.relu() if made.places[number].rectified else z
        found[number].append(get("criterion", "channel-peak")({"channel_map": fired.flatten(2)}))

    for gate in made.foretold():
        gate.fixed = gate.predict.out_features  # all
    made.see, made.executes = see, False
    try:
        with evaluating(made), torch.no_grad():
            for batch in islice(iter(data), _BATCHES):
                call = inputs_of(batch)
                device = next(made.parameters()).device
                args, kwargs = tree_map(lambda x, d=device: x.to(d) if isinstance(x, Tensor) else x, call)
                made(*args, **kwargs)
    finally:
        made.see, made.executes = None, True
    if not found[0]:
        raise DataError("ftwt measures on data how channels fire, and there is no batch")
    return [torch.cat(rows) for rows in found]
