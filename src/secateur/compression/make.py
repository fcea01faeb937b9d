"""Compress a model: each layer as it is fastest on this machine, and dense where that is."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..errors import ModelError, RecipeError
from ..kernels.library import BUILD, library
from ..layers import evaluating
from ..measure import machine
from ..measure.latency import latency
from ..measure.size import bytes_in_memory
from ..models import cache_directory
from ..structured.plan import inputs
from .candidates import VALUES, Site, Table, is_cold, sites, watch
from .choose import Choice, choose
from .fuse import Tail, folded, tails

#: Difference of outputs that rounding explains, and by how much a workload may seem slower by chance.
_EXACT, _NOISE = 1e-3, 1.1


@dataclasses.dataclass
class Compression:
    """What `compress` did.

    Attributes:
        choices: layer by layer.
        workloads: what the model was timed on -> seconds of the dense and of the compressed model.
        bytes: of the weights in memory, before and after.
        error: largest relative difference of an output, by root mean squares.
        machine: where all of this was measured.
        note: what is to be said of the whole; empty where there is nothing.
    """

    choices: list[Choice]
    workloads: dict[str, tuple[float, float]]
    bytes: tuple[int, int]
    error: float
    machine: dict[str, Any]
    note: str = ""

    @property
    def packed(self) -> list[Choice]:
        """The layers that were packed."""
        return [c for c in self.choices if c.kind != "dense"]

    def to_dict(self) -> dict[str, Any]:
        """For a file."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        lines = [f"{len(self.packed)} of {len(self.choices)} layers are packed, the others stay dense"]
        groups: dict[tuple[Any, ...], list[Choice]] = {}
        for c in self.choices:
            groups.setdefault((c.shape, round(20 * c.zeros), c.kind, c.index, c.reason), []).append(c)
        for (shape, _, kind, index, reason), members in groups.items():
            what = "dense" if kind == "dense" else f"dense {kind}" if index == "dense" else f"{kind} by {index}"
            size = f"{shape[0]:>6} x {shape[1]:<6} {members[0].zeros:>4.0%} zeros"
            lines.append(f"  {len(members):>4} x {size}  {what:<18} {reason}")
        for name, (dense, small) in self.workloads.items():
            lines.append(
                f"{name:<24} {1e3 * dense:9.2f} ms -> {1e3 * small:9.2f} ms: {dense / small:.2f} times as fast"
            )
        if self.packed:
            before, after = self.bytes
            lines.append(f"{'weights in memory':<24} {before / 2**20:9.1f} MiB -> {after / 2**20:7.1f} MiB")
            lines.append(f"{'difference of outputs':<24} {self.error:9.1e}")
        where = self.machine.get("gpu") or f"{self.machine['cpu']}, {self.machine['threads']} threads"
        lines.append(f"measured on {where}")
        return "\n".join([*lines, *([self.note] if self.note else [])])


