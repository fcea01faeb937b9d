"""Compress a model that is on a GPU: each layer dense, 2:4 or by a bit mask, whichever is fastest there."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..errors import ModelError, RecipeError, SecateurError
from ..kernels import gpu
from ..kernels.ops import FEW
from ..measure import machine
from ..measure.size import bytes_in_memory
from ..models import cache_directory
from .candidates import Site, Table, sites, watch, zeros
from .choose import Choice, _Option, choose
from .gpu_layers import GpuLinear, SemiLinear, packed_for_gpu
from .make import Compression, _with, judged

#: Name of a dtype on the command line -> it.
DTYPES = {name: dtype for dtype, name in gpu.KINDS.items()}
#: Written between measurements, so that weights come from memory as they do in a large model; more than any cache.
_FLUSH = 256 << 20

Clock = Callable[[Mapping[str, Callable[[], Any]], int], dict[str, list[float]]]


def event_times(runs: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds that each run keeps the GPU busy, by CUDA events; runs take turns, with cold caches.

    The GPU is given the flush first, so that it still works while a run is launched: what is measured is the work, not
    the launch. Whether the model as a whole is faster, launches included, is for the clock on the wall.
    """
    flush = torch.empty(_FLUSH, dtype=torch.int8, device="cuda")
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 3):
        for name, run in runs.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            begin.record()
            run()
            end.record()
            torch.cuda.synchronize()
            if turn >= 3:  # the first runs compile, allocate and choose kernels
                times[name].append(begin.elapsed_time(end) / 1e3)
    return times


class Times:
    """Seconds of layers on one GPU, kept from one run to the next.

    Args:
        kept: the rows of earlier runs.
        name: of the GPU.
        clock: what times candidates.
    """

    def __init__(self, kept: Table, name: str, clock: Clock) -> None:
        self.kept, self.name, self.clock = kept, name, clock
        self.refused = ""  # why 2:4 is not available, where a layer asked for it

    def seconds(self, site: Site, shape: tuple[int, ...]) -> dict[str, float]:
        """Seconds of ``dense``, and of ``bits`` and ``2:4`` where they can be, on so many tokens."""
        key, rows = self._key(site, shape), self.kept.rows
        if key not in rows:
            rows[key] = self._measure(site, shape)
        return rows[key]

    def _key(self, site: Site, shape: tuple[int, ...]) -> str:
        weight = site.matrix()
        triton: Any = gpu.kernels()
        versions = f"torch {torch.__version__} triton {triton.triton.__version__ if triton else 'none'}"
        size, kind = "x".join(map(str, weight.shape)), gpu.KINDS[weight.dtype]
        rounded = round(50 * zeros(weight)) * 2  # layers within two percent share a measurement
        semi = " 2:4" if gpu.is_semi(weight) else ""
        return f"{self.name} {versions}: {size} {kind} on {shape[0]} {rounded}% zeros{semi}"

    def _measure(self, site: Site, shape: tuple[int, ...]) -> dict[str, float]:
        weight, bias = site.matrix(), _bias(site)
        runs: dict[str, nn.Module] = {"dense": site.module}
        if gpu.kernels() is not None:
            runs["bits"] = GpuLinear(packed_for_gpu(weight), bias).to(weight.device).eval()
        if weight.dtype != torch.float32 and gpu.is_semi(weight):
            try:
                runs["2:4"] = SemiLinear(weight, bias).eval()
            except SecateurError as error:
                self.refused = str(error)
        x = site.sample(shape).to(weight)
        with torch.inference_mode():
            calls: dict[str, Callable[[], Any]] = {name: lambda m=m: m(x) for name, m in runs.items()}  # type: ignore[misc]
            times = self.clock(calls, self.kept.repeats)
        return {name: statistics.median(found) for name, found in times.items()}


def _bias(site: Site) -> Tensor | None:
    found: Any = site.module.bias
    return None if found is None else found.detach()


def options(site: Site, times: Times, kinds: Sequence[str], cold: bool, workloads: int) -> tuple[Choice, list[_Option]]:
    """What is known of a site, and the ways of computing it; the first is dense.

    ``bits+dense`` keeps the dense weight for more tokens than the kernel takes, so it is dense there; it must pay for
    its memory, as a second index must on the CPU.
    """
    weight = site.matrix()
    choice = Choice(site.name, (weight.shape[0], weight.shape[1]), zeros(weight), "dense", "", {}, site.reason)
    if not choice.reason and not bool(weight.isfinite().all()):
        choice.reason = "it holds values that are not finite"
    if choice.reason:
        return choice, [_Option("dense", "", [0.0] * workloads)]
    rows = {shape: times.seconds(site, shape) for _, shape in site.inputs}
    choice.seconds = {"x".join(map(str, shape)): row for shape, row in rows.items()}
    reads: dict[str, Callable[[tuple[int, ...]], str]] = {
        "2:4": lambda _: "2:4",
        "bits": lambda _: "bits",
        "bits+dense": lambda shape: "bits" if shape[0] <= FEW else "dense",
    }

    def total(read: Callable[[tuple[int, ...]], str]) -> list[float]:
        spent = [0.0] * workloads
        for (w, shape), count in site.inputs.items():
            spent[w] += count * rows[shape].get(read(shape), float("inf"))
        return spent

    kind = gpu.KINDS[weight.dtype]
    return choice, [_Option("dense", "", total(lambda _: "dense"))] + [
        _Option(kind, form, total(read)) for form, read in reads.items()
    ]


