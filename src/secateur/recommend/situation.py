"""A situation: what a person has, wants and allows, as data; and how each part of it is read from text."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, field
from typing import Any

from ..errors import RecipeError
from .hardware import Hardware

#: What a model is, by its structure.
KINDS = {
    "cnn": "convolutional network",
    "vit": "vision transformer",
    "encoder": "transformer encoder",
    "decoder": "decoder language model",
    "encoder-decoder": "encoder and decoder",
    "moe": "mixture of experts",
    "other": "other network",
}
#: What data is at hand; each has what those before it have.
DATA = ("none", "unlabeled", "labels", "training")
WEIGHTS = ("pretrained", "init")
#: What a goal may be about.
QUANTITIES = ("latency", "size", "memory", "flops", "params", "sparsity")

_ALIASES = {"bytes": "size", "parameters": "params", "speed": "latency", "time": "latency", "macs": "flops"}
_GOAL = re.compile(r"([a-z]+)\s+(to\s+)?(\d+(?:\.\d+)?|\.\d+)\s*(x|%|)")
_TIME = re.compile(r"(\d+(?:\.\d+)?|\.\d+)\s*(s|m|min|h|d)")
_SECONDS = {"s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_UNITS = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12}


@dataclass(frozen=True)
class Goal:
    """What is to become less, and the share of it that may remain.

    Attributes:
        quantity: one of `QUANTITIES`; ``sparsity`` counts the weights of the pruned layers.
        keep: the share that may remain.
        assumed: nobody asked for it; half of the weights is what is looked at then.
    """

    quantity: str = "sparsity"
    keep: float = 0.5
    assumed: bool = True

    @property
    def factor(self) -> float:
        """How many times less: 2 for half."""
        return 1.0 / self.keep

    @staticmethod
    def parse(text: str) -> Goal:
        """Read a goal: ``latency 2x`` (twice as fast), ``size 50%`` (half goes), ``size to 30%``, ``sparsity 0.7``.

        >>> Goal.parse("latency 2x").keep, Goal.parse("size 75%").factor, Goal.parse("params to 40%").keep
        (0.5, 4.0, 0.4)

        Raises:
            RecipeError: it is written in another way, or asks for nothing or for everything.
        """
        found = _GOAL.fullmatch(text.strip().lower())
        quantity = _ALIASES.get(found[1], found[1]) if found else ""
        if found is None or quantity not in QUANTITIES:
            raise RecipeError(
                f"the goal '{text}' is not understood: write 'latency 2x', 'size 50%' or 'flops 50%' (what goes), "
                f"'params to 30%' (what remains) or 'sparsity 0.7'; it may be about {', '.join(QUANTITIES)}"
            )
        number, unit, to = float(found[3]), found[4], bool(found[2])
        if unit == "x":
            keep = 1.0 / number if number > 0 else 0.0
        else:
            share = number / 100 if unit == "%" else number
            keep = share if to else 1.0 - share
        if (unit == "x" and to) or not 0.0 < keep < 1.0:
            raise RecipeError(
                f"the goal '{text}' must leave something and take something away: write 'size 50%' or '2x'"
            )
        return Goal(quantity, round(keep, 6), assumed=False)

    def __str__(self) -> str:
        if self.quantity == "latency":
            return f"{self.factor:.3g} times as fast"
        return f"{100 * (1 - self.keep):.3g} % less {'weights' if self.quantity == 'sparsity' else self.quantity}"


@dataclass(frozen=True)
class Retraining:
    """How long the model may be trained.

    Attributes:
        seconds: zero for not at all, infinity for as long as it takes; None where only epochs are said.
        epochs: of the training data, where the user says them.
        epoch: seconds that one epoch takes; None where nobody knows.
    """

    seconds: float | None = 0.0
    epochs: float | None = None
    epoch: float | None = None

    @staticmethod
    def parse(text: str, epoch: str | None = None) -> Retraining:
        """Read a time (``no``, ``30m``, ``2h``, ``3d``, ``any``) or a number of epochs (``20 epochs``).

        >>> Retraining.parse("2h", epoch="6m").allowed, Retraining.parse("5 epochs").allowed
        (20.0, 5.0)

        Raises:
            RecipeError: it is written in another way.
        """
        plain = text.strip().lower()
        each = None if epoch is None else _seconds(epoch, "--epoch")
        if plain in ("no", "none", "0"):
            return Retraining(0.0, epoch=each)
        if plain in ("any", "yes", "unlimited"):
            return Retraining(math.inf, epoch=each)
        if found := re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:epochs?|e)", plain):
            return Retraining(None, float(found[1]), each)
        return Retraining(_seconds(text, "--retrain"), epoch=each)

    @property
    def none(self) -> bool:
        """Whether the model may not be trained at all."""
        return self.seconds == 0 or self.epochs == 0

    @property
    def allowed(self) -> float | None:
        """Epochs; None where it is not known how long one takes."""
        if self.epochs is not None or self.none:
            return self.epochs or 0.0
        if self.seconds is None or math.isinf(self.seconds):
            return self.seconds
        return self.seconds / self.epoch if self.epoch else None

    def __str__(self) -> str:
        if self.none:
            return "no retraining"
        if self.epochs is not None:
            return f"{self.epochs:g} epochs of retraining"
        if self.seconds is None or math.isinf(self.seconds):
            return "retraining as long as it takes"
        return f"{spoken(self.seconds)} of retraining"


def _seconds(text: str, option: str) -> float:
    found = _TIME.fullmatch(text.strip().lower())
    if found is None or float(found[1]) == 0:
        more = ", no, any or '20 epochs'" if option == "--retrain" else ""
        raise RecipeError(f"{option} '{text}' is not understood: write a time such as 30m, 2h or 3d{more}")
    return float(found[1]) * _SECONDS[found[2]]


def spoken(seconds: float) -> str:
    """A time as people say it.

    >>> spoken(7200), spoken(90), spoken(0.5)
    ('2 h', '1.5 min', '0.5 s')
    """
    for unit, size in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.2g} s"


def count(text: str) -> int:
    """A number of parameters.

    >>> count("25M"), count("1.3B"), count("270000")
    (25000000, 1300000000, 270000)

    Raises:
        RecipeError: it is no such number.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGBT]?)", text.strip().upper())
    if found is None or float(found[1]) == 0:
        raise RecipeError(f"--parameters '{text}' is not understood: write a number such as 25M or 1.3B")
    return int(float(found[1]) * _UNITS[found[2]])


