"""What of a model may vary: widths, depths and kernels; what a choice of them costs, and what it takes away."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .. import granularity
from ..errors import ModelError, RecipeError
from ..graph.labels import Array
from ..graph.trace import stored_tensors
from ..recipe import Recipe
from ..search.families import Families
from ..search.space import Counts, Node
from ..search.subject import Bounds
from ..structured.make import waking_twin
from ..structured.plan import inputs
from ..structured.targets import Target
from ..surgery.depth import zeroed
from ..surgery.pieces import EXACT, ROUNDED, compare
from ..surgery.prove import Proof, masked_outputs, outputs
from ..surgery.shrink import Mend, candidates, exact, kept_by_name
from .cut import Cut, made
from .kernels import Kernel, elastic_kernels, mends
from .stages import Stage, removed_of, renamed, stages


class Elastic:
    """The sub-networks of a model.

    Nodes are families of coupled units, of which the best by a score stay; stages of blocks, of which the first stay;
    and kernels, of which the center stays.

    Args:
        recipe: whose criterion orders units, and whose globs leave layers alone.
        example: inputs of one forward pass.
        low: the least share of the units of a family that stays.
        depth: the least share of the blocks of a stage that stays.
        kernel: the least size of a kernel.
        multiple: widths are multiples of it.

    Raises:
        ModelError: nothing can vary, or the smallest sub-network is not proven.
    """

    def __init__(
        self, model: nn.Module, recipe: Recipe, example: Any, *, low: float = 0.25, depth: float = 0.5,
        kernel: int = 3, multiple: int = 8,
    ) -> None:  # fmt: skip
        if not 0 < low <= 1 or not 0 <= depth <= 1 or kernel < 1:
            raise RecipeError(
                f"low is a share in (0, 1], depth one in [0, 1], kernel a size of at least 1: not {low:g}, {depth:g}, "
                f"{kernel}"
            )
        self.model, self.recipe, self.multiple = model, recipe, multiple
        self.args, self.kwargs = inputs(example)
        self.subject = Families(
            model, recipe, target=Target.parse("params 50%"), example=(self.args, self.kwargs), data=None, loss=None,
            bounds=Bounds.read(1.0, {"*": (low, 1.0)}), multiple=multiple,
        )  # fmt: skip
        self.found = self.subject.found
        self._parameters = dict(model.named_parameters(remove_duplicate=False))
        self.scores = self.subject.scores
        self.notes: list[str] = []
        self._lost: dict[tuple[int, int], Array] = {}
        self._axes: dict[str, list[tuple[int, Array]]] = {}
        for slot, roots in zip(self.found.slots, self.found.roots, strict=True):
            for name in slot.names:
                self._axes.setdefault(name, []).append((slot.axis, roots))
        self._mends: dict[Counts, tuple[Mend, ...]] = {}
        self._costs: dict[tuple[str, Counts], int] = {}
        self.stages: list[Stage] = []
        self.kernels: list[Kernel] = []
        double, args, kwargs, _ = waking_twin(model, self.args, self.kwargs, outputs)
        some, smaller = stages(double, recipe, args, kwargs), elastic_kernels(model, kernel)
        whys: list[str] = []
        for lost, stages_, kernels_ in (("", some, smaller), ("kernels", some, []), ("blocks", [], [])):
            self.stages, self.kernels = stages_, kernels_
            self.stage_nodes = self._stage_nodes(depth)
            self.nodes = (*self.subject.space.nodes, *self.stage_nodes, *self._kernel_nodes())
            proof = self.prove(self.least)
            if proof.proven:
                self.notes += [f"the {lost} stay as they are, because with them {whys[-1]}"] if whys else []
                break
            whys.append(proof.reason)
        else:
            raise ModelError(f"the smallest sub-network does not compute what the masked model does: {whys[-1]}")

    def _stage_nodes(self, depth: float) -> list[Node]:
        nodes = []
        for stage in self.stages:
            count, whole = len(stage.blocks), len(self.model.get_submodule(stage.path)._modules)
            fixed = stage.length - count
            least = max(0, math.ceil(depth * stage.length - 1e-9) - fixed, 1 if whole == count else 0)
            nodes.append(Node(stage.name, stage.length, range(fixed + min(least, count), stage.length + 1)))
        return nodes

    def _kernel_nodes(self) -> list[Node]:
        return [Node(f"{k.path} kernel", k.sizes[-1], k.sizes) for k in self.kernels]

    # -- choices -----------------------------------------------------------------------------------

    @property
    def least(self) -> Counts:
        """The smallest sub-network."""
        return tuple(n.sizes[0] for n in self.nodes)

    @property
    def most(self) -> Counts:
        """The whole model."""
        return tuple(n.sizes[-1] for n in self.nodes)

    def draw(self, generator: torch.Generator) -> Counts:
        """A random sub-network: every node by itself, all of its sizes alike."""
        return tuple(n.sizes[int(torch.randint(len(n.sizes), (1,), generator=generator))] for n in self.nodes)

    def rank(self, model: nn.Module) -> None:
        """Order the units of each family anew, by the weights that a model has."""
        where = granularity.parse(self.recipe.granularity).coupled
        scores, _ = self.subject.case.scores(model, None, where)
        places = {id(f): s for f, s in zip(self.found.families, scores, strict=True)}
        self.scores = [places[id(f)] for f in self.subject.families]
        self._mends.clear()
        self._costs.clear()
        self._lost.clear()

    def split(self, counts: Counts) -> tuple[Counts, Counts, Counts]:
        """Counts of widths, of depths and of kernels."""
        a, b = len(self.subject.families), len(self.subject.families) + len(self.stages)
        return counts[:a], counts[a:b], counts[b:]

    def mask(self, widths: Counts) -> NDArray[np.bool_]:
        """Whether each label goes with these widths; see `structured.allocate.gone`, of which this is the fast form."""
        mask = np.zeros(len(self.found.trace.labels), dtype=bool)
        for number, count in enumerate(widths):
            key = (number, count)
            if key not in self._lost:
                family, score = self.subject.families[number], self.scores[number]
                lost = np.argsort(-score, kind="stable")[count:].tolist()
                labels = [label for k in lost for label in family.units[k].gone]
                self._lost[key] = np.asarray(labels, dtype=np.int64)
            mask[self._lost[key]] = True
        return mask

    def _less(self, counts: Counts) -> tuple[dict[str, list[int]], dict[Kernel, int]]:
        """Blocks that are left out, and kernels that are smaller."""
        _, depths, sizes = self.split(counts)
        free = [c - (s.length - len(s.blocks)) for c, s in zip(depths, self.stages, strict=True)]
        smaller = {k: s for k, s in zip(self.kernels, sizes, strict=True) if s < k.sizes[-1]}
        return removed_of(self.stages, free), smaller

    def cut(self, counts: Counts) -> Cut:
        """What a sub-network leaves out.

        Raises:
            ModelError: numbers in modules that repeat a width cannot be mended for these widths.
        """
        removed, smaller = self._less(counts)
        widths = self.split(counts)[0]
        labels = frozenset(np.flatnonzero(self.mask(widths)).tolist())
        changed = [
            m for k, s in smaller.items()
            for m in mends(self.model.get_submodule(k.path), k.path, s)  # type: ignore[arg-type]
        ]  # fmt: skip
        there = [
            Mend(name, m.attribute, m.item, m.old, m.new)
            for m in (*self._width_mends(widths, labels), *changed)
            if (name := renamed(m.module, removed)) is not None
        ]
        return Cut(counts, labels, removed, kept_by_name(self.found, labels), smaller, tuple(there))

    def _width_mends(self, widths: Counts, labels: frozenset[int]) -> tuple[Mend, ...]:
        if widths not in self._mends:
            found: tuple[Mend, ...] = exact(self.model, self.found, labels)
            if candidates(self.model, self.found, labels):
                proof = self.subject.case.prove(labels, quick=True, draft=True)
                if not proof.proven:
                    raise ModelError(f"a sub-network does not compute what the masked model does: {proof.reason}")
                found = proof.mends
            self._mends[widths] = found
        return self._mends[widths]

    # -- costs -------------------------------------------------------------------------------------

    def cost(self, quantity: str, counts: Counts) -> int:
        """Parameters, bytes of them, or operations of one forward pass of the example; counted, not measured."""
        key = (quantity, counts)
        if key not in self._costs:
            mask = self.mask(self.split(counts)[0])
            count = self._flops if quantity == "flops" else self._stored
            self._costs[key] = count(mask, *self._less(counts), quantity == "bytes")
        return self._costs[key]

    def products(self, counts: Counts) -> int:
        """How many matrix products and convolutions a forward pass has."""
        removed, _ = self._less(counts)
        return sum(renamed(site, removed) is not None for site in self.found.trace.sites)

    def _flops(
        self, mask: NDArray[np.bool_], removed: Mapping[str, list[int]], smaller: Mapping[Kernel, int], _: bool
    ) -> int:
        share = {k.path: (s**k.dims, k.sizes[-1] ** k.dims) for k, s in smaller.items()}
        total = 0
        for (factor, axes), site in zip(self.found.products, self.found.trace.sites, strict=True):
            if removed and renamed(site, removed) is None:
                continue
            new, old = share.get(site, (1, 1))
            total += factor * new // old * math.prod(len(a) - int(np.count_nonzero(mask[a])) for a in axes)
        return total

    def _stored(
        self, mask: NDArray[np.bool_], removed: Mapping[str, list[int]], smaller: Mapping[Kernel, int], in_bytes: bool
    ) -> int:
        sizes = {k.weight: {2 + a: s for a in range(k.dims)} for k, s in smaller.items()}
        counted: set[int] = set()
        total = 0
        for name, parameter in self._parameters.items():
            if id(parameter) in counted or (removed and renamed(name, removed) is None):
                continue
            counted.add(id(parameter))
            lengths = list(parameter.shape)
            for axis, roots in self._axes.get(name, ()):
                lengths[axis] -= int(np.count_nonzero(mask[roots]))
            for axis, size in sizes.get(name, {}).items():
                lengths[axis] = size
            total += math.prod(lengths) * (parameter.element_size() if in_bytes else 1)
        return total

    # -- the proof ---------------------------------------------------------------------------------

    def prove(
        self, counts: Counts, model: nn.Module | None = None, smaller: Callable[[nn.Module, Cut], nn.Module] = made
    ) -> Proof:  # fmt: skip
        """Whether the masked model and the sub-network agree, in float64 on an awake copy.

        Masked is what has zeros for units that go, for blocks that are left out, and around the centers of smaller
        kernels.

        Args:
            model: whose weights are taken; the one that was analysed where none is given.
        """
        double, args, kwargs, _ = waking_twin(self.model if model is None else model, self.args, self.kwargs, outputs)
        try:
            cut = self.cut(counts)
        except ModelError as problem:
            return Proof(False, None, 0.0, (), str(problem))
        tensors = stored_tensors(double)
        with torch.no_grad():
            for kernel, size in cut.kernels.items():
                border(tensors[kernel.weight], kernel, size)
        low = self.found.trace.low_precision
        return compare(
            lambda: masked_outputs(zeroed(double, cut.removed), self.found, cut.labels, args, kwargs),
            lambda: outputs(smaller(double, cut), args, kwargs),
            lambda: ROUNDED if low else EXACT,
        )


def border(weight: Tensor, kernel: Kernel, size: int) -> None:
    """Set to zero, in place, what lies around the center of a kernel."""
    for axis in range(2, 2 + kernel.dims):
        stay = kernel.positions(size)
        lost = [i for i in range(weight.shape[axis]) if i not in stay]
        weight.index_fill_(axis, torch.tensor(lost, device=weight.device), 0)


def check_known(elastic: Elastic, counts: Sequence[int]) -> Counts:
    """Counts of a sub-network, refused where the supernet has no such one.

    Raises:
        RecipeError: it has not.
    """
    found = tuple(int(c) for c in counts)
    if len(found) != len(elastic.nodes) or any(c not in n.sizes for c, n in zip(found, elastic.nodes, strict=True)):
        raise RecipeError(f"the supernet has no sub-network {list(found)}: see the sizes of its nodes")
    return found
