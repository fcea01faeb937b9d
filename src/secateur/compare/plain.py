"""Results as plain data, for pages and files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def plain_dict(found: DataclassInstance) -> dict[str, Any]:
    """A dataclass as plain data; see `plain`."""
    data: dict[str, Any] = plain(asdict(found))
    return data


def plain(value: Any) -> Any:
    """Mappings, lists and numbers; one that is not finite, as the end of an interval that has none, is None.

    >>> plain({"a": (1, math.inf)})
    {'a': [1, None]}
    """
    if hasattr(value, "to_dict"):
        value = value.to_dict()
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
