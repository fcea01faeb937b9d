"""Read a run's record: what may be absent is None."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from secateur.report import values as v

Record = Mapping[str, Any]

SERIES = 14


def when_of(created: Any) -> str:
    """A time stamp as a person reads it; any other text as it stands."""
    text = "" if created is None else str(created)
    found = re.fullmatch(r"(\d{4}-\d\d-\d\d)T(\d\d:\d\d)(?::\d\d(?:\.\d+)?)?(?:Z|\+00:00)", text)
    return f"{found[1]}, {found[2]} UTC" if found else text


def method_of(run: Record) -> str:
    """The name of the run's method."""
    return str(v.dig(run, "recipe", "method") or v.dig(run, "recipe", "criterion") or "pruning")


def labels_of(runs: Sequence[Record]) -> list[str]:
    """A different short name for each run: the method, then its sparsity, then a number."""
    names = [method_of(run) for run in runs]
    if len(set(names)) < len(names):
        twice = {name for name in names if names.count(name) > 1}
        names = [
            f"{name} {v.percent(pruned_of(run))}" if name in twice else name
            for name, run in zip(names, runs, strict=True)
        ]
    if len(set(names)) < len(names):
        names = [
            f"{name} #{names[: i + 1].count(name)}" if names.count(name) > 1 else name for i, name in enumerate(names)
        ]
    return names


def layer_sparsity_of(layer: Record) -> float | None:
    """A layer's sparsity as recorded, else from its counts."""
    given = v.figure(layer, "sparsity")
    total, kept = v.figure(layer, "parameters"), v.figure(layer, "kept")
    if given is None and total and kept is not None:
        return 1 - kept / total
    return given


def pruned_of(run: Record) -> float | None:
    """The sparsity over the pruned layers: recorded, else counted, else what the recipe asked for."""
    given = v.figure(run, "sparsity", "pruned_layers")
    if given is not None:
        return given
    pairs = [(v.figure(x, "parameters"), layer_sparsity_of(x)) for x in v.maps(run.get("layers"))]
    known = [(n, s) for n, s in pairs if n and s is not None]
    if known:
        return sum(n * s for n, s in known) / sum(n for n, _ in known)
    return v.figure(run, "recipe", "sparsity")


def perplexity_of(run: Record, when: str) -> float | None:
    """The perplexity ``before`` or ``after``."""
    return v.figure(run, when, "perplexity", "value")


def same_text(*measured: Any) -> bool:
    """Whether perplexities were taken on the same tokens in the same way, as far as the records tell."""
    for key in ("sha256", "tokens", "windows", "length", "stride"):
        seen = {str(v.dig(m, key)) for m in measured if v.dig(m, "value") is not None and v.dig(m, key) is not None}
        if len(seen) > 1:
            return False
    return True


def median_error_of(run: Record) -> float | None:
    """The median output error over the layers."""
    known = [e for layer in v.maps(run.get("layers")) if (e := v.figure(layer, "error")) is not None]
    return statistics.median(known) if known else None


def block_of(layer: Record) -> int | None:
    """The number of the block that holds a layer."""
    block = layer.get("block")
    return block if isinstance(block, int) and not isinstance(block, bool) else None


def kinds_of(layers: Sequence[Record]) -> list[str]:
    """A short type for each layer (``q_proj``), longer only where two types would share a name."""
    tails = []
    for layer in layers:
        parts = str(layer.get("name") or "layer").split(".")
        block = str(block_of(layer))
        if block in parts:
            parts = parts[parts.index(block) + 1 :] or parts
            tails.append(tuple("*" if part.isdigit() else part for part in parts))
        else:
            tails.append(tuple([part for part in parts if not part.isdigit()][-1:] or parts[-1:]))
    long: dict[str, set[tuple[str, ...]]] = {}
    for tail in tails:
        long.setdefault(tail[-1], set()).add(tail)
    kinds = [tail[-1] if len(long[tail[-1]]) == 1 and tail[-1] != "*" else ".".join(tail) for tail in tails]
    common = list(dict.fromkeys(kinds))
    if len(common) > SERIES:
        common = sorted(common, key=lambda kind: -kinds.count(kind))[: SERIES - 1]
        kinds = [kind if kind in common else "other layers" for kind in kinds]
    return kinds
