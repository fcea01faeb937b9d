"""Gates in front of convolutions: which channels an input needs, decided before they are computed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm, linear
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from ..errors import ModelError, RecipeError
from ..measure.flops import flops
from ..structured import Target
from .alive import Alive, smaller
from .places import CONVOLUTIONS, Place, convolution_arguments, first, linear_arguments
from .structure import Call, call_of

#: Densities are multiples of one by so many.
FINE = 1000


@dataclass(frozen=True, eq=False)
class Decision:
    """What a gate says of one batch.

    Attributes:
        mask: which channels are computed, ``(batch, outputs)``, bool.
        factor: what they are multiplied by; None for nothing.
        score: that it decided by.
    """

    mask: Tensor
    factor: Tensor | None
    score: Tensor


class ChannelGate(Protocol):
    """A module that decides for one convolution."""

    def __call__(self, x: Tensor) -> Decision:
        """Decide on what the convolution reads."""

    def learn(self, decision: Decision, made: Tensor, rectified: bool) -> Tensor | None:
        """What it adds to the loss, given what the convolution and its norm made of all channels."""

    def advance(self, done: float) -> None: ...


class ChannelGates(nn.Module):
    """A convolutional network that leaves out, for each input, channels it does not need. The network is as it was.

    In training all channels are computed and masked. In evaluation a convolution multiplies the channels that its gate
    wants with those that earlier gates left alone; inputs of a batch that disagree are computed one by one.

    Attributes:
        model: the dense network.
        places: of the gates.
        gates: one for each.
        record: how it was made; plain data.
        executes: False masks in evaluation also, as in training: the same answers, and none of the savings.
        see: is shown what each place makes, by its number, before it is masked.
    """

    def __init__(
        self, model: nn.Module, places: Sequence[Place], gates: Sequence[nn.Module], record: Mapping[str, Any]
    ) -> None:
        super().__init__()
        self.model, self.places, self.gates = model, tuple(places), nn.ModuleList(gates)
        self.record = dict(record)
        self.executes, self.sums = True, True
        self.losses: list[Tensor] = []
        self.see: Callable[[int, Tensor], None] | None = None
        self.gates.train(model.training)
        self.training = model.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.losses = []
        with Pass(self):
            return self.model(*args, **kwargs)

    def decisions(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Which channels each convolution computes, ``(batch, outputs)``, by its path."""
        found = Pass(self)
        with found:
            self.model(*args, **kwargs)
        return found.decided

    def cost(self, call: Call) -> int:
        """Operations for an input, at most: the same for all inputs of its shape that decide for as many channels."""
        self.sums = False
        try:
            return flops(self, *call[0], **call[1]).total
        finally:
            self.sums = True

    def penalty(self) -> Tensor:
        losses, self.losses = self.losses, []
        return torch.stack(losses).sum() if losses else torch.zeros((), device=next(self.parameters()).device)

    def advance(self, done: float) -> None:
        for gate in self.gates:
            _gate(gate).advance(done)

    def settle(self, batches: Iterable[Any]) -> None:
        """Nothing is left to be settled."""

    def extra_repr(self) -> str:
        return str(self.record)

    def saved(self) -> dict[str, Any]:
        return {"places": [place.to_dict() for place in self.places]}

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.gates.state_dict())

    def told(self) -> str:
        """What was made, in one line."""
        r = self.record
        share = f"{100 * r['density']:.1f} % of the channels" if r.get("density") is not None else "channels by input"
        told = f"{r['method']}: {len(self.places)} gates, {share}; batches whose inputs disagree run one by one"
        return "\n".join([told, *r.get("notes", [])])


def _gate(module: nn.Module) -> ChannelGate:
    found: Any = module
    return found  # type: ignore[no-any-return]


