"""YAML 1.2 as users write it and as it is written back: recipes, compounds and studies are such files."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from .errors import RecipeError, SecateurError


def read(source: str | Path, what: str = "recipe", failure: type[SecateurError] = RecipeError) -> Any:
    """The plain data of YAML text, or of a file. It never names code to import.

    Args:
        what: the file should be, for the message.
        failure: the error that is raised.

    Raises:
        RecipeError: or ``failure``: it cannot be read, or is no YAML.

    >>> read("granularity: 2:4")  # YAML 1.1 would say 124
    {'granularity': '2:4'}
    """
    try:
        text = source.read_text(encoding="utf-8") if isinstance(source, Path) else source
    except (OSError, UnicodeDecodeError) as error:
        raise failure(f"the {what} {source} cannot be read: {error}") from None
    where = f" in {source}" if isinstance(source, Path) else ""
    try:
        return YAML(typ="safe").load(text)
    except YAMLError as error:
        raise failure(f"not a YAML {what}{where}: {str(error).splitlines()[0]}") from None


def written(data: Mapping[str, Any], *, short: bool = False) -> str:
    """Plain data as YAML 1.2 text, in its own order.

    Args:
        short: lists and mappings of single values stand on one line.
    """
    stream = io.StringIO()
    yaml = YAML(typ="safe")
    yaml.default_flow_style = None if short else False
    if short:
        yaml.width = 120
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.dump(data, stream)
    return stream.getvalue()
