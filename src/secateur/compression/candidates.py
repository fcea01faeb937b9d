"""Which layers can be packed, what they are given, and how long each way of computing them takes on this machine."""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError, RecipeError
from ..formats import KINDS, Grid, Packed, pack
from ..kernels.int4 import GROUPS
from ..kernels.library import library
from ..kernels.ops import FEW
from ..layers import evaluating
from ..measure import machine
from .dense import DenseLinear, has_dense
from .int4 import Int4Linear, found_grid
from .modules import Installed, Sparse, SparseConv2d, SparseLinear

#: Kinds of values that may be asked for; ``int4`` is of layers that a quantizer has put on a grid of 4 bits.
VALUES = (*KINDS, "int4")
#: Zeros below which nothing is tried: a half is about where kernels begin to win.
_LEAST = 0.3
#: Weights of this many bytes do not stay in a processor's caches from one token to the next; twice as many are
#: written between measurements of such a model.
_CACHES = 32 << 20
#: Times as slow as the dense layer in the first turns, from which on a candidate is not looked at any more.
_HOPELESS = 4.0


@dataclasses.dataclass
class Site:
    """A layer that could be packed.

    Attributes:
        name: where it is in the model.
        module: it.
        inputs: (workload, shape that it is given) -> how often; shapes are ``(tokens,)`` or ``(N, C, H, W)``.
        reason: why it stays as it is; empty where it can be packed.
    """

    name: str
    module: nn.Module
    inputs: dict[tuple[int, tuple[int, ...]], int] = dataclasses.field(default_factory=dict)
    reason: str = ""

    @property
    def linear(self) -> bool:
        """Whether it multiplies tokens, rather than images."""
        return not isinstance(self.module, nn.Conv2d)

    def matrix(self) -> Tensor:
        """The weight as ``(outputs, inputs)``."""
        stored: Any = self.module.weight
        weight: Tensor = stored.detach()
        if _conv1d(self.module):  # of transformers: stored the other way round
            return weight.T
        return weight.flatten(1)

    @cached_property
    def grid(self) -> Grid | None:
        """The grid of 4 bits that its weight lies on, where there is one."""
        return found_grid(self.matrix()) if self.linear else None

    def dense(self, kind: str) -> bool:
        """Whether it has a dense form of such values on this machine."""
        return self.grid is not None if kind == "int4" else has_dense(kind, self.module)

    def ways(self, kinds: Sequence[str], few: bool) -> list[str]:
        """The candidates beside ``dense``, as ``kind.index``; ``few``: single tokens, which can be read by bits."""
        indexes = [*(("col", "bits") if few else ("col",))] if zeros(self.matrix()) >= _LEAST else []
        found, kernels = [], library()
        quads = indexes and self.linear and not few and kernels is not None and kernels.quads
        for kind in kinds:
            found += [f"{kind}.{index}" for index in indexes if kind in KINDS]
            found += [f"{kind}.quad"] if quads and kind == "int8-dynamic" else []
            found += [f"{kind}.dense"] if self.dense(kind) else []
        return found

    def made(self, kind: str, index: str, weight: Tensor, bias: Tensor | None, activation: str = "none") -> Installed:
        """The same layer in another form.

        Args:
            kind: of the values.
            index: ``col``, ``bits``, ``col+bits``, ``quad`` (with bits, for few tokens) or ``dense``.
            weight: ``(outputs, inputs)``.
        """
        if kind == "int4":
            return Int4Linear(weight, bias, self.grid, activation).eval()
        if index == "dense":
            return DenseLinear(weight, bias, kind, activation).eval()
        parts = index.split("+")
        packed = self.pack(kind, weight, 256 if "quad" in parts else None)
        return self.sparse(packed.indexed("col" in parts, "bits" in parts, "quad" in parts), bias, activation)

    def pack(self, kind: str, weight: Tensor | None = None, panel: int | None = None) -> Packed:
        """Its weight, or another in its place, packed.

        Positions of an image keep the threads busy, so that groups of rows may be large.
        """
        weight = self.matrix() if weight is None else weight
        return pack(weight, kind, group=None if self.linear else 64, panel=panel)

    def sparse(self, packed: Packed, bias: Tensor | None, activation: str = "none") -> Sparse:
        """The same layer with such a weight and bias."""
        m: Any = self.module
        if self.linear:
            return SparseLinear(packed, bias, activation).eval()
        return SparseConv2d(packed, bias, m.kernel_size, m.stride, m.padding, m.dilation, activation).eval()

    def sample(self, shape: tuple[int, ...]) -> Tensor:
        """An input of such a shape."""
        generator = torch.Generator().manual_seed(0)
        if self.linear:
            return torch.randn(shape[0], self.matrix().shape[1], generator=generator)
        return torch.randn(shape, generator=generator)


