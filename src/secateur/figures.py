"""All figures of a model, beside those of its baseline: size, operations, quality, speed, memory, energy."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .compression import Installed
from .coupled import vocabulary
from .data import Windows, windows
from .measure import count_parameters, machine, perplexity, versions
from .measure.energy import energy, nvml, rapl
from .measure.flops import effective_flops, flops
from .measure.latency import WARMUP
from .measure.size import bytes_in_memory, bytes_on_disk
from .measure.speed import STEPS, TURNS, Forward, Generation, Workload, placed, speeds
from .models import load_tokenizer
from .peak import peak
from .sources import Source, workloads


def figures(
    asked: Sequence[Source],
    *,
    example: str | None = None,
    data: Any = None,
    count: int | None = None,
    length: int = 512,
    tokens: Sequence[int] = (128, 1),
    repeats: int = TURNS,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Measure models in one run, in which they take turns wherever a clock or a counter is read.

    Args:
        asked: one model, or a model and its baseline.
        example: shape of an input; needed where a model does not say what it takes.
        data, count, length: held-out text and how it is cut, for the perplexity of language models with a tokenizer.
        tokens: what language models are timed on, see `sources.workloads`.
        repeats: turns.
        progress: called with what is being done.

    Returns:
        The model's figures, its baseline's under ``baseline`` (None without one), and under ``setup`` how they were
        taken. ``docs/measure.md`` says what each of them is; ``missing`` says why one is None.

    Raises:
        ModelError: a model cannot be loaded, or does not run on its inputs.
        RecipeError: an example is needed, or not understood.
    """
    rows, setup = _with_models(asked, example, data, count, length, tokens, repeats, progress)
    gc.collect()  # the models of this process make room for those of the others
    for source, row in zip(asked, rows, strict=True):
        progress(f"peak memory of {source.name}")
        high = peak(source, example, tokens)
        row |= {"peak_memory": high.host, "peak_memory_gpu": high.gpu}
        row["missing"] |= {"peak_memory": high.reason} if high.reason else {}
    return {**rows[0], "baseline": rows[1] if len(rows) > 1 else None, "setup": setup}


def _with_models(
    asked: Sequence[Source],
    example: str | None,
    data: Any,
    count: int | None,
    length: int,
    tokens: Sequence[int],
    repeats: int,
    progress: Callable[[str], None],
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """All that is measured in this process: a row for each model, and how it was taken."""
    models, loading = [], []
    for source in asked:
        progress(f"loading {source.name}")
        begun = time.perf_counter()
        models.append(source.load())
        loading.append(time.perf_counter() - begun)
    text, no_text = _text(asked, models[0], data, count, length)
    loads = workloads(models, example, tokens, asked[0].example)
    named = dict(zip(("model", "baseline"), models, strict=False))
    progress("timing, in turns")
    speed = speeds(named, loads, repeats)
    progress("energy, in turns")
    joules, no_energy = _energy(named, loads, speed, cuda=asked[0].device == "cuda")
    rows = []
    for key, source, before in zip(named, asked, loading, strict=True):
        progress(f"size and quality of {source.name}")
        begun = time.perf_counter()
        row = {
            "model": source.name,
            **_counted(named[key], source, loads[0]),
            "perplexity": perplexity(named[key], text.ids, text=text.source, sha256=text.sha256).to_dict()
            if text
            else None,
            "latency": speed[key],
            "energy": joules[key] if joules else None,
            "missing": {k: v for k, v in (("perplexity", no_text), ("energy", no_energy)) if v},
            "threads": torch.get_num_threads(),
        }
        rows.append({**row, "seconds": round(before + time.perf_counter() - begun, 3)})
    setup = {
        "turns": repeats,
        "warmup": WARMUP,
        "threads": torch.get_num_threads(),
        "device": asked[0].device,
        "flops_of": loads[0].name,
        "generation": {"prompt": tokens[0], "answer": 1 + STEPS} if isinstance(loads[-1], Generation) else None,
        "machine": machine(),
        "versions": versions(),
    }
    return rows, setup


def _counted(model: nn.Module, source: Source, load: Workload) -> dict[str, Any]:
    """What needs no clock."""
    assert isinstance(load, Forward)
    args, kwargs = placed((tuple(load.args), dict(load.kwargs)), model)
    dense = flops(model, *args, **kwargs)
    parameters, nonzero = count_kept(model)
    where = source.directory
    return {
        "parameters": parameters,
        "nonzero": nonzero,
        "memory": bytes_in_memory(model),
        "bytes": None if where is None else bytes_on_disk(where),
        "flops": dense.total,
        "effective_flops": effective_flops(model, *args, **kwargs).total,
        "flops_unknown": dense.unknown,
    }


def count_kept(model: nn.Module) -> tuple[int, int]:
    """Stored and non-zero parameters; the weights of packed layers, which are buffers, count too."""
    parameters, nonzero = count_parameters(model)
    own = [m for m in model.modules() if isinstance(m, Installed)]
    return parameters + sum(m.stored for m in own), nonzero + sum(m.nonzeros for m in own)


def _text(
    asked: Sequence[Source], model: nn.Module, data: Any, count: int | None, length: int
) -> tuple[Windows | None, str]:
    """Held-out windows for all models, or none and the reason."""
    if not vocabulary(model):
        return None, "only language models have a perplexity"
    for source in asked:
        where = source.directory
        tokenizer = None if where is None else load_tokenizer(where)
        if tokenizer is not None and data is not None:
            return windows(data, tokenizer, count=count, length=length), ""
    return None, "there is no tokenizer to read a text with"


def _energy(
    models: Mapping[str, nn.Module], loads: Sequence[Workload], speed: Mapping[str, Mapping[str, Any]], cuda: bool
) -> tuple[dict[str, dict[str, Any]] | None, str]:
    """Model -> forward pass -> joules; or None, and why nothing can be read."""
    counters, reason = rapl()
    if cuda:
        more, reason_gpu = nvml()
        counters, reason = [*counters, *more], "; ".join(filter(None, (reason, reason_gpu)))
    if not counters:
        return None, reason
    found: dict[str, dict[str, Any]] = {name: {} for name in models}
    for load in loads:
        if isinstance(load, Forward):
            taken = {name: speed[name][load.name]["median"] for name in models}
            for name, row in energy(models, load, taken, counters).items():
                found[name][load.name] = row
    return found, reason
