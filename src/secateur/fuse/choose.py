"""Which layers of a model are decomposed, under which budget, and what each of them becomes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
from torch import nn

from ..calibrate import batches_of, run_model
from ..data import Windows, windows
from ..errors import ModelError, RecipeError, UnknownName
from ..evidence import gather_inputs
from ..evidence.inputs import INPUT_FACTS, InputEvidence
from ..layers import Layer, Skipped, find_layers
from ..registry import Part, get, parts
from ..stream import find_blocks
from ..structured import Target
from ..structured.whole import totals
from ..surgery.factors import why_not
from .lowrank import Made, Options
from .ranks import Curve, greedy

Allocation = Literal["greedy", "uniform"]
#: Shares of its size at which a layer that divides its budget itself says what it loses.
SHARES = tuple(k / 10 for k in range(1, 10))


def methods() -> dict[str, Part]:
    """The registered decompositions by name."""
    return {n: p for n, p in parts("transform").items() if p.facts.get("makes") == "factors"}


@dataclass(eq=False)
class Choice:
    """What is to be decomposed; nothing is changed.

    Attributes:
        how: the allocation of ranks.
        before: parameters and bytes of the whole model.
        budget: values that the layers may keep together.
        element: bytes of a value.
        asked: the target, in words.
        batches, described: what inputs are measured on.
        notes: layer -> why it stays as it is.
    """

    model: nn.Module = field(repr=False)
    part: Part
    knobs: dict[str, Any]
    how: str
    layers: list[Layer]
    skipped: list[Skipped]
    before: dict[str, int]
    budget: float
    element: int
    quantity: str
    asked: str
    needs: frozenset[str]
    batches: list[Any] = field(repr=False)
    described: dict[str, Any] | None
    notes: dict[str, str] = field(default_factory=dict)

    @property
    def budgeted(self) -> bool:
        """Whether the method divides the budget of each layer itself."""
        return "budget" in self.part.needs

    def make(self) -> dict[str, Made]:
        """Measure what is needed, and find what each layer becomes; those that are not in the answer stay dense."""
        if self.needs and not self.batches:
            raise RecipeError(
                f"'{self.part.name}' needs {sorted(self.needs)[0]}, which is measured on data: pass data= (--data)"
            )
        seen = gather_inputs(self.model, self.layers, self.needs, self.batches, run_model) if self.needs else {}
        work = _Work(self.part, self.knobs, seen, self.element if self.quantity == "bytes" else None, self.notes)
        if self.budgeted:
            return work.budgeted(self.layers, self.budget, self.how)
        return work.ranked(self.layers, self.budget, self.how)


def choose(
    model: nn.Module, method: str, target: str | None, sparsity: float | None, data: Any = None, tokenizer: Any = None,
    count: int | None = None, length: int = 512, allocation: str | None = None, only: Sequence[str] = (),
    skip: Sequence[str] = (), knobs: Mapping[str, Any] | None = None,
) -> Choice:  # fmt: skip
    """What `decompose` would do, by the same arguments.

    Raises:
        RecipeError: what is asked for is unknown or impossible.
    """
    part, values, how = asked(method, allocation, knobs)
    layers, skipped = _layers(model, part, only, skip)
    before = _counts(model)
    budget, element, quantity = _budget(model, layers, target, sparsity)
    needs = frozenset(part.needs) & INPUT_FACTS.keys()
    batches, described = _batches(model, data, tokenizer, count, length) if needs else ([], None)
    text = target if target is not None else f"{sparsity:g} of the weights in those layers"
    return Choice(
        model, part, values, how, layers, skipped, before, budget, element, quantity, text, needs, batches, described
    )


def asked(method: str, allocation: str | None, knobs: Mapping[str, Any] | None) -> tuple[Part, dict[str, Any], str]:
    """The decomposition of that name, its knobs, and how ranks are given out."""
    if method not in methods():
        raise UnknownName("decomposition", method, methods())
    part = get("transform", method)
    values = part.knobs_with(knobs or {})
    how = allocation or ("uniform" if "budget" in part.needs else "greedy")
    if how not in get_args(Allocation):
        raise UnknownName("allocation of ranks", how, get_args(Allocation), ", ".join(get_args(Allocation)))
    return part, values, how


def _counts(model: nn.Module) -> dict[str, int]:
    return {k: int(v) for k, v in totals(model, 0).items() if k != "flops"}


def _layers(
    model: nn.Module, part: Part, only: Sequence[str], skip: Sequence[str]
) -> tuple[list[Layer], list[Skipped]]:
    """Plain layers, and why others are left alone."""
    blocks = find_blocks(model)
    found, skipped = find_layers(model, only, skip, None if blocks is None else blocks.paths())
    names: dict[int, int] = {}
    for _, p in model.named_parameters(remove_duplicate=False):
        names[id(p)] = names.get(id(p), 0) + 1
    layers = []
    for layer in found:
        reason = why_not(layer.module)
        if reason is None and names[id(getattr(layer.module, layer.parameter))] > 1:
            reason = "it shares its values with another"
        kinds = part.facts.get("kinds")
        if reason is None and kinds and layer.kind not in kinds:
            reason = f"{part.name} is for layers of kind {', '.join(kinds)}"
        if reason is None and layer.module is model:
            raise ModelError("this model is a single layer: put it into a torch.nn.Sequential")
        if reason is None:
            layer.check_finite()
            layers.append(layer)
        else:
            skipped.append(Skipped(layer.name, layer.numel, reason))
    if not layers:
        reasons = sorted({s.reason for s in skipped})
        raise RecipeError(f"there is no layer that {part.name} can decompose: {'; '.join(reasons)}")
    return layers, skipped


def _budget(
    model: nn.Module, layers: Sequence[Layer], target: str | None, sparsity: float | None
) -> tuple[float, int, str]:
    """How many values the layers may keep, bytes of a value, and what the target counts."""
    if (target is None) == (sparsity is None):
        raise RecipeError("say how much: target='params 30%' of the model, or sparsity=0.3 of the decomposed layers")
    total = sum(x.numel for x in layers)
    sizes = {x.stored.element_size() for x in layers}
    element = sizes.pop()
    if sizes:
        raise RecipeError("the layers have values of several types: convert the model to one")
    if target is None:
        assert sparsity is not None
        if isinstance(sparsity, bool) or not isinstance(sparsity, (int, float)) or not 0 < sparsity < 1:
            raise RecipeError(f"sparsity is a fraction of what goes, in (0, 1), not {sparsity!r}")
        return (1 - sparsity) * total, element, "params"
    wanted, counts = Target.parse(target), _counts(model)
    if wanted.quantity not in ("params", "bytes"):
        raise RecipeError(f"ranks are given out by 'params' or 'bytes', not {wanted.quantity}")
    unit = element if wanted.quantity == "bytes" else 1
    gone = (counts[wanted.quantity] - wanted.remaining(counts[wanted.quantity])) / unit
    if not 0 < gone < total:
        raise RecipeError(
            f"target '{target}' takes {gone:,.0f} values away, and the layers that can be decomposed have {total:,}"
        )
    return total - gone, element, wanted.quantity


def _batches(
    model: nn.Module, data: Any, tokenizer: Any, count: int | None, length: int
) -> tuple[list[Any], dict[str, Any] | None]:
    if data is None:
        return [], None
    if not isinstance(data, (str, Windows)):
        return batches_of(data), {"source": "batches"}
    device = next(model.parameters()).device
    text = windows(data, tokenizer, count=count, length=length)
    return [ids.to(device) for ids in text.ids.split(1)], text.describe()


class _Work:
    """What each layer becomes; layers that are not in the answer stay dense."""

    def __init__(
        self, part: Part, knobs: Mapping[str, Any], seen: Mapping[str, InputEvidence], element: int | None,
        notes: dict[str, str],
    ) -> None:  # fmt: skip
        self.part, self.knobs, self.seen, self.element, self.notes = part, knobs, seen, element, notes

    def _given(self, layer: Layer, **more: Any) -> Any:
        facts: dict[str, Any] = {"weight": layer.weight(), "stored": layer.stored.detach(), **more}
        evidence = self.seen.get(layer.name)
        facts |= {n: evidence[n] for n in self.part.needs if evidence is not None and n in INPUT_FACTS}
        return self.part(facts, **self.knobs)

    def _seen(self, layers: Sequence[Layer]) -> list[Layer]:
        """Those whose inputs were seen, where inputs matter."""
        for x in layers:
            if x.name in self.seen and not self.seen[x.name].tokens:
                self.notes[x.name] = "no calibration input reached it"
        return [x for x in layers if x.name not in self.notes]

    def ranked(self, layers: Sequence[Layer], budget: float, how: str) -> dict[str, Made]:
        """Ranks out of one budget, or the same share of every layer."""
        usable = self._seen(layers)
        budget -= sum(x.numel for x in layers if x.name in self.notes)
        total = sum(x.numel for x in usable)
        options: dict[str, Options] = {}
        curves: dict[str, Curve] = {}
        for x in usable:
            found = self._given(x)
            saves = found.curve.sizes < x.numel
            if not saves.any():
                self.notes[x.name] = "no rank makes it smaller"
                budget, total = budget - x.numel, total - x.numel
                continue
            options[x.name] = found
            sizes = np.append(found.curve.sizes[saves], float(x.numel))
            curves[x.name] = Curve(sizes, np.append(found.curve.errors[saves], 0.0))
        if how == "greedy":
            chosen = greedy(curves, budget)
        else:
            share = budget / max(total, 1)
            chosen = {
                n: max(0, int(np.searchsorted(c.sizes, share * c.sizes[-1], side="right")) - 1)
                for n, c in curves.items()
            }  # fmt: skip
            if sum(float(curves[n].sizes[k]) for n, k in chosen.items()) > budget:
                raise RecipeError("the smallest ranks are larger than the same share of every layer: ask for less")
        return {n: options[n].make(k) for n, k in chosen.items() if k < len(curves[n].sizes) - 1}

    def budgeted(self, layers: Sequence[Layer], budget: float, how: str) -> dict[str, Made]:
        """A share of every layer, which divides it itself: the same of all, or by what loses least for a value."""
        if how == "greedy":
            return self._mixed(layers, budget)
        usable = self._seen(layers)
        budget -= sum(x.numel for x in layers if x.name in self.notes)
        share = budget / max(sum(x.numel for x in usable), 1)
        made = {}
        for x in usable:
            found = self._within(x, share * x.numel)
            if found.facts["kind"] == "dense":
                raise RecipeError(f"{x.name} has no room for one rank or one weight: ask for less to go")
            made[x.name] = found
        return made

    def _within(self, layer: Layer, budget: float) -> Made:
        mask = 0.0 if self.element is None else layer.numel / (8 * self.element)
        made: Made = self._given(layer, budget=budget, mask_size=mask)
        return made

    def _mixed(self, layers: Sequence[Layer], budget: float) -> dict[str, Made]:
        """Ranks, single weights, both or neither for each layer, out of one budget.

        Each layer says what it would lose at shares of its size. What the choice among these leaves of the budget goes
        to the layers that were chosen, in proportion, where it lowers their error.
        """
        usable = self._seen(layers)
        budget -= sum(x.numel for x in layers if x.name in self.notes)
        curves: dict[str, Curve] = {}
        tried: dict[str, list[Made]] = {}
        for x in usable:
            shares = [s for s in SHARES if self._room(x, s)]
            tried[x.name] = [self._within(x, s * x.numel) for s in shares]
            errors = np.minimum.accumulate([*(m.error**2 for m in tried[x.name]), 0.0])
            curves[x.name] = Curve(np.array([*shares, 1.0]) * x.numel, errors)
        chosen = greedy(curves, budget)
        taken = {n: float(curves[n].sizes[k]) for n, k in chosen.items()}
        cut = {x.name: x for x in usable if chosen[x.name] < len(tried[x.name])}
        spare = (budget - sum(taken.values())) / max(sum(taken[n] for n in cut), 1.0)
        made = {}
        for name, layer in cut.items():
            found = tried[name][chosen[name]]
            more = self._within(layer, min(taken[name] * (1 + spare), layer.numel - 1.0)) if spare > 0 else found
            made[name] = more if more.error <= found.error else found
        return made

    def _room(self, layer: Layer, share: float) -> bool:
        """Whether a share of a layer holds one rank, or one weight and its mask."""
        mask = 0.0 if self.element is None else layer.numel / (8 * self.element)
        return share * layer.numel >= min(sum(layer.shape), mask + 1)