def _conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def sites(model: nn.Module, kinds: Sequence[str] = (), device: str = "cpu") -> Iterator[Site]:
    """Every linear layer and convolution, with the reason where it cannot be replaced on this kind of device.

    One with few zeros can be where one of the ``kinds`` of values has a dense form.
    """
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for name, module in model.named_modules():
        known = isinstance(module, nn.Linear | nn.Conv2d) or _conv1d(module)
        if not known or not isinstance(getattr(module, "weight", None), Tensor):
            continue
        site = Site(name, module)
        others = [n for n in owners.get(id(module.weight), []) if n != f"{name}.weight".lstrip(".")]
        if others and not all(isinstance(model.get_submodule(n.rpartition(".")[0]), nn.Embedding) for n in others):
            site.reason = f"its weight is shared with {others[0]}"
        elif isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward:
            site.reason = f"{type(module).__name__} computes more than a product"
        elif isinstance(module, nn.Conv2d):
            if module.groups != 1 or module.padding_mode != "zeros" or isinstance(module.padding, str):
                site.reason = "grouped, or padded in a way that the kernels do not know"
            elif type(module).forward is not nn.Conv2d.forward:
                site.reason = f"{type(module).__name__} computes more than a convolution"
        if not site.reason and (module._forward_hooks or module._forward_pre_hooks):
            site.reason = "hooks are attached to it"
        if not site.reason and module.weight.device.type != device:
            site.reason = f"it is on {module.weight.device}: these kernels are for {device.replace('cpu', 'the CPU')}"
        if not site.reason and not any(site.dense(kind) for kind in kinds):
            site.reason = _few_zeros(site, kinds)
        yield site


def _few_zeros(site: Site, kinds: Sequence[str]) -> str:
    """Why a layer without a dense form of these kinds stays as it is; empty where its zeros are worth a try."""
    share = zeros(site.matrix())
    sparse = not kinds or any(kind in KINDS for kind in kinds)
    if sparse and share >= _LEAST:
        return ""
    reason = f"{share:.0%} zeros" if sparse else ""
    if "int4" in kinds:
        groups = ", ".join(map(str, GROUPS))
        reason += f"{', and ' if reason else ''}no integers of 4 bits in groups of {groups} inputs"
    return reason


def zeros(weight: Tensor) -> float:
    """The share of it that is zero."""
    return 1.0 - int(weight.count_nonzero()) / max(1, weight.numel())


