"""Principal directions of a hidden width in place of single features, after SliceGPT."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map
from torch.utils.weak import WeakIdKeyDictionary

from ..evidence import watch
from ..graph.state import duplicate
from ..graph.trace import stored_tensors
from ..layers import evaluating, located
from ..registry import register
from ..surgery.prove import doubled, first_line
from .units import Smaller, first_output, fitted, guarded

#: How far outputs may move, relative to the largest, when the whole width is turned: some models round to float32.
_SAME = 1e-3
#: Operations behind which a tensor no longer is what a normalization gave, but for a change of shape.
_PRODUCTS = ("mm", "convolution", "embedding", "linear", "attention", "einsum")


@register("recovery", paper="2401.15024", data="units", unties=True)
def project(task: Smaller, *, refit: bool = True, damp: float = 0.01) -> list[str]:
    """Let the smaller hidden width carry the principal directions of the dense one, in place of single features.

    :: x' = T x,  rows of T: the first eigenvectors of the sum over normalizations l of mean_tokens n_l n_l^T

    ``n_l`` is what normalization ``l`` makes of the hidden state before its scale. What writes the hidden state is
    multiplied by T, what reads it by T^T, after the scale and bias of the normalization in front of it. With T square
    the model computes what it did, which is checked first; where that fails nothing is turned. For a layer norm the
    last direction is left to the mean. With ``refit`` the layers that read it are then fitted as by recovery refit.

    Choose it for pre-norm transformers whose hidden width is cut.

    Beware: an output layer tied to the embedding is untied, which adds its parameters: a small model with a large
    vocabulary gains little. The paper turns each block by a matrix of its own, and adds one to every residual
    connection; here one serves all, and what comes out is a plain model of the same class.

    Source: Ashkboos et al., SliceGPT, arXiv 2401.15024, and its official code, which takes principal components of the
    states in front of each normalization as they are, and goes on with what the slices before left.
    """

    def heal(lots: list[Any]) -> list[str]:
        try:
            stream = _Stream(task)
            kept, share = stream.project(lots)
            notes = [f"{kept} directions in place of {stream.width} features carry {100 * share:.1f}% of the energy"]
        except _NotTurned as reason:
            notes = [f"the hidden width was cut by single features: {reason}"]
        return notes + (fitted(task, lots, damp) if refit else [])

    return guarded(task, heal)


class _NotTurned(Exception):
    """Why the hidden width of a model cannot be turned."""


@dataclass(eq=False)
class _Norm:
    """A normalization of the hidden state: ``gain * n(x) + shift``.

    Attributes:
        centred: ``n`` takes the mean away first (a layer norm).
        offset: what the module adds to its ``weight`` for the gain, 0 or 1; None where it has no weight.
    """

    name: str
    centred: bool
    eps: float
    gain: Tensor
    shift: Tensor
    offset: float | None
    readers: list[str] = field(default_factory=list)

    @property
    def bare(self) -> bool:
        """Whether it has no scale of its own."""
        return self.offset is None

    def normal(self, x: Tensor) -> Tensor:
        """``n(x)``, in float64 and main memory, where all that is computed here lies."""
        x = x.detach().double().cpu()
        x = x - x.mean(-1, keepdim=True) if self.centred else x
        return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()


class _Stream:
    """The one hidden width that a plan cuts: what writes it, what reads it, and the normalizations in between.

    Raises:
        _NotTurned: turning it would change what the model computes.
    """

    def __init__(self, task: Smaller) -> None:
        self.task = task
        self.dense = {n: t.detach().cpu() for n, t in stored_tensors(task.dense).items()}
        sizes = {(self.dense[n].shape[a], len(p)) for n, axes in task.kept.items() for a, p in axes.items()}
        if len(sizes) != 1:
            raise _NotTurned("the plan cuts other sizes too (choose --only '@residual')")
        self.width, self.kept = sizes.pop()
        every = {n.name: n for n in _norms(task.dense, self.width)}
        #: Name of each matrix -> the axis of its inputs: the other of its last two, or of a convolution's first.
        self.inputs = {n: 1 - o + 2 * int(x.index is not None) for x, n, o in located(task.dense)}
        try:
            for name, norm in _read_after(task, every).items():
                norm.readers.append(name)
            # Others of this width, such as one over all heads, are not of the hidden state.
            self.norms = [n for n in every.values() if f"{n.name}.weight" in task.kept or (n.readers and n.bare)]
            if not self.norms or len({n.centred for n in self.norms}) > 1:
                raise _NotTurned("it is not normalized in one way before it is read")
            self._check()
        except _NotTurned:
            raise
        except Exception as error:  # the model's own code, on a few examples and in float64
            raise _NotTurned(f"turning a copy of it failed: {type(error).__name__}: {first_line(error)}") from error

    def project(self, lots: list[Any]) -> tuple[int, float]:
        """Rewrite the smaller model's tensors; how many directions it carries, and their share of the energy."""
        found = torch.zeros(self.width, self.width, dtype=torch.float64)
        rows = dict.fromkeys((n.name for n in self.norms), 0)
        sums = {n.name: found.clone() for n in self.norms}

        def seen(norm: _Norm) -> Any:
            def hook(_: nn.Module, args: Any) -> None:
                x = norm.normal(args[0].reshape(-1, self.width))
                sums[norm.name].addmm_(x.t(), x)
                rows[norm.name] += x.shape[0]

            return hook

        modules = dict(self.task.dense.named_modules())
        hooks = [modules[n.name].register_forward_pre_hook(seen(n)) for n in self.norms]
        try:
            for lot in lots:
                self.task.run(self.task.dense, lot)
        finally:
            for hook in hooks:
                hook.remove()
        for name, count in rows.items():
            found += sums[name] / max(count, 1)
        energy, directions = torch.linalg.eigh(found)
        energy, directions = energy.flip(0), directions.flip(1)
        count = self.kept - self.centred
        self._rewrite(self.task.small, self._basis(directions, self.kept))
        return count, float(energy[:count].sum() / energy.sum())

    @property
    def centred(self) -> int:
        return int(self.norms[0].centred)

    def _basis(self, directions: Tensor, size: int) -> Tensor:
        """``(size, width)`` with orthonormal rows; for layer norms those of states without a mean, kept so."""
        if not self.centred:
            return directions[:, :size].t()
        flat = torch.eye(size, dtype=torch.float64) - 1 / size
        level = torch.linalg.svd(flat).U[:, : size - 1]  # what has no mean, of the new width
        within = directions[:, : size - 1] - directions[:, : size - 1].mean(0)
        basis: Tensor = level @ within.t()
        return basis

    def _check(self) -> None:
        """Turn a copy by any orthogonal matrix, and see that it computes what the model does."""
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(self.width, self.width, dtype=torch.float64, generator=generator)
        if self.centred:
            start -= start.mean(0)  # the first columns of the factor then have no mean either
        basis = self._basis(torch.linalg.qr(start).Q, self.width)
        batch = _few(self.task.batches[0])
        twin = duplicate(self.task.dense).double()
        with evaluating(twin), torch.no_grad():
            (a,) = first_output(self.task.run(twin, _doubled(batch)))
            self._rewrite(twin, basis)
            (b,) = first_output(self.task.run(twin, _doubled(batch)))
        moved = float((a - b).abs().max() / a.abs().max().clamp_min(1e-30))
        if not moved < _SAME:
            raise _NotTurned(f"a turn of it, which should change nothing, moves the output by {moved:.1e}")

    @torch.no_grad()
    def _rewrite(self, into: nn.Module, basis: Tensor) -> None:
        """Give a model of either size what follows from the dense model's tensors."""
        due = stored_tensors(into)
        scale = (self.width / basis.shape[0]) ** 0.5
        before = {reader: norm for norm in self.norms for reader in norm.readers}
        more: dict[str, Tensor] = {}
        own: set[str] = set()
        for norm in self.norms:
            own |= {f"{norm.name}.weight", f"{norm.name}.bias"}
            shift = torch.zeros(len(basis), dtype=torch.float64)
            if norm.shift.any() and norm.readers:
                moved = {_bias(r): self._matrix(r) @ norm.shift for r in norm.readers}
                if all(name in due for name in moved):
                    more.update(moved)
                else:  # what comes nearest to it for all readers
                    seen = torch.cat([(self._matrix(r) * norm.gain).flatten(0, -2) for r in norm.readers]) @ basis.t()
                    wanted = torch.cat([m.flatten() for m in moved.values()])
                    shift = torch.linalg.lstsq(seen * scale, wanted[:, None]).solution[:, 0]
            module: Any = into.get_submodule(norm.name)
            if norm.offset is not None:
                module.weight.fill_(1 - norm.offset)
            if isinstance(getattr(module, "bias", None), Tensor):
                module.bias.copy_(shift)
        done: set[int] = set()
        for name in [*self.task.kept, *more]:
            if name in own or id(due[name]) in done:
                continue
            done.add(id(due[name]))
            value = self.dense[name].double() + more.get(name, 0.0)
            for axis in self.task.kept.get(name, {}):
                read = before.get(name) if axis == self.inputs.get(name) else None
                value = value.movedim(axis, -1)
                # What writes the state, is added to it or reads it bare is turned alike.
                value = value @ basis.t() if read is None else (value * read.gain) @ basis.t() * scale
                value = value.movedim(-1, axis)
            due[name].copy_(value)

    def _matrix(self, name: str) -> Tensor:
        return self.dense[name].double().movedim(self.inputs[name], -1)