def counted(number: float | None) -> str:
    """The inverse of `count`, shortened.

    >>> counted(25_557_032), counted(1.3e9), counted(None)
    ('25.6M', '1.3B', 'unknown')
    """
    if number is None:
        return "unknown"
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:g}"


def fraction(text: str) -> float:
    """A share as a user writes it: ``1%`` or ``0.01``.

    Raises:
        RecipeError: it is no such share.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+)\s*(%?)", text.strip())
    value = float(found[1]) / (100 if found[2] else 1) if found else -1.0
    if not 0.0 <= value < 1.0:
        raise RecipeError(f"--max-drop '{text}' is not understood: write a share such as 1% or 0.01")
    return value


@dataclass(frozen=True)
class Situation:
    """What a person has, wants and allows.

    Attributes:
        kind: of the model, one of `KINDS`.
        parameters: of the model; None where that is not known.
        model: how the user names the model; empty where it was only described.
        hardware: where the model is to run.
        goal: what is to become less.
        data: one of `DATA`.
        retraining: how long the model may be trained.
        weights: ``pretrained``, or ``init`` where it is not trained yet.
        max_drop: how much of the score may be lost, as a share of the dense model's; None where nobody said.
    """

    kind: str = "other"
    parameters: int | None = None
    model: str = ""
    hardware: Hardware = field(default_factory=Hardware)
    goal: Goal = field(default_factory=Goal)
    data: str = "none"
    retraining: Retraining = field(default_factory=Retraining)
    weights: str = "pretrained"
    max_drop: float | None = None

    def __post_init__(self) -> None:
        for name, value, known in (
            ("kind", self.kind, tuple(KINDS)),
            ("data", self.data, DATA),
            ("weights", self.weights, WEIGHTS),
        ):
            if value not in known:
                raise RecipeError(f"{name} '{value}' is not known: write one of {', '.join(known)}")
        if self.parameters is not None and self.parameters < 1:
            raise RecipeError(f"a model has at least one parameter, not {self.parameters}")
        if self.max_drop is not None and not 0.0 <= self.max_drop < 1.0:
            raise RecipeError(f"the drop allowed is a share in [0, 1), not {self.max_drop:g}")

    @staticmethod
    def of(
        model: str = "", *, kind: str | None = None, parameters: str | None = None, hardware: str = "any",
        want: str | None = None, data: str = "none", retrain: str = "no", epoch: str | None = None,
        weights: str = "pretrained", max_drop: str | None = None,
    ) -> Situation:  # fmt: skip
        """A situation as it is written on the command line; of a model its structure is read.

        >>> str(Situation.of(kind="cnn", parameters="25M", hardware="edge", want="latency 2x").goal)
        '2 times as fast'

        Raises:
            RecipeError: something is not understood, with what may be written.
            ModelError: the model cannot be looked at, and is not described.
        """
        from .subject import look

        goal = Goal() if want is None else Goal.parse(want)
        place, time = Hardware.parse(hardware), Retraining.parse(retrain, epoch)
        allowed = None if max_drop is None else fraction(max_drop)
        found = look(model, kind, None if parameters is None else count(parameters))
        return Situation(found.kind, found.parameters, found.name, place, goal, data, time, weights, allowed)

    @property
    def language(self) -> bool:
        """Whether the model's own inputs are its targets, so that text without labels gives a loss."""
        return self.kind in ("decoder", "moe")

    @property
    def has_loss(self) -> bool:
        """Whether there is data on which the loss can be computed."""
        return DATA.index(self.data) >= (1 if self.language else 2)

    @property
    def trains(self) -> bool:
        """Whether the model can be trained: there is a loss, and there is time."""
        return self.has_loss and not self.retraining.none

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data; an endless time is None."""
        found = asdict(self)
        if self.retraining.seconds is not None and math.isinf(self.retraining.seconds):
            found["retraining"]["seconds"] = None
        return found

    def __str__(self) -> str:
        size = f"{counted(self.parameters)} parameters" if self.parameters else "unknown size"
        name = f"{self.model}, " if self.model else ""
        drop = "" if self.max_drop is None else f", at most {100 * self.max_drop:g} % of the score lost"
        goal = f"{self.goal}{' (assumed: no goal was given)' if self.goal.assumed else ''}"
        data = {"none": "no data", "unlabeled": "data without labels", "labels": "data with labels"}
        return (
            f"{name}a {KINDS[self.kind]} of {size}, {self.weights} weights, on {self.hardware}; "
            f"{data.get(self.data, 'the training data')}, {self.retraining}; wanted: {goal}{drop}"
        )
