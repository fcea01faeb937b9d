"""Early exits of classifiers: what is clear leaves, and the rest goes on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DataError, ModelError, RecipeError
from ..layers import evaluating
from ..measure.flops import flops
from ..registry import get, register
from ..structured import Target
from .base import numbers
from .between import Places, find_places, varied
from .leaving import Answer, Exit, Leaving, logits_of
from .measured import call_of_batch
from .rows import Rows, having, some_of
from .structure import Call, call_of
from .threshold import Point, cheapest, notes, point_at, sweep, within

_CRITERION = "exit-entropy"
#: How near the answers of inputs alone and together must be: rounding differs with the size of a batch.
_NEAR = 1e-3


class Exits(nn.Module):
    """A classifier with exits behind some of its blocks.

    In training mode every input goes through, and each exit answers beside the model. In evaluation mode an input
    leaves at the first exit whose doubt is below the threshold, and later blocks run on the others alone.

    Attributes:
        model: the classifier.
        exits: by the block that they stand behind, with ``-`` for the dots of its path.
        threshold: None until it is known: then nothing leaves.
        record: how it was made, as plain data.
    """

    def __init__(
        self, model: nn.Module, blocks: Sequence[str], exits: Mapping[str, Exit], record: Mapping[str, Any]
    ) -> None:
        super().__init__()
        self.model, self.blocks, self.places = model, tuple(blocks), tuple(exits)
        self.exits = nn.ModuleDict({name.replace(".", "-"): module for name, module in exits.items()})
        self.threshold: float | None = None
        self.record = dict(record)
        self.answers: list[Tensor] = []
        self.rows = Rows(model, self.blocks)
        self.training = model.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.training:
            out, self.answers = self.through(*args, **kwargs)
            return out
        if self.threshold is None:
            return self.model(*args, **kwargs)
        return self.run(*args, **kwargs)[0]

    def run(self, *args: Any, **kwargs: Any) -> tuple[Any, Tensor]:
        """The answers, and the number of the exit that each input left at; that of exits for the end."""
        limit = math.inf if self.threshold is None else self.threshold
        criterion = get("criterion", _CRITERION)
        return self.leave(lambda _, logits: criterion({"exit_logits": logits}) >= limit, args, kwargs)

    def through(self, *args: Any, **kwargs: Any) -> tuple[Any, list[Tensor]]:
        """The model's own answer, and what each exit says beside it; nothing leaves."""
        said: list[Tensor] = []

        def listen(_: int, logits: Tensor) -> Tensor:
            said.append(logits)
            return torch.ones(len(logits), dtype=torch.bool, device=logits.device)

        out = Leaving(self.model, self.blocks, self._by_place(), listen, self.rows).run(*args, **kwargs)
        return out, said

    def leave(
        self, decide: Callable[[int, Tensor], Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[Any, Tensor]:
        """One pass in which ``decide`` says which inputs go on behind each exit."""
        leaving = Leaving(self.model, self.blocks, self._by_place(), decide, self.rows)
        out = leaving.run(*args, **kwargs)
        plain = self.record["answers"] == "tensor"
        if out is not None and leaving.alive is None:
            return out, leaving.where
        return (leaving.answers if plain else Answer(leaving.answers)), leaving.where

    def _by_place(self) -> dict[str, Exit]:
        return {name: self.exits[name.replace(".", "-")] for name in self.places}  # type: ignore[misc]

    def penalty(self) -> Tensor:
        """Nothing: the loss of the exits is that of the task, see `joint`."""
        return next(self.parameters()).new_zeros(())

    def advance(self, done: float) -> None:
        """Nothing changes while it trains."""

    @torch.no_grad()
    def settle(self, batches: Iterable[Any]) -> None:
        """Choose the threshold on validation data, and say in the record what leaves where.

        Raises:
            DataError: there is nothing to choose it on.
        """
        doubts, hits = [], []
        criterion = get("criterion", _CRITERION)
        with evaluating(self):
            for batch in batches:
                (args, kwargs), labels = call_of_batch(batch)
                out, said = self.through(*args, **kwargs)
                last = logits_of(out)
                assert last is not None
                truth = last.argmax(1) if labels is None else labels
                doubts.append(torch.stack([criterion({"exit_logits": x}) for x in said], 1).cpu())
                hits.append(torch.stack([x.argmax(1) == truth for x in (*said, last)], 1).cpu())
        if not doubts:
            raise DataError("there is no validation batch to choose the threshold on")
        doubt, right, costs = torch.cat(doubts), torch.cat(hits), self.record["costs"]
        points = sweep(doubt, right, costs)
        given = self.record["threshold"]
        point = self._point(points) if given is None else point_at(points, given)
        self.threshold = point.threshold if given is None else float(given)
        halves = [sweep(doubt[k::2], right[k::2], costs) for k in (0, 1)] if len(doubt) > 1 and given is None else []
        apart = [point_at(b, self._point(a).threshold).cost for a, b in zip(halves, halves[::-1], strict=True)]
        self._enter(points, point, float(doubt.min()), sum(apart) / 2 if apart else point.cost)

    def _point(self, points: Sequence[Point]) -> Point:
        """What target or drop choose."""
        record = self.record
        if record["target"] is not None:
            return within(points, Target.parse(record["target"]).remaining(record["flops"]["before"]))
        return cheapest(points, points[0].right - record["drop"] * sum(points[0].left))

    def _enter(self, points: Sequence[Point], point: Point, least: float, apart: float) -> None:
        record, inputs = self.record, sum(points[0].left)
        record["chosen"] = self.threshold
        record["left"] = [n / inputs for n in point.left]
        record["flops"] = {"before": record["flops"]["before"], "after": point.cost}
        record["accuracy"] = {"last": points[0].right / inputs, "exits": point.right / inputs}
        record["apart"] = apart
        record["notes"] = notes(point, points, least, record)

    def extra_repr(self) -> str:
        return f"threshold={self.threshold}"

    def saved(self) -> dict[str, Any]:
        axes = [e.axis for e in self._by_place().values()]
        return {"blocks": self.blocks, "places": self.places, "axes": axes, "threshold": self.threshold}

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.exits.state_dict())

    def told(self) -> str:
        """What was made, in one line, and another where the threshold does nothing or everything."""
        text = f"early-exit behind {', '.join(self.places)}"
        if self.threshold is None:
            return f"{text}: no threshold yet"
        shares = ", ".join(f"{100 * x:.0f} %" for x in self.record["left"])
        return "\n".join([f"{text}, below {self.threshold:.3g} nats: {shares} at the end", *self.record["notes"]])


def joint(loss: Callable[[nn.Module, Any], Tensor], gates: Exits, batch: Any) -> Tensor:
    """The loss of the model and of each exit: the task's own, with the exit's answer in place of the model's."""
    total = loss(gates, batch)
    plain = gates.record["answers"] == "tensor"
    for logits in gates.answers:
        total = total + gates.record["weight"] * loss(_Said(logits if plain else Answer(logits)), batch)
    return total


class _Said(nn.Module):
    """A model that has answered already."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.answer


def _restored(model: nn.Module, saved: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Exits:
    found = saved["saved"]
    exits = {}
    for name, axis in zip(found["places"], found["axes"], strict=True):
        classes, width = tensors[f"{name.replace('.', '-')}.linear.weight"].shape
        exits[str(name)] = Exit(width, classes, int(axis))
    made = Exits(model, list(map(str, found["blocks"])), exits, saved["record"])
    made.exits.load_state_dict(dict(tensors))
    made.threshold = None if found["threshold"] is None else float(found["threshold"])
    return made


@register(
    "transform", paper="1709.01686", survey=("A3.8", "B4"), when="runtime", restore=_restored, trained=True, alone=True,
    joint=joint,
)  # fmt: skip
def early_exit(
    model: nn.Module,
    example: Any,
    *,
    exits: int = 3,
    at: tuple[int, ...] | None = None,
    target: str | None = None,
    drop: float | None = None,
    threshold: float | None = None,
    weight: float = 1.0,
) -> Exits:
    """Give a classifier exits behind some of its blocks: an input that is clear there leaves, the others go on.

    :: leave at the first exit n with H(softmax(z_n)) < T;  trained with sum_n w L(z_n, y) + L(z, y)

    An exit is a linear layer on the mean over positions. ``exits`` of them stand where equal shares of the work are
    done, or behind the blocks with the numbers ``at``. ``T`` is chosen on validation data: for a ``target`` such as
    ``"flops 40%"`` (executed, on average) the least at which so much goes; else the one at which the least is executed
    with an accuracy that is at most ``drop`` (0.01) below the last exit's; or it is given (``threshold``, in nats).

    Choose it for classifiers whose inputs differ in how hard they are, where the mean latency of single inputs counts.

    Beware: the slowest inputs take longer than in the dense model. Exits pull early layers towards the answer, which
    in a small network can cost accuracy at the end. In a batch what is saved is less, as products get smaller.

    >>> from secateur.tasks.nets import VisionTransformer
    >>> net = early_exit(VisionTransformer(16, 4), torch.zeros(1, 1, 28, 28), threshold=0.5)
    >>> net.places
    ('blocks.0', 'blocks.1', 'blocks.2')

    Source: Teerapittayanon et al., BranchyNet, arXiv 1709.01686, section III, and its official code: entropy in nats, a
    weighted sum of all exits' losses, every exit trained on every input (its default). There a threshold is one for all
    exits or one for each, screened by hand; here one, by validation data. Its exits have convolutions of their own, and
    are placed by hand.
    """
    call = call_of(example)
    places = find_places(model, call)
    numbers = _numbers(places, exits, at)
    given = _checked(target, drop, threshold, weight)
    with evaluating(model), torch.no_grad():
        out = model(*call[0], **call[1])
    if (logits := logits_of(out)) is None:
        raise ModelError(
            f"{type(model).__name__} gives no logits (inputs, classes): exits are for models that answer once for each "
            "input, with a class"
        )
    classes = logits.shape[1]
    if given["threshold"] is not None and given["threshold"] > math.log(classes):
        raise RecipeError(
            f"threshold is {threshold}: no entropy of {classes} classes is above {math.log(classes):.3g}, so every "
            "input would leave at the first exit"
        )
    made = Exits(
        model, places.paths, {places.paths[k]: Exit(places.width[k], classes, places.axis[k]) for k in numbers},
        {"method": "early-exit", "answers": "tensor" if isinstance(out, Tensor) else "logits", **given},
    )  # fmt: skip
    made.exits.to(device=logits.device, dtype=logits.dtype)
    have = having(model, call)
    _prove(made, call, have)
    one = some_of(call, torch.arange(1), have)
    before = flops(model, *one[0], **one[1]).total
    costs = [_cost(made, one, k) for k in range(len(numbers) + 1)]
    made.record |= {"costs": costs, "flops": {"before": before, "after": before}, "notes": []}
    if target is not None and costs[0] > (limit := _limit(target, before)):
        raise RecipeError(
            f"target '{target}' is out of reach: an input that leaves behind {made.places[0]} has taken "
            f"{100 * costs[0] / before:.0f} % of the FLOPs, and {100 * limit / before:.0f} % may remain: give an "
            "earlier exit by at="
        )
    return made


def _limit(target: str, before: float) -> float:
    wanted = Target.parse(target)
    if wanted.quantity != "flops":
        raise RecipeError(f"early-exit takes a target in FLOPs, such as 'flops 40%', not in {wanted.quantity}")
    return wanted.remaining(before)


def _checked(
    target: str | None, drop: float | None, threshold: float | None, weight: float
) -> dict[str, Any]:  # fmt: skip
    ways = [k for k, v in {"target": target, "drop": drop, "threshold": threshold}.items() if v is not None]
    if len(ways) > 1:
        raise RecipeError(
            f"the threshold is chosen by one of target, drop, threshold: {ways[0]} and {ways[1]} are given"
        )
    if threshold is not None and not threshold > 0:
        raise RecipeError(f"threshold is {threshold}: no entropy is below 0, so no input would ever leave")
    if drop is not None and not 0 <= drop < 1:
        raise RecipeError(f"drop is {drop}: it is how much of the accuracy may be lost, from 0 up to 1")
    if not weight > 0:
        raise RecipeError(f"weight is {weight}: exits that are not trained have nothing to say; give a number above 0")
    return {"target": target, "drop": 0.01 if not ways else drop, "threshold": threshold, "weight": weight}


def _numbers(places: Places, exits: int, at: tuple[int, ...] | None) -> list[int]:
    """Behind which blocks exits stand; behind the last there is no point in one."""
    most = len(places.paths) - 1
    if at is not None:
        at = numbers(at)
        if wrong := [k for k in at if not 0 <= k < most]:
            raise RecipeError(
                f"at names block {wrong[0]}: an exit can stand behind blocks 0 to {most - 1} of this model"
            )
        if not at:
            raise RecipeError("at is empty: name the blocks that exits stand behind")
        return sorted(set(at))
    if exits < 1:
        raise RecipeError(f"exits is {exits}: one at least is needed")
    done, total = 0, max(sum(places.flops), 1)
    shares = []
    for k in range(most):
        done += places.flops[k] if sum(places.flops) else 1
        shares.append(done / total)
    wanted = [(n + 1) / (exits + 1) for n in range(exits)]
    return sorted({min(range(most), key=lambda k: abs(shares[k] - w)) for w in wanted})


def _forced(numbers: Sequence[int]) -> Callable[[int, Tensor], Tensor]:
    """Each input leaves at the exit with its number."""
    where = list(numbers)

    def decide(number: int, logits: Tensor) -> Tensor:
        nonlocal where
        stays = torch.tensor([n != number for n in where], device=logits.device)
        where = [n for n in where if n != number]
        return stays

    return decide


def _cost(made: Exits, one: Call, number: int) -> int:
    """Operations of an input that leaves at an exit."""

    class Alone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gates = made

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return made.leave(_forced([number]), args, kwargs)[0]

    return flops(Alone(), *one[0], **one[1]).total


def _prove(made: Exits, call: Call, have: frozenset[str]) -> None:
    """Refuse a model that does not run on in the same way on the inputs that stay.

    Inputs that differ leave at different exits; each is answered as when none leaves.
    """
    ends = len(made.places) + 1
    some = varied(call, ends + 1, have)
    numbers = [*range(ends), ends - 1]
    kind = type(made.model).__name__
    with evaluating(made), torch.no_grad():
        out, said = made.through(*some[0], **some[1])
        last = logits_of(out)
        assert last is not None
        try:
            found = made.leave(_forced(numbers), some[0], some[1])[0]
        except (RuntimeError, IndexError, TypeError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ModelError(f"{kind} does not run on when inputs leave it between {made.places}: {reason}") from None
    answers = logits_of(found)
    assert answers is not None
    wanted = torch.stack([(*said, last)[n][row] for row, n in enumerate(numbers)])
    scale = wanted.abs().max().clamp_min(1e-6)
    if not bool((answers - wanted).abs().max() <= _NEAR * scale):
        raise ModelError(
            f"{kind} answers otherwise when other inputs have left the batch: something in it mixes inputs, or lies "
            f"beside the blocks ({made.places[0]}, ...)"
        )
