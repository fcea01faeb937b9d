"""Prune block after block: gather on the block as it is, solve, and push the activations on."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DataError, ModelError, NumericalError, SecateurError
from ..evidence import InputEvidence, Stop, watch
from ..evidence.watch import as_ni
from ..formats import OnGrid
from ..lanes import Lanes, Parted, lane_size
from ..layers import Layer
from ..processes import agree, part, told, world
from ..recipe import Recipe
from ..registry import get
from ..select import is_finite
from ..solve import LayerRecord, sample_rows, solve_layer
from ..solvers import Curvature
from .blocks import Entry, call_block, in_type
from .group import Group

Enter = Callable[[int, int], Entry]


@dataclass(frozen=True)
class Tick:
    """Progress: block ``index`` of ``count`` is done."""

    index: int
    count: int
    records: Sequence[LayerRecord]
    seconds: float


class Engine:
    """The calibration activations at the entry of the next block, and how to take them through it.

    Args:
        recipe: what to do.
        enter: ``enter(start, stop)`` gives the `Entry` of windows ``start:stop``.
        windows: how many calibration windows there are.
        memory: bytes that one pass through a block may hold in activations. When all windows fit, a block
            is pruned in a single pass: each layer is solved when its input arrives, so that the next layer
            already sees its effect. Otherwise the windows go in chunks, and a block takes several passes
            with the same result up to rounding.
        shared: each process takes its share of the windows; what they see is merged before a layer is solved.
    """

    def __init__(
        self, recipe: Recipe, enter: Enter | None, windows: int, memory: int, dtype: torch.dtype, shared: bool = False
    ) -> None:  # fmt: skip
        self.shared = shared and enter is not None and world() > 1
        own = part(windows) if self.shared else slice(0, windows)
        if self.shared and windows < world():
            raise DataError(f"{windows} calibration windows cannot be shared by {world()} processes: give more")
        self.recipe, self.memory, self.windows = recipe, memory, own.stop - own.start
        self._enter = None if enter is None else lambda a, b: enter(own.start + a, own.start + b)
        self.most = -(-windows // world()) if self.shared else windows  #: of any process: all take as many passes
        self.needs = recipe.needs()
        self.recovers = get("recovery", recipe.recovery).facts.get("data") == "block"
        #: The dense model's own activations travel along when they are the target.
        self.teacher = self.recovers and recipe.knobs_of("recovery").get("teacher") == "model"
        self.dtype = dtype
        self.hidden: Tensor | None = None
        self.dense: Tensor | None = None
        #: Of the layers that were quantized, by name.
        self.grids: dict[str, OnGrid] = {}
        #: What earlier steps kept, by layer name: what they took stays away.
        self.held: Mapping[str, Tensor] = {}
        self._calls: dict[int, list[Any]] = {}

    def start(self) -> None:
        """Compute the hidden states at the first block."""
        if self._enter is None:
            return
        parts = []
        step = min(self.windows, 16)
        for a in range(0, self.windows, step):
            entry = self._enter(a, min(a + step, self.windows))
            parts.append(entry.hidden.to(self.dtype))
            self._calls[entry.hidden.shape[0]] = entry.calls
        self.hidden = torch.cat(parts)
        self._check(self.hidden, "the embedding")
        if self.teacher:
            self.dense = self.hidden

    def calls(self, index: int, batch: int) -> Any:
        """How the model calls block ``index`` with a batch of that size."""
        if batch not in self._calls:
            assert self._enter is not None
            self._calls[batch] = self._enter(0, batch).calls
        args, kwargs = self._calls[batch][index]
        return in_type(args, self.dtype), in_type(kwargs, self.dtype)

    # -- one block ---------------------------------------------------------------------------------

    @torch.no_grad()
    def prune_block(
        self, index: int, block: nn.Module, layers: Sequence[Layer], keeps: Mapping[str, float], last: bool = False
    ) -> tuple[list[LayerRecord], dict[str, Tensor]]:
        """Prune ``layers`` of ``block`` in place and advance the activations past it."""
        for layer in layers:
            layer.check_finite()
        if self.hidden is None:
            more: dict[str, Any] = {"block": index, "grids": self.grids}
            solved = [solve_layer(x, self.recipe, keeps[x.name], mask=self.held.get(x.name), **more) for x in layers]
            return [r for r, _ in solved], {r.name: m for r, m in solved}
        target = None
        if self.recovers:
            target = self._forward(index, block, self.hidden if self.dense is None else self.dense)
        task = _BlockTask(self, index, block, layers, keeps)
        output = task.run(needs_output=not last or target is not None)
        if target is not None and output is not None:
            recover = get("recovery", self.recipe.recovery)
            output = recover.function(
                _Recovering(self, index, block, layers, task.masks, self.hidden, target, output),
                **self.recipe.knobs_of("recovery"),
            )
            if self.teacher:
                self.dense = target
        if output is not None:
            self._check(output, f"block {index}")
            self.hidden = output
        return [task.records[x.name] for x in layers], task.masks

    def pass_through(self, index: int, block: nn.Module) -> None:
        """Advance the activations past a block that is left as it is."""
        if self.hidden is not None:
            self.hidden = self._forward(index, block, self.hidden)
            if self.dense is not None:
                self.dense = self._forward(index, block, self.dense)

    def measure_block(self, index: int, block: nn.Module, layers: Sequence[Layer], needs: frozenset[str]) -> Any:
        """Evidence of all layers of a dense block, and advance past it; for allocations that look at data."""
        found = {x.name: InputEvidence(x.shape[1], needs, x.stored.device) for x in layers}
        with torch.no_grad(), watch(layers, lambda layer, x: found[layer.name].update(as_ni(layer, x))):
            assert self.hidden is not None
            self.hidden = self._forward(index, block, self.hidden)
        for name, evidence in found.items():
            self.complete(name, evidence)
        return found

    def complete(self, name: str, evidence: InputEvidence) -> None:
        """All that this process sees has been seen: take in what the others saw, and check it.

        Raises:
            ModelError: the others have seen another layer.
        """
        if self.shared:
            if (theirs := told(name.encode())) != name.encode():
                raise ModelError(
                    f"the processes of this run see other layers ({name} and {theirs.decode()}), as where tokens "
                    "choose experts: calibrate with one process"
                )
            evidence.merge_all()
        evidence.check_finite(name)

    def _forward(self, index: int, block: nn.Module, hidden: Tensor) -> Tensor:
        step = self.chunk(block)
        if hidden.device.type == "cpu":
            step = min(step, lane_size(hidden.shape[1]))
        out = torch.empty_like(hidden)
        for a in range(0, hidden.shape[0], step):
            x = hidden[a : a + step]
            out[a : a + step] = call_block(block, x, self.calls(index, x.shape[0]))
        return out

    def chunk(self, block: nn.Module) -> int:
        """How many windows fit in ``memory`` in one pass."""
        assert self.hidden is not None
        width = sum(p.shape[0] if p.dim() == 2 else p.shape[-2] for p in block.parameters() if p.dim() >= 2)
        per_window = self.hidden.shape[1] * (2 * width + 6 * self.hidden.shape[2]) * self.hidden.element_size()
        fit = max(1, int(self.memory // per_window))
        return min(self.most, fit)

    def _check(self, hidden: Tensor, where: str) -> None:
        if not is_finite(hidden):
            raise NumericalError(f"the output of {where} is NaN or infinite on the calibration data")


@dataclass(eq=False)
class _Recovering:
    """What a block-wise recovery works on: a pruned block, its input, and the dense block's output."""

    engine: Engine
    index: int
    block: nn.Module
    layers: Sequence[Layer]
    masks: Mapping[str, Tensor]
    hidden: Tensor
    target: Tensor
    output: Tensor

    def call(self, x: Tensor) -> Tensor:
        """The block on a batch of windows."""
        return call_block(self.block, x, self.engine.calls(self.index, x.shape[0]))

    def forward(self) -> Tensor:
        """The block on all windows, without gradients."""
        with torch.no_grad():
            return self.engine._forward(self.index, self.block, self.hidden)


