"""Measure a model or a model directory; dense and pruned under the same loader."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from .data import EVALUATION, Windows, windows
from .measure import Peak, count_parameters, perplexity
from .measure.size import bytes_on_disk
from .models import load_model, load_tokenizer, resolve


def measure(
    model: nn.Module | str | Path,
    data: Any = EVALUATION,
    *,
    tokenizer: Any = None,
    windows_count: int | None = None,
    length: int = 512,
    tick: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Perplexity, parameters stored and non-zero, bytes on disk, wall time and peak memory.

    Args:
        model: a causal language model, or what `models.resolve` accepts.
        data: held-out text (``text:FILE``), windows, or None for no perplexity.
        windows_count, length: how the text is cut; windows do not overlap.
        tick: called with (windows done, windows).

    Returns:
        ``{"perplexity": {...} or None, "parameters", "nonzero", "bytes", "seconds", "peak_memory"}``.
    """
    start = time.perf_counter()
    with Peak() as peak:
        size = None
        net: nn.Module
        if isinstance(model, nn.Module):
            net = model
            text = _text(data, tokenizer, windows_count, length)
        else:
            path = resolve(model)
            text = _text(data, tokenizer or load_tokenizer(path), windows_count, length)
            size = bytes_on_disk(path)
            net = load_model(path)
        found = None
        if text is not None:
            done = 0

            def count() -> None:
                nonlocal done
                done += 1
                if tick is not None:
                    tick(done, len(text))

            found = perplexity(net, text.ids, text=text.source, sha256=text.sha256, tick=count).to_dict()
        total, nonzero = count_parameters(net)
    return {
        "perplexity": found,
        "parameters": total,
        "nonzero": nonzero,
        "bytes": size,
        "seconds": round(time.perf_counter() - start, 3),
        "peak_memory": peak.bytes,
    }


def dense_source(model: str | Path) -> str | None:
    """What a pruned directory was made of, where that is still at hand; None for any other model."""
    record = Path(model) / "run.json"
    try:
        source = json.loads(record.read_text(encoding="utf-8"))["model"]["source"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not isinstance(source, str) or not (source == "demo" or Path(source).is_dir()):
        return None
    return source


def _text(data: Any, tokenizer: Any, count: int | None, length: int) -> Windows | None:
    return None if data is None else windows(data, tokenizer, count=count, length=length)
