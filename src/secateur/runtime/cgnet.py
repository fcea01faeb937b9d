"""Channel gating: a part of the input channels says whether the others are worth adding."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm

from ..errors import ModelError, RecipeError
from ..layers import evaluating
from ..measure.flops import flops
from ..registry import register
from .alive import smaller
from .channels import ChannelGates, inputs_of, restored
from .places import Place, find
from .structure import call_of

#: A product ``product(x, weight, bias)``.
Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]
#: Share of the way to a batch's statistics, as batch norms have it.
_MOMENTUM = 0.1


class Partial(nn.Module):
    """Adds what most input channels bring only where the partial sum of the first ones, normalized, is large enough.

    Attributes:
        base: so many input channels make the partial sum.
        threshold: one for each output channel, learned; pulled to ``goal``.
        opened, counted: positions that were open in evaluation, and all, since `reset`.
    """

    mean: Tensor
    var: Tensor
    counts_rows = True  # the statistics of a batch

    def __init__(self, place: Place, parts: int, goal: float, pull: float, slope: float) -> None:
        super().__init__()
        self.base = max(1, place.inputs // parts)
        self.threshold = nn.Parameter(torch.zeros(place.outputs))
        self.register_buffer("mean", torch.zeros(place.outputs))
        self.register_buffer("var", torch.ones(place.outputs))
        self.goal, self.pull, self.slope = goal, pull, slope
        self.reset()

    def reset(self) -> None:
        self.opened = self.counted = 0

    def convolve(self, product: Product, x: Tensor, weight: Tensor, bias: Tensor | None, executes: bool) -> Tensor:
        """The convolution, gated."""
        b = self.base
        sums = product(x[:, :b], weight[:, :b], None)
        part = sums if bias is None else sums + bias.view(-1, *[1] * (sums.dim() - 2)).to(sums.dtype)
        normed = batch_norm(sums.float(), self.mean.float(), self.var.float(), None, None, self.training, _MOMENTUM)
        above = normed - self.threshold.view(-1, *[1] * (part.dim() - 2))
        is_open = above > 0
        if not self.training:
            self.opened, self.counted = self.opened + int(is_open.sum()), self.counted + is_open.numel()
        if executes:
            rest = smaller(x[:, b:], weight[:, b:], None, None, is_open.flatten(2).any(2), product)
            return part + rest * is_open
        soft = torch.sigmoid(self.slope * above)
        gate = is_open + soft - soft.detach() if self.training else is_open  # a step, with the gradient of the slope
        return part + product(x[:, b:], weight[:, b:], None) * gate.to(part.dtype)

    def regularizer(self) -> Tensor:
        """What pulls the thresholds to where they should be."""
        return self.pull * (self.threshold - self.goal).square().sum()

    def advance(self, done: float) -> None:
        """Nothing changes on the way."""


class PartialGates(ChannelGates):
    """`ChannelGates` whose gates decide for each position, in the middle of the convolution."""

    def settle(self, batches: Iterable[Any]) -> None:
        """Count, over all batches, how many positions are open."""
        for gate in self._partial():
            gate.reset()
        with evaluating(self), torch.no_grad():
            for batch in batches:
                args, kwargs = inputs_of(batch)
                self(*args, **kwargs)
        shares = {p.conv: g.opened / g.counted for p, g in zip(self.places, self._partial(), strict=True) if g.counted}
        own: dict[str, list[float]] = self.record["operations"]
        self.record["open"] = shares
        skipped = sum(own[name][1] * (1 - share) for name, share in shares.items())
        self.record["flops"]["after"] = round(self.record["flops"]["before"] - skipped)

    def penalty(self) -> Tensor:
        return torch.stack([gate.regularizer() for gate in self._partial()]).sum()

    def told(self) -> str:
        found = self.record.get("open")
        share = f", {100 * sum(found.values()) / len(found):.1f} % of the positions open" if found else ""
        return (
            f"cgnet: {len(self.places)} gates{share}; single positions are masked: what is expected counts them, what "
            "is executed leaves out output channels that are closed everywhere"
        )

    def _partial(self) -> list[Partial]:
        return [gate for gate in self.gates if isinstance(gate, Partial)]


def _restored(model: nn.Module, saved: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> PartialGates:
    r = saved["record"]
    numbers = int(r["parts"]), float(r["goal"]), float(r["pull"]), float(r["slope"])
    made = restored(model, saved, tensors, lambda place: Partial(place, *numbers))
    return PartialGates(made.model, made.places, list(made.gates), made.record)


@register(
    "transform", paper="1805.12549", survey=("B4", "E1"), when="runtime", restore=_restored, trained=True, alone=True
)
def cgnet(
    model: nn.Module, example: Any, *, parts: int = 4, goal: float = 1.0, pull: float = 1e-4, slope: float = 2.0
) -> PartialGates:
    """Channel gating: at each position the partial sum over some input channels decides whether the others are added.

    :: y = W_p x_p + d (W_r x_r),  d = [norm(W_p x_p) > Delta],  loss + pull sum (Delta - goal)^2

    The first of ``parts`` equal parts of the input channels makes the partial sum, which is normalized by statistics of
    its own; Delta is learned for each output channel. A higher ``goal`` closes more.

    Choose it to see how much of a network's work is needed position by position.

    Beware: decisions for single positions are for hardware of its own: here they are masked, and only output channels
    that are closed everywhere are really left out. The expected FLOPs count positions, the measured ones what runs.
    There is no target: try several goals.

    >>> from secateur.tasks.nets import vgg
    >>> len(cgnet(vgg(width=4).eval(), torch.zeros(1, 1, 28, 28)).places)  # not the first, which reads one channel
    12

    Source: Hua et al., Channel gating neural networks, arXiv 1805.12549, section 3, and the official code
    (cornell-zhang/dnn-gating), whose defaults it has, without its grouping and shuffling of channels and without
    distillation.
    """
    if parts < 2:
        raise RecipeError(f"cgnet: parts is {parts}: the input channels are cut into 2 or more")
    if pull < 0 or slope <= 0:
        raise RecipeError("cgnet: pull is 0 or more, and slope above 0")
    call = call_of(example)
    places = [place for place in find(model, call) if place.inputs > 1]
    if not places:
        raise ModelError(f"{type(model).__name__} has no convolution that reads several channels and can have a gate")
    counted = flops(model, *call[0], **call[1])
    gates = [Partial(place, parts, goal, pull, slope) for place in places]
    shares = {p.conv: 1 - gate.base / p.inputs for p, gate in zip(places, gates, strict=True)}
    record = {
        "method": "cgnet", "parts": parts, "goal": goal, "pull": pull, "slope": slope,
        "operations": {name: [counted.by_module[name], counted.by_module[name] * s] for name, s in shares.items()},
        "flops": {"before": counted.total, "after": counted.total},
    }  # fmt: skip
    return PartialGates(model, places, gates, record).to(next(model.parameters()).device)