class Pass(TorchFunctionMode):
    """One forward pass of a gated network.

    Args:
        counts: count what is left out, or would be where the pass masks instead: ``saved``, operations of all inputs.
    """

    def __init__(self, gates: ChannelGates, counts: bool = False) -> None:
        super().__init__()
        self.gates = gates
        self.executes = gates.executes and not gates.training
        self.follows = self.executes or counts
        self.counts, self.saved = counts, torch.zeros(())
        self.alive = Alive(gates.sums)
        self.sites = {id(gates.model.get_submodule(p.conv).weight): k for k, p in enumerate(gates.places)}
        self.decided: dict[str, Tensor] = {}
        self._waiting: Any = WeakIdKeyDictionary()  # what a convolution made -> its number and its gate's decision

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in CONVOLUTIONS:
            return self._convolve(func, convolution_arguments(args, kwargs))
        if func is linear and self.follows:
            given = linear_arguments(args, kwargs)
            x = given["input"]
            if (reads := self.alive.of(x)) is not None and x.dim() == 2:  # else it does not read channels
                return self._product(x, given["weight"], given["bias"], reads, None, linear)
        out = func(*args, **kwargs)
        if func is batch_norm and (x := first(args, kwargs)) in self._waiting:
            return self._gated(out, *self._waiting.pop(x))
        if self.follows:
            self.alive.follow(func, args, kwargs, out)
        return out

    def _product(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, reads: Tensor | None, makes: Tensor | None, product: Any
    ) -> Tensor:
        """A product of which some is left out, or counted as if it were."""
        y = smaller(x, weight, bias, reads, makes, product) if self.executes else product(x, weight, bias)
        if self.counts:
            part = torch.ones(len(x), dtype=torch.float64, device=x.device)
            for mask in (reads, makes):
                part = part if mask is None else part * mask.sum(1).clamp_min(1) / mask.shape[1]
            whole = 2 * y[:1].numel() * weight[:1].numel()
            self.saved = self.saved.to(part) + whole * (1 - part).sum()
        return y

    def _convolve(self, func: Callable[..., Tensor], given: dict[str, Any]) -> Tensor:
        x, weight, bias = given["input"], given["weight"], given["bias"]
        rest = {k: v for k, v in given.items() if k not in ("input", "weight", "bias")}

        def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return func(x, weight, bias, **rest)

        number = self.sites.get(id(weight))
        own = None if number is None else getattr(self.gates.gates[number], "convolve", None)
        if own is not None:  # a gate that decides in the middle of the convolution
            return own(product, x, weight, bias, self.executes)  # type: ignore[no-any-return]
        decision: Decision | None = None if number is None else self.gates.gates[number](x)
        reads = self.alive.of(x) if self.follows and given["groups"] == 1 and x.dim() == weight.dim() else None
        makes = None if decision is None or not self.follows else decision.mask
        if reads is None and makes is None:
            y = product(x, weight, bias)
        else:
            y = self._product(x, weight, bias, reads, makes, product)
        if number is None or decision is None:
            return y
        place = self.gates.places[number]
        self.decided[place.conv] = decision.mask
        if place.norm:
            self._waiting[y] = (number, decision)
            return y
        return self._gated(y, number, decision)

    def _gated(self, z: Tensor, number: int, decision: Decision) -> Tensor:
        """What the gate makes of the channels behind the norm."""
        if self.gates.see is not None:
            self.gates.see(number, z)
        if self.gates.training:
            gate, place = _gate(self.gates.gates[number]), self.gates.places[number]
            if (loss := gate.learn(decision, z, place.rectified)) is not None:
                self.gates.losses.append(loss)
        factor = decision.mask if decision.factor is None else decision.factor
        out = z * factor.to(z.dtype).view(*factor.shape, *[1] * (z.dim() - 2))
        if self.follows:
            self.alive.set(out, decision.mask)
        return out


def inputs_of(batch: Any) -> Call:
    """The inputs of a batch of pairs, or of a dictionary with labels."""
    if isinstance(batch, Mapping):
        return (), {k: v for k, v in batch.items() if k != "labels"}
    return call_of(batch[0] if isinstance(batch, (tuple, list)) else batch)


def sizes_of(x: Tensor) -> Tensor:
    """Mean absolute value of each channel, ``(batch, channels)``."""
    return x.abs().flatten(2).mean(2, dtype=torch.promote_types(x.dtype, torch.float32))


def reaching(target: str, before: int, cost: Callable[[float], int], method: str) -> float:
    """The largest share of the channels that can stay within a target in FLOPs.

    Raises:
        RecipeError: it is not in FLOPs, or out of reach.
    """
    wanted = Target.parse(target)
    if wanted.quantity != "flops":
        raise RecipeError(f"{method} takes a target in FLOPs, such as 'flops 50%', not in {wanted.quantity}")
    limit = wanted.remaining(before)
    low, high = 1, FINE
    if (least := cost(low / FINE)) > limit:
        raise RecipeError(
            f"target '{target}' is out of reach: {method} cannot leave less than {100 * least / before:.1f} %"
        )
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if cost(middle / FINE) <= limit else (low, middle - 1)
    return low / FINE


def restored(
    model: nn.Module, saved: Mapping[str, Any], tensors: Mapping[str, Tensor], make: Callable[[Place], nn.Module]
) -> ChannelGates:
    """The gated network of what was saved.

    Raises:
        ModelError: the model does not fit.
    """
    places = [Place(**p) for p in saved["saved"]["places"]]
    paths = dict(model.named_modules())
    for place in places:
        weight = getattr(paths.get(place.conv), "weight", None)
        if not isinstance(weight, Tensor) or tuple(weight.shape[:2]) != (place.outputs, place.inputs):
            raise ModelError(f"runtime.json does not fit the model: {place.conv} is no such convolution there")
    made = ChannelGates(model, places, [make(place) for place in places], saved["record"])
    made.gates.load_state_dict(dict(tensors))
    made.gates.to(next(model.parameters()).device)
    made.advance(1.0)
    return made