def gpu_sites(model: nn.Module, device: str) -> list[Site]:
    """The layers of a model, with the reason where a GPU has no other way of computing them."""
    found = list(sites(model, device=device))
    for site in found:
        if site.reason:
            continue
        weight: Any = site.module.weight
        if weight.is_cuda and weight.device.index != torch.cuda.current_device():
            site.reason = f"it is on {weight.device}, which is not the current one (torch.cuda.set_device)"
        elif not site.linear:
            site.reason = "there are no kernels for convolutions on GPUs"
        elif site.matrix().dtype not in gpu.KINDS:
            site.reason = f"its weight is {site.matrix().dtype}: kernels for GPUs read {', '.join(DTYPES)}"
    return found


def compress_gpu(
    model: nn.Module,
    loads: Sequence[tuple[tuple[Any, ...], dict[str, Any]]],
    *,
    kinds: Sequence[str] = ("float32",),
    fresh: bool = False,
    cache: bool = True,
    progress: Callable[[int, int], None] | None = None,
    clock: Clock = event_times,
    device: str = "cuda",
) -> nn.Module:
    """As `compress`, for a model on a GPU. Values keep the dtype of their layer.

    Args:
        loads: positional and keyword inputs of each workload, on the GPU.
        clock, device: what times candidates, and where the layers are; others only where no GPU is to be asked.

    Raises:
        RecipeError: other kinds of values are asked for.
        ModelError: the model does not run on the example.
    """
    if tuple(kinds) != ("float32",):
        raise RecipeError("on a GPU values keep the dtype of their layer: convert the model, and give no kinds")
    name = torch.cuda.get_device_name() if device == "cuda" else device
    report = Compression([], {}, (bytes_in_memory(model), bytes_in_memory(model)), 0.0, {**machine(), "gpu": name})
    found = gpu_sites(model, device)
    try:
        watch(model, [s for s in found if not s.reason], loads)
    except Exception as error:
        raise ModelError(f"the model does not run on the example: {type(error).__name__} {error}") from None
    table = Table(cache_directory() / "layers.json" if cache else None, fresh)
    times = Times(table, name, clock)
    report.choices = choose(found, times, kinds, True, len(loads), progress, options)
    table.save()
    missing = [times.refused] if times.refused else []
    if gpu.kernels() is None:
        missing.append(f"bit masks were not tried: they need triton ({gpu.TRITON})")
    replaced = {id(s.module): _made(s, c) for s, c in zip(found, report.choices, strict=True) if c.kind != "dense"}
    if not replaced:
        report.note = "; ".join(["nothing is packed: no layer is faster without its zeros on this GPU", *missing])
        return _with(model, report)
    dtypes = {s.matrix().dtype for s in found if id(s.module) in replaced}
    return judged(model, replaced, report, loads, max(map(_tolerance, dtypes)))


def _made(site: Site, choice: Choice) -> nn.Module:
    weight, bias = site.matrix(), _bias(site)
    if choice.index == "2:4":
        return SemiLinear(weight, bias).train(site.module.training)
    layer = GpuLinear(packed_for_gpu(weight), bias, whole=False).to(weight.device)
    if "dense" in choice.index:
        layer.dense = layer.weight
    return layer.train(site.module.training)


def _tolerance(dtype: torch.dtype) -> float:
    """Difference of outputs that another order of additions explains, after the layers of a deep model."""
    return max(1e-3, 32 * torch.finfo(dtype).eps)


def onto_gpu(model: nn.Module, dtype: str) -> nn.Module:
    """The same model on the GPU, its floats in another dtype.

    Raises:
        RecipeError: the dtype is not known.
        ModelError: there is no GPU.
    """
    if dtype not in DTYPES:
        raise RecipeError(f"'{dtype}' is no dtype of kernels for GPUs: {', '.join(DTYPES)}")
    require_gpu()
    return converted(model, torch.device("cuda"), DTYPES[dtype])


def converted(model: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The same model elsewhere, its parameters and stored buffers in another dtype.

    Buffers that are not stored keep theirs, as loaders leave them: the frequencies of rotary embeddings, in half
    precision, would be those of other positions.
    """
    model.to(device)
    stored = model.state_dict(keep_vars=True).values()
    for tensor in stored:
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    return model


def require_gpu() -> None:
    """Refuse to go on without a GPU.

    Raises:
        ModelError: there is none.
    """
    if not torch.cuda.is_available():
        raise ModelError("--for cuda needs a GPU, and torch finds none here: run it where there is one, or --for cpu")


def beside(load: Any, model: nn.Module) -> Any:
    """Inputs on the device of a model, floats in its dtype."""
    like = next((p for p in model.parameters() if p.is_floating_point()), None)
    if like is None or not like.is_cuda:
        return load

    def moved(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return x.to(like) if x.is_floating_point() else x.to(like.device)

    return tree_map(moved, load)
