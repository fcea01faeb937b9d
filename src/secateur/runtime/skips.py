"""Gates on residual blocks: for each input, blocks that it needs run, and the others are left out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..errors import DataError, ModelError, RecipeError
from ..layers import evaluating
from ..measure.flops import flops
from ..processes import mean
from ..registry import register
from ..structured import Target
from .between import Places, find_places, hidden, in_place_of
from .measured import call_of_batch
from .rows import Rows, having, some_of
from .structure import Call, call_of

#: Logit of every gate before training: all blocks run, and each can be closed.
_OPEN = 2.0
#: Validation batches that the gates' threshold is chosen on, at most, and how often it is halved in search of it.
_BATCHES, _HALVINGS = 16, 20


class Gate(nn.Module):
    """Whether an input needs a block, by the mean over positions of what the block is given: a logit."""

    def __init__(self, width: int, axis: int, inner: int = 16) -> None:
        super().__init__()
        self.axis = axis
        self.norm, self.down, self.out = nn.LayerNorm(width), nn.Linear(width, inner), nn.Linear(inner, 1)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            self.down.weight.copy_(torch.randn(inner, width, generator=generator) * (2 / width) ** 0.5)
            self.down.bias.zero_()
            self.out.weight.zero_()
            self.out.bias.fill_(_OPEN)

    def forward(self, x: Tensor) -> Tensor:
        others = [d for d in range(1, x.dim()) if d != self.axis]
        pooled = x.mean(others) if others else x
        found: Tensor = self.out(self.down(self.norm(pooled)).relu())[:, 0]
        return found


def straight_through(logit: Tensor) -> Tensor:
    """1 where a logit is above 0, else 0; the gradient is that of its sigmoid.

    >>> x = torch.tensor([1.0, -1.0], requires_grad=True)
    >>> straight_through(x).tolist()
    [1.0, 0.0]
    """
    soft = logit.sigmoid()
    return (logit > 0).to(soft.dtype) + soft - soft.detach()


class Skips(nn.Module):
    """A residual network in which each input leaves out the blocks that its gates close.

    In training mode all blocks run and gates weigh what they give; in evaluation mode a block runs on those inputs
    alone whose gate is open. Both give the same answers, save for what batch norm does in training.

    Attributes:
        model: the network.
        gates: by block, with ``-`` for the dots of its path.
        shift: a block runs where its gate's logit is above it.
        record: how it was made, as plain data.
    """

    def __init__(self, model: nn.Module, gates: Mapping[str, Gate], record: Mapping[str, Any]) -> None:
        super().__init__()
        self.model, self.places = model, tuple(gates)
        self.gates = nn.ModuleDict({name.replace(".", "-"): gate for name, gate in gates.items()})
        self.shift = 0.0
        self.done = 0.0
        self.record = dict(record)
        self.open: list[Tensor] = []
        self.rows = Rows(model, self.places)
        self.training = model.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, **kwargs)[0]

    def run(self, *args: Any, **kwargs: Any) -> tuple[Any, Tensor]:
        """The answers, and which blocks ran for each input, ``(inputs, gates)``."""
        self.open = []
        call = (args, kwargs)
        with in_place_of(self.model, {name: self._gated(name, call) for name in self.places}):
            out = self.model(*args, **kwargs)
        if len(self.open) != len(self.places):
            raise ModelError(
                f"{len(self.open)} of {len(self.places)} gates were passed: the model runs otherwise than it did on "
                "the example"
            )
        return out, torch.stack([x.detach() > 0 for x in self.open], 1)

    def _gated(self, name: str, call: Call) -> Callable[..., Tensor]:
        gate = self.gates[name.replace(".", "-")]

        def forward(own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if self.rows.asking:
                return own(*args, **kwargs)
            x = hidden((args, kwargs))
            assert x is not None
            if self.training:
                return self._weigh(gate(x), x, own, args, kwargs)
            return self._leave_out(gate(x), x, own, name, (args, kwargs), call)

        return forward

    def _weigh(self, logit: Tensor, x: Tensor, own: Callable[..., Any], args: Any, kwargs: Any) -> Tensor:
        gate = straight_through(logit - self.shift)
        self.open.append(gate)
        weight = gate.view(-1, *[1] * (x.dim() - 1))
        found: Tensor = weight * own(*args, **kwargs) + (1 - weight) * x
        return found

    def _leave_out(
        self, logit: Tensor, x: Tensor, own: Callable[..., Any], name: str, given: Call, call: Call
    ) -> Tensor:
        runs = logit > self.shift
        self.open.append(runs.float())
        if bool(runs.all()):
            whole: Tensor = own(*given[0], **given[1])
            return whole
        if not bool(runs.any()):
            return x
        rows = runs.nonzero()[:, 0]
        args, kwargs = self.rows.taken(given, f"{name} takes", len(x), rows, call)
        part = own(*args, **kwargs)
        return x.index_copy(0, rows, part.to(x.dtype))

    def penalty(self) -> Tensor:
        """The squared distance of the share of FLOPs that the last pass executed to the one wanted by now."""
        share = self._share(torch.stack([mean(x.sum(), len(x)) for x in self.open]))
        wanted = 1 - (1 - self.record["wanted"]) * min(1.0, 2 * self.done)
        found: Tensor = self.record["cost"] * (share - wanted) ** 2
        return found

    def advance(self, done: float) -> None:
        """What is wanted falls over the first half of the run."""
        self.done = done

    def _share(self, rate: Tensor) -> Tensor:
        """The FLOPs executed, in those of the dense model, where blocks run for such shares of the inputs."""
        costs = torch.tensor(self.record["costs"], dtype=torch.float64).to(rate)
        found: Tensor = (self.record["fixed"] + (rate * costs).sum()) / self.record["flops"]["before"]
        return found

    @torch.no_grad()
    def settle(self, batches: Iterable[Any]) -> None:
        """Choose the gates' threshold on validation data: the least at which the target is reached.

        Raises:
            DataError: there is nothing to choose it on.
        """
        calls = [call_of_batch(b)[0] for _, b in zip(range(_BATCHES), batches, strict=False)]
        if not calls:
            raise DataError("there is no validation batch to choose the gates' threshold on")
        limit, before = self.record["wanted"], self.record["flops"]["before"]
        with evaluating(self):
            low, high = -30.0, 30.0
            for _ in range(_HALVINGS):
                middle = (low + high) / 2
                tried = self._rate(calls, middle)
                low, high = (low, middle) if float(self._share(tried)) <= limit else (middle, high)
            rate = self._rate(calls, high)
        self.record["chosen"] = self.shift
        self.record["rates"] = rate.tolist()
        self.record["flops"] = {"before": before, "after": float(self._share(rate)) * before}
        self.record["notes"] = self._notes(rate)

    def _rate(self, calls: Sequence[Call], shift: float) -> Tensor:
        self.shift = shift
        ran = torch.cat([self.run(*args, **kwargs)[1] for args, kwargs in calls])
        return ran.double().mean(0)

    def _notes(self, rate: Tensor) -> list[str]:
        always = [n for n, r in zip(self.places, rate.tolist(), strict=True) if r == 1]
        never = [n for n, r in zip(self.places, rate.tolist(), strict=True) if r == 0]
        if len(always) + len(never) < len(self.places):
            return []
        what = f"the gates decide alike for every input: {', '.join(never) or 'no block'} never runs"
        return [f"{what}; a network without it does the same (secateur prune --granularity depth)"]

    def extra_repr(self) -> str:
        return f"shift={self.shift}"

    def saved(self) -> dict[str, Any]:
        return {"places": self.places, "axes": [self._gate(n).axis for n in self.places], "shift": self.shift}

    def _gate(self, name: str) -> Gate:
        found: Any = self.gates[name.replace(".", "-")]
        return found  # type: ignore[no-any-return]

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.gates.state_dict())

    def told(self) -> str:
        """What was made, in one line, and another where the gates do not look at the input."""
        rates = self.record.get("rates")
        if rates is None:
            return f"skipnet: gates on {', '.join(self.places)}, not trained yet"
        each = ", ".join(f"{n} {100 * r:.0f} %" for n, r in zip(self.places, rates, strict=True))
        return "\n".join([f"skipnet, blocks run for: {each} of the inputs", *self.record["notes"]])


def _restored(model: nn.Module, saved: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Skips:
    found = saved["saved"]
    gates = {}
    for name, axis in zip(found["places"], found["axes"], strict=True):
        inner, width = tensors[f"{name.replace('.', '-')}.down.weight"].shape
        gates[str(name)] = Gate(width, int(axis), inner)
    made = Skips(model, gates, saved["record"])
    made.gates.load_state_dict(dict(tensors))
    made.shift = float(found["shift"])
    return made


@register(
    "transform", paper="1711.09485", survey=("A3.8", "B4"), when="runtime", restore=_restored, trained=True, alone=True
)
def skipnet(model: nn.Module, example: Any, *, target: str = "flops 30%", cost: float = 20.0) -> Skips:
    """Learn gates that decide, for each input, which residual blocks run.

    :: x_{l+1} = g_l F_l(x_l) + (1 - g_l) x_l,  g_l = 1[G_l(x_l) > 0];  loss + cost (FLOPs executed - wanted)^2

    ``F`` is the whole block with its shortcut, ``G`` two small layers on the mean over positions of what the block is
    given. Forward the decision is hard, backward it is that of the sigmoid. What is wanted falls to the ``target``
    over the first half of the run. After training one threshold for all gates is chosen on validation data, the least
    at which the target is reached; what is executed is FLOPs on average.

    Choose it for residual networks and transformers whose inputs differ in how much they need.

    Beware: blocks that change the shape of what they are given always run. In a batch each block runs on the inputs
    that need it, so what is saved in time is less than in FLOPs. Gates may learn the same answer for every input; that
    is told, and is depth pruning by another way.

    >>> from secateur.tasks.nets import resnet
    >>> skipnet(resnet(4, 2), torch.zeros(1, 1, 28, 28)).places  # 5 and 7 halve the size
    ('3', '4', '6', '8')

    Source: Wang et al., SkipNet, arXiv 1711.09485, section 3, and its official code for the supervised stage (hard
    forward, soft backward); without its second stage by reinforcement learning, with pooling in place of a gate's
    convolutions, and with the cost squared around a target, as in arXiv 1711.11503 for rates, in place of a linear one.
    """
    wanted = Target.parse(target)
    if wanted.quantity != "flops":
        raise RecipeError(f"skipnet takes a target in FLOPs, such as 'flops 30%', not in {wanted.quantity}")
    if not cost > 0:
        raise RecipeError(f"cost is {cost}: without it no gate has a reason to close; give a number above 0")
    call = call_of(example)
    places = find_places(model, call)
    chosen = _residual(model, places, call)
    one = some_of(call, torch.arange(1), having(model, call))
    work = flops(model, *one[0], **one[1])
    first = next(p for p in model.parameters())
    gates = {n: Gate(places.width[k], places.axis[k]) for k, n in enumerate(places.paths) if n in chosen}
    costs = [work.by_module[n] for n in gates]
    made = Skips(
        model, gates,
        {"method": "skipnet", "target": target, "cost": cost, "costs": costs, "flops": {}, "notes": []},
    )  # fmt: skip
    made.gates.to(device=first.device, dtype=first.dtype)
    fixed = flops(made, *one[0], **one[1]).total - sum(costs)
    limit = wanted.remaining(work.total)
    made.record |= {
        "fixed": fixed, "wanted": limit / work.total, "flops": {"before": work.total, "after": fixed + sum(costs)},
    }  # fmt: skip
    if limit < fixed:
        raise RecipeError(
            f"target '{target}' is out of reach: without every block that can be skipped, "
            f"{100 * fixed / work.total:.0f} % of the FLOPs remain, and {100 * limit / work.total:.0f} % may"
        )
    return made


def _residual(model: nn.Module, places: Places, call: Call) -> set[str]:
    """The blocks that give back their input when their parameters are zero.

    Raises:
        ModelError: there is none.
    """
    found: set[str] = set()
    why = ""

    def look(name: str) -> Callable[..., Any]:
        module = model.get_submodule(name)
        zeros = {n: torch.zeros_like(p) for n, p in module.named_parameters()}

        def forward(own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            nonlocal why
            out = own(*args, **kwargs)
            x = hidden((args, kwargs))
            held = module.__dict__.pop("forward")
            try:
                without = functional_call(module, zeros, args, kwargs)
            finally:
                module.__dict__["forward"] = held
            if isinstance(without, Tensor) and x is not None and without.shape == x.shape and torch.equal(without, x):
                found.add(name)
            else:
                why = why or name
            return out

        return forward

    with evaluating(model), torch.no_grad(), in_place_of(model, {n: look(n) for n in places.paths}):
        model(*call[0], **call[1])
    if not found:
        raise ModelError(
            f"no block of {type(model).__name__} can be skipped: with its parameters at zero {why} does not give back "
            "its input, as a residual block does"
        )
    return found