def compress(
    model: nn.Module,
    example: Any = None,
    *,
    kinds: Sequence[str] = ("float32",),
    fresh: bool = False,
    cache: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> nn.Module:
    """A model that computes the same without the zeros, where that is faster on this machine.

    Each layer is timed dense and packed, on inputs as the example gives it, and the fastest is installed. At the end
    the whole model is timed beside the dense one, and given back as it was where nothing is won.

    Args:
        model: with zeros in its weights, on the CPU or on a GPU; it is not changed.
        example: inputs of a forward pass: a tensor, a tuple or a dict; a list of them where the model has several
            workloads, such as a prompt and a single token.
        kinds: of values that may be used: ``float32`` (the same outputs up to rounding), ``bfloat16``, ``int8``,
            ``int8-dynamic`` (activations of single tokens, and of dense layers, become int8 too), ``int4`` (layers
            that were quantized to 4 bits or fewer keep their integers; activations of many tokens become bfloat16).
        fresh: measure again what an earlier run measured on this machine.
        cache: keep the measurements for later runs.
        progress: called with (layers done, layers).

    Returns:
        A copy whose layers are packed (untouched ones are shared with nothing), with the report in its attribute
        ``compression``; where nothing is faster, the model itself, with the report.

    Raises:
        RecipeError: no example, or an unknown kind.
        ModelError: the model does not run on the example.
    """
    if example is None:
        raise RecipeError("compress times layers on what they are given: give inputs of a forward pass with example=")
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if unknown := set(kinds) - set(VALUES):
        raise RecipeError(f"values of kind '{sorted(unknown)[0]}' are not known: {', '.join(VALUES)}")
    loads = [inputs(x) for x in (example if isinstance(example, list) else [example])]
    if any(p.is_cuda for p in model.parameters()):
        from .gpu import compress_gpu

        return compress_gpu(model, loads, kinds=kinds, fresh=fresh, cache=cache, progress=progress)
    found = list(sites(model, kinds))
    report = Compression([], {}, (bytes_in_memory(model), bytes_in_memory(model)), 0.0, machine())
    if library() is None:
        report.note = f"nothing is packed: the sparse kernels are not built for this machine ({BUILD})"
        return _with(model, report)
    able = [s for s in found if not s.reason]
    try:
        watch(model, able, loads)
    except Exception as error:
        raise ModelError(f"the model does not run on the example: {type(error).__name__} {error}") from None
    table = Table(cache_directory() / "layers.json" if cache else None, fresh)
    report.choices = choose(found, table, kinds, is_cold(model), len(loads), progress)
    table.save()
    replaced = _replacements(model, found, report.choices, loads)
    if not replaced:
        report.note = "nothing is packed: no layer of this model is faster without its zeros on this machine"
        return _with(model, report)
    exact = all(c.kind in ("dense", "float32") for c in report.choices)
    return judged(model, replaced, report, loads, _EXACT if exact else None)


def judged(
    model: nn.Module,
    replaced: dict[int, Any],
    report: Compression,
    loads: Sequence[tuple[tuple[Any, ...], dict[str, Any]]],
    tolerance: float | None,
) -> nn.Module:
    """A copy with other layers if its outputs are the same and it is faster as a whole; the model itself if not.

    Args:
        replaced: by the identity of a module, what takes its place.
        tolerance: the largest difference of outputs; None where smaller values are wanted, whatever they change.
    """
    fast = copy.deepcopy(model, dict(replaced))
    report.error = _difference(model, fast, loads)
    for args, kwargs in loads:
        times = latency({"dense": model, "fast": fast}, args, kwargs)
        report.workloads[_label(args, kwargs)] = (times["dense"], times["fast"])
    ratios = [small / dense for dense, small in report.workloads.values()]
    if not math.isfinite(report.error) or (tolerance is not None and report.error > tolerance):
        report.note = (
            f"the model stays dense: packed, its outputs would differ by {report.error:.1e}; please report this"
        )
    elif sum(ratios) > len(ratios) or max(ratios) > _NOISE:
        report.note = "the model stays dense: its layers were faster alone, but not together"
    if report.note:
        for choice in report.packed:
            choice.kind, choice.index, choice.reason = "dense", "", f"alone {choice.reason}"
        return _with(model, report)
    report.bytes = (report.bytes[0], bytes_in_memory(fast))
    return _with(fast, report)


def _replacements(
    model: nn.Module,
    found: Sequence[Site],
    choices: Sequence[Choice],
    loads: Sequence[tuple[tuple[Any, ...], dict[str, Any]]],
) -> dict[int, Any]:
    """By the identity of modules: packed layers, with what comes behind them, and nothing where that was."""
    chosen = {site.name: (site, choice) for site, choice in zip(found, choices, strict=True) if choice.kind != "dense"}
    behind = tails(model, list(chosen), loads) if chosen else {}
    replaced: dict[int, Any] = {}
    for name, (site, choice) in chosen.items():
        tail = behind.get(name, Tail())
        bias: Any = site.module.bias
        weight = site.matrix()
        if tail.norm:
            norm: Any = model.get_submodule(tail.norm)
            weight, bias = folded(weight, bias, norm)
            choice.reason += ", with its batch norm"
        if tail.relu:
            choice.reason += " and ReLU" if tail.norm else ", with its ReLU"
        for other in filter(None, (tail.norm, tail.relu)):
            replaced[id(model.get_submodule(other))] = nn.Identity()
        made = site.made(choice.kind, choice.index, weight, bias, "relu" if tail.relu else "none")
        replaced[id(site.module)] = made.train(site.module.training)
    return replaced


def _label(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    shapes = [f"{tuple(t.shape)}" for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    return "input " + ", ".join(shapes[:2])


def _difference(model: nn.Module, fast: nn.Module, loads: Sequence[tuple[tuple[Any, ...], dict[str, Any]]]) -> float:
    worst = 0.0
    with evaluating(model, fast), torch.inference_mode():
        for args, kwargs in loads:
            pairs = zip(tree_leaves(model(*args, **kwargs)), tree_leaves(fast(*args, **kwargs)), strict=True)
            for a, b in pairs:
                if isinstance(a, Tensor) and a.is_floating_point():
                    whole = a.isfinite()
                    if not torch.equal(whole, b.isfinite()):
                        return math.inf
                    a, b = a[whole], b[whole]
                    if not a.numel():
                        continue
                    scale = float(a.double().square().mean().sqrt()) or 1.0
                    worst = max(worst, float((a.double() - b.double()).square().mean().sqrt()) / scale)
    return worst


def _with(model: nn.Module, report: Compression) -> nn.Module:
    model.compression = report  # type: ignore[assignment]
    return model
