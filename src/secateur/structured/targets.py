"""What a smaller model must reach, as a user writes it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..errors import RecipeError

_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9, "t": 1e12}
_TIMES = {"s": 1.0, "ms": 1e-3, "us": 1e-6}
_TARGET = re.compile(
    r"(params|flops|bytes|memory|latency)\s+(to\s+)?(\d+(?:\.\d+)?|\.\d+)\s*(%|[kmgbt]?|ms|us|s)", re.IGNORECASE
)


@dataclass(frozen=True)
class Target:
    """A count and what of it may remain.

    Attributes:
        quantity: ``params`` (stored parameters), ``bytes`` (of the parameters), ``flops`` (of one forward pass of
            the example), ``memory`` (bytes alive at once in that pass, at their most) or ``latency`` (seconds of
            that pass, measured on this machine).
        fraction: what remains, of what was; or None.
        limit: what remains, as a count; or None.
    """

    quantity: str
    fraction: float | None = None
    limit: float | None = None

    @staticmethod
    def parse(text: str) -> Target:
        """Read a target.

        ``"flops 50%"`` takes half of the FLOPs away, as a sparsity of 0.5 takes half of the weights;
        ``"flops to 30%"``, ``"params to 2M"`` and ``"latency to 20ms"`` say what remains.

        >>> Target.parse("flops 40%").remaining(1000)
        600.0
        >>> Target.parse("params to 1.5M").remaining(4_000_000)
        1500000.0

        Raises:
            RecipeError: it is written in another way, or asks for nothing or everything.
        """
        found = _TARGET.fullmatch(text.strip())
        if found is None:
            raise RecipeError(
                f"target '{text}' is not understood: write 'params 50%', 'flops 50%', 'bytes 50%', 'memory 50%' or "
                "'latency 50%' (what goes), 'flops to 50%', 'params to 2M' or 'latency to 20ms' (what remains)"
            )
        quantity, to, number, unit = found[1].lower(), bool(found[2]), float(found[3]), found[4].lower()
        if unit == "%":
            share = number / 100 if to else 1 - number / 100
            if not 0 < share < 1:
                raise RecipeError(f"target '{text}' must leave something and take something away")
            return Target(quantity, fraction=share)
        if not to:
            raise RecipeError(
                f"target '{text}' is a count: write '{quantity} to {found[3]}{found[4]}' for what remains"
            )
        if (unit in _TIMES) != (quantity == "latency"):
            raise RecipeError(f"target '{text}': latency has a unit of time (s, ms, us), and nothing else has")
        return Target(quantity, limit=number * (_TIMES | _UNITS)[unit])

    def remaining(self, before: float) -> float:
        """How much may remain of ``before``."""
        return before * self.fraction if self.fraction is not None else float(self.limit or 0.0)

    def __str__(self) -> str:
        if self.fraction is not None:
            return f"{self.quantity} to {100 * self.fraction:g}%"
        if self.quantity == "latency":
            return f"latency to {1e3 * (self.limit or 0):g}ms"
        return f"{self.quantity} to {self.limit:,.0f}"