def watch(model: nn.Module, found: Sequence[Site], workloads: Sequence[tuple[tuple[Any, ...], dict[str, Any]]]) -> None:
    """Run the workloads and note what each site is given; one that is never called gets a reason."""
    handles = []
    current = 0
    for site in found:

        def note(_: nn.Module, args: tuple[Any, ...], site: Site = site) -> None:
            if len(args) != 1 or not (site.linear or args[0].dim() == 4):
                site.reason = "it is not called with one batch of inputs"
                return
            x: Tensor = args[0]
            given = (current, (x.numel() // x.shape[-1],) if site.linear else tuple(x.shape))
            site.inputs[given] = site.inputs.get(given, 0) + 1

        handles.append(site.module.register_forward_pre_hook(note))
    try:
        with evaluating(model), torch.inference_mode():
            for index, (args, kwargs) in enumerate(workloads):
                current = index
                model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    for site in found:
        if not site.inputs and not site.reason:
            site.reason = "the model does not call it as a layer"


class Table:
    """Seconds of layers on this machine, kept from one run to the next.

    Args:
        path: the file, or None to keep nothing.
        fresh: measure everything again.
        repeats: runs of each candidate; the median counts.
    """

    def __init__(self, path: Path | None, fresh: bool = False, repeats: int = 9) -> None:
        self.path, self.repeats = path, repeats
        self.rows: dict[str, dict[str, float]] = {}
        if path is not None and not fresh:
            try:
                read = json.loads(path.read_text(encoding="utf-8"))
                self.rows = {str(k): {str(n): float(s) for n, s in v.items()} for k, v in read.items()}
            except (OSError, ValueError, AttributeError, TypeError):
                self.rows = {}

    def save(self) -> None:
        """Write the file, whole or not at all; where nothing can be written, the next run measures again."""
        if self.path is None:
            return
        part = self.path.with_name(f"{self.path.name}.{os.getpid()}.new")
        with suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps(self.rows, indent=1), encoding="utf-8")
            part.replace(self.path)

    def seconds(self, site: Site, shape: tuple[int, ...], kinds: Sequence[str], cold: bool) -> dict[str, float]:
        """Seconds of ``dense`` and of every candidate (``kind.index``) on inputs of this shape."""
        few = site.linear and shape[0] <= FEW
        wanted = site.ways(kinds, few)
        key = _key(site, shape, cold and few)
        if "int4.dense" in wanted and site.grid is not None:
            key += f" int4 in groups of {site.grid.group}"
        row = self.rows.get(key, {})
        if {"dense", *wanted} - set(row):
            row = self.rows[key] = _measure(site, shape, wanted, cold and few, self.repeats)
        return {name: row[name] for name in ("dense", *wanted)}


def _key(site: Site, shape: tuple[int, ...], cold: bool) -> str:
    weight, m = site.matrix(), site.module
    about: Mapping[str, Any] = machine()
    found = library()
    geometry = "" if site.linear else f" k{m.kernel_size} s{m.stride} p{m.padding} d{m.dilation}"
    rounded = round(50 * zeros(weight)) * 2  # layers within two percent share a measurement
    size = "x".join(str(n) for n in weight.shape)
    kernels = f"{found.isa} {found.digest[:8]}" if found else "none"
    where = f"{about['cpu']} {kernels} {about['threads']} threads torch {torch.__version__}"
    given = f"{str(weight.dtype)[6:]} on {'x'.join(map(str, shape))}"
    return f"{where}: {size}{geometry} {given} {rounded}% zeros{' cold' if cold else ''}"


def _measure(site: Site, shape: tuple[int, ...], ways: Sequence[str], cold: bool, repeats: int) -> dict[str, float]:
    """Candidates take turns, so that whatever else the machine does falls on all of them alike.

    One that is far slower than the dense layer is given up after the first turns, and one that does not hold the
    weight (bfloat16 ends earlier than float32) is not there: it takes for ever.
    """
    runs: dict[str, nn.Module] = {"dense": site.module}
    bias: Any = site.module.bias
    impossible = {}
    for way in ways:
        kind, index = way.split(".")
        try:
            runs[way] = site.made(kind, index, site.matrix(), bias)
        except (RecipeError, ModelError):
            impossible[way] = float("inf")
    x = site.sample(shape).to(site.matrix().dtype)
    times: dict[str, list[float]] = {name: [] for name in runs}
    flush = torch.zeros(2 * _CACHES // 4 if cold else 0)
    with torch.inference_mode():
        for turn in range(repeats + 2):
            for name, module in runs.items():
                flush.add_(1.0)
                begun = time.perf_counter()
                module(x)
                times[name].append(time.perf_counter() - begun)
            if turn == 1:
                most = _HOPELESS * min(times["dense"])
                runs = {name: module for name, module in runs.items() if min(times[name]) <= most}
    # The first turns allocate, and choose kernels.
    return impossible | {name: statistics.median(found[2:] or found) for name, found in times.items()}


def is_cold(model: nn.Module) -> bool:
    """Whether the weights are too many to stay in the caches between two tokens."""
    return sum(p.numel() * p.element_size() for p in model.parameters()) > _CACHES