class _BlockTask:
    """Gather and solve the layers of one block."""

    def __init__(
        self, engine: Engine, index: int, block: nn.Module, layers: Sequence[Layer], keeps: Mapping[str, float]
    ) -> None:
        self.engine, self.index, self.block = engine, index, block
        self.layers, self.keeps = layers, keeps
        self.records: dict[str, LayerRecord] = {}
        self.masks: dict[str, Tensor] = {}
        self.samples: dict[str, Tensor] = {}

    def run(self, needs_output: bool) -> Tensor | None:
        engine = self.engine
        assert engine.hidden is not None
        if engine.recipe.propagate == "layer":
            if engine.chunk(self.block) >= engine.most:
                return self._single_pass(needs_output)
            return self._passes(needs_output)
        keep_dense = engine.recipe.propagate == "off"
        dense = self._gather(self.layers)
        return dense if keep_dense else engine._forward(self.index, self.block, engine.hidden) if needs_output else None

    # One pass: solve each layer when all of its input has arrived.

    def _single_pass(self, needs_output: bool) -> Tensor | None:
        engine = self.engine
        hidden = engine.hidden
        assert hidden is not None
        step = engine.windows
        if hidden.device.type == "cpu" and all(x.index is None for x in self.layers):  # tokens part at experts
            step = min(step, lane_size(hidden.shape[1]))
        starts = range(0, engine.windows, step)
        gathered: dict[str, Group] = {}
        reading: list[tuple[Tensor, Group] | None] = [None] * len(starts)

        def arrive(layer: Layer, x: Tensor) -> None:
            if layer.name in self.records:
                return
            held = reading[lanes.current]
            if held is None or held[0] is not x or held[1].evidence.size != layer.shape[1]:
                # The first of the layers that read this input; those after it find its group.
                group = gathered.setdefault(layer.name, Group(layer, engine.needs, x.device))
                group.add(as_ni(layer, x), len(starts))
                reading[lanes.current] = held = (x, group)
                lanes.pause(layer.name)
            if layer.name not in self.records:
                gathered.clear()
                curvature = held[1].curvature(layer.name, engine.complete)
                self._solve(layer, held[1].evidence, curvature, held[1].sample)
            if not needs_output and len(self.records) == len(self.layers):
                raise Stop

        def through(a: int) -> Tensor:
            x = hidden[a : a + step]
            with watch(self.layers, arrive):
                return call_block(self.block, x, calls[x.shape[0]])

        calls = {n: engine.calls(self.index, n) for n in {min(step, engine.windows - a) for a in starts}}
        lanes = Lanes([partial(through, a) for a in starts])
        output: Tensor | None = None
        try:
            output = torch.cat(lanes.run())
        except Stop:
            output = None
        except Parted:
            return self._passes(needs_output)
        self._left_over()
        return output

    # Windows in chunks: one pass for each group of layers that read the same input.

    def _passes(self, needs_output: bool) -> Tensor | None:
        while len(self.records) < len(self.layers):
            before = len(self.records)
            self._gather([x for x in self.layers if x.name not in self.records], first_group=True)
            if len(self.records) == before:
                break
        self._left_over()
        engine = self.engine
        assert engine.hidden is not None
        return engine._forward(self.index, self.block, engine.hidden) if needs_output else None

    def _gather(self, layers: Sequence[Layer], first_group: bool = False) -> Tensor | None:
        """Gather evidence over all chunks, then solve.

        With ``first_group`` only the layers that read the first input met are gathered (experts of one
        parameter count as one), and each pass ends as soon as they are seen.
        """
        engine = self.engine
        assert engine.hidden is not None
        found: dict[str, InputEvidence] = {}
        groups: dict[str, str] = {}  # layer -> first layer that read the same tensor
        group: set[int] | None = None
        output = None if first_group else torch.empty_like(engine.hidden)
        current: Tensor | None = None
        first: Tensor | None = None
        leader = ""

        def arrive(layer: Layer, x: Tensor) -> None:
            nonlocal current, leader, first, group
            mark = id(getattr(layer.module, layer.parameter))
            if first_group:
                if first is None:
                    first, group = x, group or {mark}
                assert group is not None
                if x is first:
                    group.add(mark)
                elif mark not in group:
                    if layer.index is None and not any(y.index is not None for y in layers if _mark(y) in group):
                        raise Stop
                    return
            if x is not current:
                current, leader = x, layer.name
            lead = groups.setdefault(layer.name, leader)
            if lead != layer.name and found[lead].size == layer.shape[1]:
                return  # the leader gathers for both
            groups[layer.name] = layer.name
            rows = as_ni(layer, x)
            if layer.name not in found:
                found[layer.name] = InputEvidence(layer.shape[1], engine.needs, x.device)
                self.samples[layer.name] = sample_rows(rows).clone()
            found[layer.name].update(rows)

        step = engine.chunk(self.block)
        with watch(layers, arrive):
            for a in range(0, engine.windows, step):
                x = engine.hidden[a : a + step]
                current = first = None
                try:
                    y = call_block(self.block, x, engine.calls(self.index, x.shape[0]))
                except Stop:
                    continue
                if output is not None:
                    output[a : a + step] = y
        for name, evidence in found.items():
            engine.complete(name, evidence)
        curvatures: dict[str, Curvature] = {}
        for layer in layers:
            lead = groups.get(layer.name)
            if lead is None:
                continue
            if "gram" in engine.needs and lead not in curvatures:
                curvatures = {lead: Curvature(found[lead]["gram"], lead)}  # one factorization at a time
            self._solve(layer, found[lead], curvatures.get(lead), self.samples[lead])
        if not first_group:
            self._left_over()
        return output

    def _solve(self, layer: Layer, evidence: Any, curvature: Curvature | None, sample: Tensor | None) -> None:
        start = time.perf_counter()
        try:
            record, mask = solve_layer(
                layer,
                self.engine.recipe,
                self.keeps[layer.name],
                evidence=evidence,
                curvature=curvature,
                sample=sample,
                block=self.index,
                mask=self.engine.held.get(layer.name),
                grids=self.engine.grids,
            )
        except torch.OutOfMemoryError as error:
            raise SecateurError(
                f"{layer.name}: out of memory after {time.perf_counter() - start:.0f} s: {error}"
            ) from None
        if self.engine.shared:
            agree([layer.stored.detach(), mask])
        self.records[layer.name] = record
        self.masks[layer.name] = mask

    def _left_over(self) -> None:
        """Layers that no token reached are left dense, and say so."""
        for layer in self.layers:
            if layer.name not in self.records:
                empty = InputEvidence(layer.shape[1], self.engine.needs, layer.stored.device)
                self._solve(layer, empty, None, None)


def _mark(layer: Layer) -> int:
    return id(getattr(layer.module, layer.parameter))
