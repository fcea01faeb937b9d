"""Plain data that cannot be changed, and back: what recipes keep their knobs as."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any


def frozen(mapping: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """A read-only copy, all the way down; lists become tuples."""
    return MappingProxyType({k: _frozen_value(v) for k, v in (mapping or {}).items()})


def _frozen_value(value: Any) -> Any:
    if isinstance(value, Mapping):
        return frozen(value)
    return tuple(_frozen_value(v) for v in value) if isinstance(value, (list, tuple)) else value


def thawed(value: Any) -> Any:
    """The inverse of `frozen`: dictionaries and lists."""
    if isinstance(value, Mapping):
        return {str(k): thawed(v) for k, v in value.items()}
    return [thawed(v) for v in value] if isinstance(value, (list, tuple)) else value


def plain(value: Any) -> Any:
    """Numbers that are equal, written alike.

    >>> plain({"p": 2.0, "q": [0.5]})
    {'p': 2, 'q': [0.5]}
    """
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [plain(v) for v in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
