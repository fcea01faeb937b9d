"""What every page of secateur is made with: its style, its script, its templates; and how a page is written."""

from __future__ import annotations

import base64
import hashlib
import os
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from secateur.report import charts
from secateur.report import values as v

_HERE = Path(__file__).parent


def environment(*folders: Path) -> Environment:
    """Templates of these folders, and the macros of this one; what is not defined is an error."""
    made = Environment(
        loader=FileSystemLoader([*folders, _HERE]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters.update(
        percent=v.percent, count=v.count, small=v.small, duration=v.duration, shape=v.shape, word=v.word
    )
    return made


def shell(*, script: str, style: str = "") -> dict[str, Any]:
    """Style, script and the policy that lets this script run and nothing load; ``script`` and ``style`` are added."""
    whole = Markup((_HERE / "common.js").read_text(encoding="utf-8") + script)
    digest = base64.b64encode(hashlib.sha256(whole.encode()).digest()).decode()
    return {
        "policy": f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:",
        "style": Markup((_HERE / "report.css").read_text(encoding="utf-8") + style),
        "script": whole,
        "markers": charts.marker_defs(),
    }


def put(path: Path, html: str) -> Path:
    """Write a page beside ``path`` first, then put it in place in one step; returns the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        beside.write_text(html, encoding="utf-8", errors="replace")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    return path