def _bias(matrix: str) -> str:
    """Name of the bias beside a matrix."""
    return f"{matrix.rpartition('.')[0]}.bias"


def _norms(model: nn.Module, width: int) -> Iterator[_Norm]:
    """Modules that normalize a state of this width, found by what they compute."""
    x = 100 * torch.randn(8, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for name, module in model.named_modules():
        weight: Any = getattr(module, "weight", None)
        if next(module.children(), None) is not None or (isinstance(weight, Tensor) and weight.shape != (width,)):
            continue
        if not isinstance(weight, Tensor) and "norm" not in type(module).__name__.lower():
            continue
        try:
            with torch.no_grad():
                y = copy.deepcopy(module).cpu().double()(x)
        except Exception:  # it takes something else
            continue
        if not isinstance(y, Tensor) or y.shape != x.shape:
            continue
        y = y.double()
        eps = next((float(v) for k, v in vars(module).items() if "eps" in k and isinstance(v, float)), 1e-6)
        for centred in (False, True):
            norm = _Norm(name, centred, eps, torch.ones(width), torch.zeros(width), None)
            n = norm.normal(x)
            middle = n.mean(0)
            gain = ((n - middle) * (y - y.mean(0))).sum(0) / (n - middle).square().sum(0)
            shift = y.mean(0) - gain * middle
            if float((gain * n + shift - y).abs().max()) > 1e-3 * float(y.abs().max()):
                continue
            norm.gain = gain
            if isinstance(weight, Tensor):  # what was fitted tells the offset; the values themselves are exact
                norm.offset = float((gain - weight.detach().double().cpu()).median().round())
                norm.gain = weight.detach().double().cpu() + norm.offset
            bias = getattr(module, "bias", None)
            norm.shift = bias.detach().double().cpu() if isinstance(bias, Tensor) else torch.zeros_like(gain)
            yield norm
            break


class _Behind(TorchDispatchMode):
    """Which normalization each tensor comes from, through all that only moves or scales its positions."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.of: Any = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = str(func).removeprefix("aten.").split(".")[0]
        if not any(p in name for p in _PRODUCTS):
            source = next((s for x in tree_iter(args) if isinstance(x, Tensor) and (s := self.of.get(x))), None)
            for y in tree_iter(out):
                if source is not None and isinstance(y, Tensor) and y.is_floating_point():
                    self.of[y] = source
        return out


def _read_after(task: Smaller, norms: Mapping[str, _Norm]) -> dict[str, _Norm]:
    """Name of each matrix that reads a normalization's output -> that normalization."""
    cut = {id(x): (x, name) for x, name, _ in located(task.dense) if name in task.kept}
    found: dict[str, str] = {}
    mode = _Behind()

    def marks(name: str) -> Any:
        def hook(_: nn.Module, args: Any, output: Any) -> None:
            mode.of[output] = name

        return hook

    def reads(layer: Any, x: Tensor) -> None:
        if x.is_floating_point() and (source := mode.of.get(x)) is not None:
            found[cut[id(layer)][1]] = source

    modules = dict(task.dense.named_modules())
    hooks = [modules[n].register_forward_hook(marks(n)) for n in norms]
    try:
        with evaluating(task.dense), torch.no_grad(), watch([x for x, _ in cut.values()], reads), mode:
            task.run(task.dense, _few(task.batches[0]))
    finally:
        for hook in hooks:
            hook.remove()
    return {name: norms[source] for name, source in found.items()}


def _few(batch: Any) -> Any:
    """The first two examples of a batch."""
    batch = _plain(batch)
    sizes = [x.shape[0] for x in tree_iter(batch) if isinstance(x, Tensor) and x.dim()]
    return tree_map(lambda x: x[:2] if isinstance(x, Tensor) and x.shape[:1] == tuple(sizes[:1]) else x, batch)


def _doubled(batch: Any) -> Any:
    return doubled(_plain(batch))


def _plain(batch: Any) -> Any:
    """Mappings of other kinds as dicts, whose values are looked into."""
    return dict(batch) if isinstance(batch, Mapping) else batch
