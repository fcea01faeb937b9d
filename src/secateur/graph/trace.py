"""Run a model once and follow every axis position of every parameter through it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_iter
from torch.utils.weak import WeakIdKeyDictionary

from .labels import RIGID, Array, Labels
from .state import as_before


class Constant:
    """One axis of a tensor that depends on no input and no parameter, such as a mask made in ``forward``."""

    __slots__ = ("axis", "tensor")

    def __init__(self, tensor: Tensor, axis: int) -> None:
        self.tensor, self.axis = tensor, axis

    def uniform(self) -> bool:
        """Whether the positions of the axis are alike, so that any of them can go."""
        x = self.tensor
        return bool((x == x.narrow(self.axis, 0, 1)).all())


#: Labels of an axis; None where positions cannot go (batch, tokens, pixels); or a constant's axis.
Axis = Array | Constant | None
Axes = tuple[Axis, ...]


@dataclass(eq=False)
class Slot:
    """One axis of one stored tensor: a parameter or a buffer, by identity.

    Attributes:
        names: every name under which the model holds the tensor (tied parameters have several).
        axis: of the tensor.
        labels: one for each position.
    """

    names: tuple[str, ...]
    tensor: Tensor
    axis: int
    labels: Array

    @property
    def is_parameter(self) -> bool:
        return isinstance(self.tensor, nn.Parameter)


@dataclass(eq=False)
class Trace:
    """What one run showed.

    Attributes:
        slots: every axis longer than one of every parameter and buffer.
        statistics: number of an operation -> the labelled axes over which it normalizes or reduces; there the
            zeros of a mask still count, where a smaller model has nothing.
        seen: module name -> the different labelled axes that operations in its own ``forward`` met, in order.
        calls: name of a module that ``keeps_sizes`` of one operation -> the axes of each tensor that it was given, and
            of each that it made.
        unknown: operations no rule knows -> how often they were met; their inputs are frozen.
        costs: of each product, the factor and the labelled axes whose lengths multiply it to floating point
            operations.
        sites: of each of them, the name of the module in whose own ``forward`` it ran.
        sequence: the names of the operations, in order.
        unread: parameters that no operation of the run read.
        single: how many parameters of one element there are, which have no slot.
        low_precision: a floating point result of less than 64 bits was met, which bounds how exact a proof can be.
        outputs: every floating point tensor of the output.
    """

    labels: Labels
    slots: list[Slot]
    statistics: dict[int, tuple[tuple[int, Array], ...]] = field(default_factory=dict)
    seen: dict[str, list[Array]] = field(default_factory=dict)
    calls: dict[str, tuple[list[Axes], list[Axes]]] = field(default_factory=dict)
    unknown: dict[str, int] = field(default_factory=dict)
    costs: list[tuple[int, tuple[Array, ...]]] = field(default_factory=list)
    sites: list[str] = field(default_factory=list)
    sequence: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    single: int = 0
    low_precision: bool = False
    outputs: list[Tensor] = field(default_factory=list)

    @property
    def operations(self) -> int:
        """How many operations ran."""
        return len(self.sequence)


Rule = Callable[["Tracer", Any, Sequence[Any], Mapping[str, Any], Any], None]


def every(names: str, rule: Rule) -> dict[str, Rule]:
    """One rule for several operations."""
    return dict.fromkeys(names.split(), rule)


class Tracer(TorchDispatchMode):
    """Gives the outputs of every operation their labels."""

    def __init__(self, trace: Trace, rules: Callable[[Any], Rule | None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trace, self.labels, self._rules = trace, trace.labels, rules
        self._axes: Any = WeakIdKeyDictionary()
        self.modules: list[str] = [""]
        self.read: set[int] = set()
        self._met: dict[str, set[bytes]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.trace.sequence.append(str(func))
        inputs = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
        if any(x in self._axes for x in inputs):  # else it is a constant, which stays without an entry
            rule = self._rules(func)
            if rule is None:
                self.unknown(func, inputs, out)
            else:
                rule(self, func, args, kwargs, out)
            for x in tree_iter((inputs, out)):
                if isinstance(x, Tensor):
                    self._meet(x)
                    self.read.add(id(x))
                    if x.is_floating_point() and x.dtype != torch.float64:
                        self.trace.low_precision = True
        return out

    def _meet(self, x: Tensor) -> None:
        module = self.modules[-1]
        for axis in self._axes.get(x, ()):
            if isinstance(axis, np.ndarray):
                mark = axis.tobytes()
                met = self._met.setdefault(module, set())
                if mark not in met:
                    met.add(mark)
                    self.trace.seen.setdefault(module, []).append(axis)

    # -- for rules ---------------------------------------------------------------------------------

    def axes(self, x: Tensor) -> Axes:
        """The labels of each axis of a tensor."""
        known = self._axes.get(x)
        if known is not None and len(known) == x.dim():
            return known  # type: ignore[no-any-return]
        return tuple(Constant(x, i) if n > 1 else None for i, n in enumerate(x.shape))

    def put(self, x: Any, axes: Sequence[Axis]) -> None:
        """Give a result its labels; an axis of size one has none, and a constant's become rigid."""
        if isinstance(x, Tensor):
            assert len(axes) == x.dim(), (x.shape, axes)
            self._axes[x] = tuple(
                a if isinstance(a, np.ndarray) and n > 1 else None for a, n in zip(axes, x.shape, strict=True)
            )

    def rigid(self, x: Any) -> None:
        """A result without labels."""
        for tensor in tree_iter(x):
            if isinstance(tensor, Tensor):
                self.put(tensor, (None,) * tensor.dim())

    def is_constant(self, x: Tensor) -> bool:
        return x not in self._axes

    def tie(self, a: Axis, b: Axis, where: str) -> Axis:
        """Make two axes of equal size one; returns the labels of the result."""
        if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
            if len(a) != len(b):
                raise AssertionError(f"{where}: {len(a)} positions against {len(b)}")
            self.labels.tie(a, b)
            return a
        if isinstance(b, np.ndarray):
            a, b = b, a
        if isinstance(a, np.ndarray):
            if not (isinstance(b, Constant) and b.uniform()):
                kind = "a constant" if isinstance(b, Constant) else "an axis of positions (tokens, pixels, batch)"
                self.labels.freeze(a, f"{where} ties it to {kind}")
                return None
            return a
        return None

    def freeze(self, axis: Axis, reason: str) -> None:
        if isinstance(axis, np.ndarray):
            self.labels.freeze(axis, reason)

    def statistics(self, *axes: tuple[int, Axis]) -> None:
        """Note that this operation takes statistics over labelled axes ``(number, labels)`` of its input."""
        found = tuple((i, a) for i, a in axes if isinstance(a, np.ndarray))
        if found:
            self.trace.statistics[self.trace.operations - 1] = found

    def cost(self, factor: int, *axes: tuple[Axis, int]) -> None:
        """Count ``factor`` times the lengths of ``(labels, size)`` axes in floating point operations."""
        labelled = []
        for axis, size in axes:
            if isinstance(axis, np.ndarray):
                labelled.append(axis)
            else:
                factor *= size
        self.trace.costs.append((factor, tuple(labelled)))
        self.trace.sites.append(self.modules[-1])

    def entries(self, axis: Axis, size: int) -> Array:
        """An axis as labels, with the rigid label where it has none."""
        return axis if isinstance(axis, np.ndarray) else np.full(size, RIGID, dtype=np.int64)

    def unknown(self, func: Any, inputs: Sequence[Tensor], out: Any) -> None:
        """Freeze everything that an operation without a rule reads."""
        name = str(func)
        self.trace.unknown[name] = self.trace.unknown.get(name, 0) + 1
        for x in inputs:
            for axis in self.axes(x):
                self.freeze(axis, f"operation {name} is not known")
        self.rigid(out)


