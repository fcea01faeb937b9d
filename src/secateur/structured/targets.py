"""What a smaller model must reach, as a user writes it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..errors import RecipeError

_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9, "t": 1e12}
_TARGET = re.compile(r"(params|flops)\s+(to\s+)?(\d+(?:\.\d+)?|\.\d+)\s*(%|[kmgbt]?)", re.IGNORECASE)


@dataclass(frozen=True)
class Target:
    """A count and what of it may remain.

    Attributes:
        quantity: ``params`` (stored parameters) or ``flops`` (of one forward pass of the example).
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
        ``"flops to 30%"`` and ``"params to 2M"`` say what remains.

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
                f"target '{text}' is not understood: write 'params 50%' or 'flops 50%' (what goes), "
                "'flops to 50%' or 'params to 2M' (what remains)"
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
        return Target(quantity, limit=number * _UNITS[unit])

    def remaining(self, before: float) -> float:
        """How much may remain of ``before``."""
        return before * self.fraction if self.fraction is not None else float(self.limit or 0.0)

    def __str__(self) -> str:
        if self.fraction is not None:
            return f"{self.quantity} to {100 * self.fraction:g}%"
        return f"{self.quantity} to {self.limit:,.0f}"
