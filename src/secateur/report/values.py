"""Reading a record that may lack anything, and writing its values for a person."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

NONE = "–"
NBSP = "\u00a0"


def dig(record: Any, *keys: str) -> Any:
    """The value under nested keys, or None where a step is missing."""
    for key in keys:
        if not isinstance(record, Mapping):
            return None
        record = record.get(key)
    return record


def number(value: Any) -> float | None:
    """A finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) else None


def figure(record: Any, *keys: str) -> float | None:
    """The finite number under nested keys, or None."""
    return number(dig(record, *keys))


def items(value: Any) -> list[Any]:
    """A list from a list-like value; a lone string counts as one item."""
    if isinstance(value, str):
        return [value]
    return list(value) if isinstance(value, Sequence) else []


def maps(value: Any) -> list[Mapping[str, Any]]:
    """The mappings of a list-like value."""
    return [item for item in items(value) if isinstance(item, Mapping)]


def word(value: Any) -> str:
    """Text of a scalar; a dash for nothing."""
    return NONE if value is None or value == "" else str(value)


def plain(value: Any) -> Any:
    """A copy that JSON can hold: text keys, and names for what is not a finite number."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return str(value)


def _power(value: float, digits: int = 1) -> str:
    mantissa, exponent = f"{value:.{digits}e}".split("e")
    return f"{mantissa}{NBSP}×{NBSP}10" + str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def percent(value: float | None) -> str:
    """A share as a percentage: ``50 %``, ``39.4 %``."""
    if value is None:
        return NONE
    text = f"{100 * value:.1f}".removesuffix(".0")
    return f"{'0' if text == '-0' else text}{NBSP}%"


def measure(value: Any) -> str:
    """A perplexity: four figures at most; what is not finite says so."""
    if isinstance(value, float) and not math.isfinite(value):
        return "not finite"
    x = number(value)
    if x is None:
        return NONE
    if abs(x) >= 1e6:
        return _power(x)
    return f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.1f}" if abs(x) >= 10 else f"{x:.2f}"


def small(value: float | None) -> str:
    """An error: three figures."""
    if value is None:
        return NONE
    if value == 0:
        return "0"
    return _power(value, 2) if abs(value) < 1e-4 or abs(value) >= 1e5 else f"{value:.3g}"


def count(value: float | None) -> str:
    """A whole number with separators."""
    return NONE if value is None else f"{value:,.0f}"


def short(value: float | None) -> str:
    """A whole number in thousands, millions or billions."""
    if value is None:
        return NONE
    for unit, name in ((1e9, "billion"), (1e6, "million")):
        if abs(value) >= unit:
            return f"{value / unit:.1f}".removesuffix(".0") + NBSP + name
    return f"{value:,.0f}"


def size(value: float | None) -> str:
    """Bytes in binary units."""
    if value is None:
        return NONE
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if abs(value) >= unit:
            return f"{value / unit:.3g}{NBSP}{name}" if abs(value) < 1000 * unit else f"{value / unit:,.0f}{NBSP}{name}"
    return f"{value:.0f}{NBSP}bytes"


def duration(value: float | None) -> str:
    """Seconds as a person says them."""
    if value is None:
        return NONE
    if 0 < value < 0.9995:
        return f"{1000 * value:.0f}{NBSP}ms" if value >= 0.01 else f"{1000 * value:.2g}{NBSP}ms"
    if value < 59.95:
        return f"{value:.1f}{NBSP}s"
    whole = round(value)
    if whole < 3600:
        return f"{whole // 60}{NBSP}min{NBSP}{whole % 60}{NBSP}s"
    return f"{whole // 3600}{NBSP}h{NBSP}{whole % 3600 // 60}{NBSP}min"


def shape(value: Any) -> str:
    """A shape as ``576 × 1536``."""
    return f"{NBSP}×{NBSP}".join(str(side) for side in items(value)) or NONE


def change(before: float | None, after: float | None) -> str:
    """How a figure moved, in per cent of where it began."""
    if before is None or after is None or before == 0:
        return NONE
    moved = after / before - 1
    if abs(moved) < 5e-4:
        return "unchanged"
    return f"{'+' if moved > 0 else '−'}{percent(abs(moved))}"


def ratio(before: float | None, after: float | None) -> str:
    """How many times a figure its first value is: ``1.62×``."""
    if before is None or after is None or before <= 0:
        return NONE
    times = after / before
    return f"{times:.2f}×" if times < 10 else f"{times:,.0f}×" if times < 1e6 else f"{_power(times)}{NBSP}×"