@contextlib.contextmanager
def plain_operations(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients, and no fused kernels that hide what they are made of.

    What modules set on themselves meanwhile is put back.
    """
    training = {m: m.training for m in model.modules()}
    grouped = any(isinstance(m, nn.modules.conv._ConvNd) and m.groups > 1 for m in model.modules())
    fast = torch.backends.mha.get_fastpath_enabled()
    model.eval()
    torch.backends.mha.set_fastpath_enabled(False)
    onednn = bool(torch.backends.mkldnn.enabled)
    try:
        _onednn(False)
        layout = _Grouped() if grouped else contextlib.nullcontext()  # type: ignore[no-untyped-call]
        with torch.no_grad(), as_before(model), layout:
            yield
    finally:
        _onednn(onednn)
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, was in training.items():
            module.training = was


class _Grouped(TorchDispatchMode):
    """Gives grouped convolutions on the CPU channels that lie together, and their output the layout of the input.

    The plain kernel for them goes group by group, and takes ten times as long where channels lie apart.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution.default and args[8] > 1:
            x: Tensor = args[0]
            last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
            if last and x.device.type == "cpu":
                out = func(x.contiguous(), *args[1:], **(kwargs or {}))
                return out.contiguous(memory_format=torch.channels_last)
        return func(*args, **(kwargs or {}))


def _onednn(enabled: bool) -> None:
    # torch.backends.mkldnn.flags also touches the TF32 setting, which warns on machines without such a GPU.
    torch._C._set_mkldnn_enabled(enabled)


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, tied ones under each of their names."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def trace(model: nn.Module, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Trace:
    """Run ``model(*args, **kwargs)`` once, in evaluation mode, and follow its labels.

    The control flow may be any; the labels are those of the path that these inputs take.
    """
    from .rules import find

    names: dict[int, list[str]] = {}
    tensors: dict[int, Tensor] = {}
    for name, tensor in stored_tensors(model).items():
        names.setdefault(id(tensor), []).append(name)
        tensors[id(tensor)] = tensor
    found = Trace(Labels(), [])
    tracer = Tracer(found, find)
    for key, tensor in tensors.items():
        axes: list[Axis] = [None] * tensor.dim()
        if tensor.is_floating_point() or tensor.is_complex():
            wide = [i for i, n in enumerate(tensor.shape) if n > 1]
            if not isinstance(tensor, nn.Parameter) and len(wide) > 1:
                wide = [i for i in wide if i == tensor.dim() - 1]  # masks and position tables: rows are positions
            for i, n in enumerate(tensor.shape):
                if i in wide:
                    axes[i] = labels = found.labels.fresh(n)
                    found.slots.append(Slot(tuple(names[key]), tensor, i, labels))
        if isinstance(tensor, nn.Parameter) and tensor.numel() == 1:
            found.single += 1
        tracer.put(tensor, axes)
    for x in tree_iter((args, dict(kwargs or {}))):
        if isinstance(x, Tensor):
            tracer.rigid(x)
    with plain_operations(model), _entering(model, tracer), tracer:
        output = model(*args, **(kwargs or {}))
    for slot in found.slots:
        if id(slot.tensor) not in tracer.read:
            if slot.is_parameter and slot.names[0] not in found.unread:
                found.unread.append(slot.names[0])
            found.labels.freeze(slot.labels, "no operation of this run reads it")
    for x in tree_iter(visible(output)):
        if isinstance(x, Tensor):
            for axis in tracer.axes(x):
                tracer.freeze(axis, "it is an output of the model")
    found.outputs = floating(output)
    return found


@contextlib.contextmanager
def _entering(model: nn.Module, tracer: Tracer) -> Iterator[None]:
    """Keep the names of the modules that are running on a stack, and what goes through those that keep sizes."""
    stack, handles = tracer.modules, []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: stack.append(name)))
        if getattr(module, "keeps_sizes", False):
            handles.append(module.register_forward_hook(lambda *a, name=name: _note(tracer, name, *a)))
        handles.append(module.register_forward_hook(lambda *_: _pop(stack), always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _pop(stack: list[str]) -> None:
    stack.pop()


def _note(tracer: Tracer, name: str, module: Any, args: Any, out: Any) -> None:
    """What each axis is that a call was given and has made; new positions that are alike have labels of their own."""
    if module.creates:
        with _disable_current_modes():  # looking at values is no operation of the run
            tracer.put(out, [_alike(tracer, out, i, axis) for i, axis in enumerate(tracer.axes(out))])
    given, made = ([tracer.axes(x) for x in tree_iter(y) if isinstance(x, Tensor)] for y in (args, out))
    tracer.trace.calls[name] = (given, made)


def _alike(tracer: Tracer, x: Tensor, i: int, axis: Axis) -> Axis:
    """The labels of an axis; new ones where its positions are one and the same, or a constant's that are all alike."""
    same = x.shape[i] > 1 and (x.stride(i) == 0 if axis is None else isinstance(axis, Constant) and axis.uniform())
    return tracer.labels.fresh(x.shape[i]) if same else axis


def visible(output: Any) -> Any:
    """The part of an output that a caller reads: not a key-value cache, whose layout is the model's own."""
    if isinstance(output, Mapping):
        return {k: v for k, v in output.items() if k not in ("cache", "past_key_values", "cache_params", "state")}
    return output


def floating(output: Any) -> list[Tensor]:
    """Every floating point tensor of the visible part of an output."""
    return [x.detach() for x in tree_iter(visible(output)) if isinstance(x, Tensor) and x.is_floating_point()]
