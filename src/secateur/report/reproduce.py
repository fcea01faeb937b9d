"""How to repeat a run, and its data for download."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from typing import Any

from markupsafe import Markup
from ruamel.yaml import YAML
from ruamel.yaml.scalarstring import DoubleQuotedScalarString

from secateur.report import values as v
from secateur.report.read import (
    Record,
)


def reproduce(run: Record) -> dict[str, Any]:
    """What somebody else needs to make the same run."""
    facts: list[tuple[str, str, bool]] = []

    def fact(name: str, value: Any, code: bool = False) -> None:
        if value is not None and value != "":
            facts.append((name, str(value), code))

    data = run.get("data")
    fact("Recipe digest", run.get("digest"), True)
    fact("Seed", run.get("seed"))
    fact("Model", v.dig(run, "model", "source"))
    if isinstance(data, Mapping):
        fact("Calibration data", data.get("source"))
        windows, length, tokens = (v.figure(data, key) for key in ("windows", "length", "tokens"))
        if windows is not None and length is not None:
            known = f" = {v.count(tokens)}" if tokens is not None else ""
            fact("Calibration size", f"{v.count(windows)} windows × {v.count(length)} tokens{known}")
        elif tokens is not None:
            fact("Calibration size", f"{v.count(tokens)} tokens")
        fact("Calibration SHA-256", data.get("sha256"), True)
        fact("Tokenizer", data.get("tokenizer"))
    elif "data" in run:
        fact("Calibration data", "none used")
    measured = v.dig(run, "after", "perplexity") or v.dig(run, "before", "perplexity")
    fact("Evaluation text", v.dig(measured, "text"))
    windows, length, stride = (v.figure(measured, key) for key in ("windows", "length", "stride"))
    if windows is not None and length is not None:
        step = f", stride {v.count(stride)}" if stride is not None else ""
        fact("Evaluation size", f"{v.count(windows)} windows × {v.count(length)} tokens{step}")
    fact("Evaluation SHA-256", v.dig(measured, "sha256"), True)
    machine = run.get("machine")
    for key, value in machine.items() if isinstance(machine, Mapping) else ():
        fact(_MACHINE.get(str(key), str(key)), v.size(v.number(value)) if key == "memory" else value)
    versions = run.get("versions")
    pairs = [f"{name} {value}" for name, value in versions.items()] if isinstance(versions, Mapping) else []
    if run.get("secateur") is not None:
        pairs.insert(0, f"secateur {run['secateur']}")
    fact("Versions", ", ".join(dict.fromkeys(pairs)))
    recipe = run.get("recipe")
    command = run.get("command")
    return {
        "command": " ".join(str(c) for c in v.items(command)) if command else "",
        "recipe": yaml_of(recipe) if isinstance(recipe, Mapping) and recipe else "",
        "facts": facts,
    }


_MACHINE = {"cpu": "Processor", "threads": "Threads", "memory": "Memory", "gpu": "GPU", "device": "Device"}


def yaml_of(value: Record) -> str:
    """YAML that every reader takes alike."""
    writer = YAML(typ="rt")
    writer.width = 100
    writer.allow_unicode = True
    text = io.StringIO()
    writer.dump(_quoted(v.plain(value)), text)
    return text.getvalue().rstrip()


def _quoted(value: Any) -> Any:
    """The same with ``2:4`` in quotes, which a YAML 1.1 reader would take for the number 124."""
    if isinstance(value, dict):
        return {key: _quoted(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_quoted(item) for item in value]
    return DoubleQuotedScalarString(value) if isinstance(value, str) and re.fullmatch(r"[\d:]+", value) else value


def packed(run: Record) -> Any:
    """The record for JSON; layers that share their keys become rows, which the script turns back."""
    record = v.plain(run)
    layers = record.get("layers")
    if isinstance(layers, list) and layers and all(isinstance(x, dict) for x in layers):
        columns = list(layers[0])
        if all(list(x) == columns for x in layers):
            record["layers"] = {"columns": columns, "rows": [list(x.values()) for x in layers]}
    return record


def embed(value: Any) -> Markup:
    """JSON that cannot leave its script element."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for sign in ("<", ">", "&", "\u2028", "\u2029"):
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Markup(text)
