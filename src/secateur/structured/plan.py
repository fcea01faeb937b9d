"""Plan a structured pruning: families, scores, counts, proof; then mask or shrink."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import ModelError, RecipeError
from ..graph import Dependencies, dependencies, trace
from ..graph.trace import plain_operations, stored_tensors
from ..graph.units import kind_of
from ..recipe import Recipe
from ..surgery.prove import Proof, doubled, prove, wake
from ..surgery.shrink import kept_by_name, shrink
from .allocate import ALLOCATIONS, gone, meet
from .choose import chosen
from .score import Scores, unit_scores, weight_scores
from .stock import stock_config
from .targets import Target

#: Rounds of dropping what cannot be proven and allocating the rest again.
_ROUNDS = 3


@dataclass(frozen=True)
class FamilyPlan:
    """One family of units: how many there are and stay, or why it is left alone."""

    name: str
    units: int
    kept: int
    reason: str = ""


@dataclass(eq=False)
class StructuredPlan:
    """What would be removed from a model, with the proof. Prints as a table; nothing is changed before `run`.

    Attributes:
        families: what is cut, and what is left alone and why.
        before, after: parameters and FLOPs of one forward pass of the example.
        proof: that the smaller model computes what the masked one does.
        notes: what a reader should know, such as a target that was not met.
        kept: tensor name -> axis -> positions that stay.
        sizes: length of an axis anywhere in the run -> what such axes become.
        healed: tensors of the smaller model that a recovery changed, by name.
    """

    model: nn.Module
    recipe: Recipe
    target: Target
    families: list[FamilyPlan]
    frozen: dict[tuple[str, int], str]
    before: dict[str, int]
    after: dict[str, int]
    proof: Proof
    notes: list[str]
    kept: dict[str, dict[int, Any]] = field(repr=False)
    sizes: dict[int, list[int]] = field(repr=False)
    example: tuple[tuple[Any, ...], dict[str, Any]] = field(repr=False)
    healed: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def mask(self) -> nn.Module:
        """Set to zero, in place, every parameter position that goes; shapes stay as they are.

        What stays gets the values that a recovery gave it.
        """
        tensors = stored_tensors(self.model)
        with torch.no_grad():
            for name, axes in self.kept.items():
                tensor = tensors[name]
                if isinstance(tensor, nn.Parameter):
                    for axis, positions in axes.items():
                        lost = np.setdiff1d(np.arange(tensor.shape[axis]), positions)
                        tensor.index_fill_(axis, torch.from_numpy(lost).to(tensor.device), 0)
            for name, values in self.healed.items():
                tensor, axes = tensors[name], self.kept.get(name, {})
                index = np.ix_(*[np.asarray(axes.get(a, np.arange(n))) for a, n in enumerate(tensor.shape)])
                tensor[tuple(torch.from_numpy(i) for i in index)] = values
        return self.model

    def heal(self, recover: Callable[[nn.Module], list[str]]) -> None:
        """Let a recovery change the smaller model's tensors; `mask` and `shrink` give them from then on."""
        small = self.shrink()
        before = {n: t.detach().clone() for n, t in stored_tensors(small).items()}
        self.notes += recover(small)
        after = stored_tensors(small)
        self.healed = {n: after[n].detach() for n, old in before.items() if not torch.equal(old, after[n])}

    def shrink(self) -> nn.Module:
        """A smaller copy of the model. The model itself stays as it is.

        Raises:
            ModelError: the smaller model does not run on the example; this cannot follow a proof.
        """
        if not self.kept:
            raise ModelError("nothing can be removed: " + "; ".join(self.notes or ["no family is free"]))
        small = copy.deepcopy(self.model)
        shrink(small, self.kept, self.proof.mends)
        tensors = stored_tensors(small)
        with torch.no_grad():
            for name, values in self.healed.items():
                tensors[name].copy_(values)
        args, kwargs = self.example
        with plain_operations(small):
            small(*args, **kwargs)
        surgery = describe(self)
        config = stock_config(small, self.sizes, args, kwargs)
        if config is not None:
            small.config = config
            surgery["format"] = "transformers"
        small.secateur_surgery = surgery  # type: ignore[assignment]
        return small

    run = shrink

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {
            "recipe": self.recipe.to_dict(),
            "target": str(self.target),
            "before": self.before,
            "after": self.after,
            "families": [vars(f) for f in self.families],
            "frozen": [{"name": n, "axis": a, "reason": r} for (n, a), r in self.frozen.items()],
            "proof": {
                "proven": self.proof.proven,
                "error": self.proof.error,
                "effect": self.proof.effect,
                "reason": self.proof.reason,
            },
            "notes": self.notes,
        }

    def __str__(self) -> str:
        lines = [
            f"{self.recipe.method}, target {self.target}",
            f"{'':12}{'before':>18}{'after':>18}{'ratio':>10}",
        ]
        for key, a in self.before.items():
            b = self.after[key]
            lines.append(f"{key:12}{a:>18,}{b:>18,}{b / max(a, 1):>10.3f}")
        lines.append("")
        lines += [f"  {name:60} {what}" for name, what in _grouped(self.families)]
        kinds: dict[str, int] = {}
        for reason in self.frozen.values():
            kinds[reason] = kinds.get(reason, 0) + 1
        lines += [f"  frozen: {count} axes, {reason}" for reason, count in sorted(kinds.items(), key=lambda x: -x[1])]
        error = "-" if self.proof.error is None else f"{self.proof.error:.1e}"
        lines.append(f"\nmasked == smaller: {'proven' if self.proof.proven else 'NOT proven'}, error {error}")
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)


def _grouped(families: Sequence[FamilyPlan]) -> Iterator[tuple[str, str]]:
    """A line for the families of one place in all blocks: how many, and what stays of them, or why all of it does."""
    groups: dict[tuple[str, str], list[FamilyPlan]] = {}
    for family in families:
        groups.setdefault((kind_of(family.name, family.units), family.reason), []).append(family)
    for (kind, reason), members in groups.items():
        kept = sorted(f.kept for f in members)
        span = f"{kept[0]}" if kept[0] == kept[-1] else f"{kept[0]} to {kept[-1]}"
        what = f"left alone: {reason}" if reason else f"{span} of {members[0].units}"
        if len(members) == 1:
            yield members[0].name, what
        else:
            mean = "" if reason or kept[0] == kept[-1] else f", on average {sum(kept) / len(kept):.1f}"
            yield f"{kind.rpartition(' ')[0]}  ({len(members)} of these)", what + mean


def describe(plan: StructuredPlan) -> dict[str, Any]:
    """The surgery as JSON data, from which it can be replayed on a fresh model of the same class."""
    tensors = stored_tensors(plan.model)
    return {
        "version": 1,
        "format": "secateur",
        "recipe": plan.recipe.to_dict(),
        "target": str(plan.target),
        "before": plan.before,
        "after": plan.after,
        "error": plan.proof.error,
        "sizes": {str(a): b for a, b in plan.sizes.items()},
        "example": [_described(x) for x in (*plan.example[0], *plan.example[1].values())],
        "kept": {
            name: {str(axis): {"of": tensors[name].shape[axis], "keep": _ranges(p)} for axis, p in axes.items()}
            for name, axes in plan.kept.items()
        },
        "mends": [
            {"module": m.module, "attribute": m.attribute, "item": m.item, "old": m.old, "new": m.new}
            for m in plan.proof.mends
        ],
    }


def _described(value: Any) -> Any:
    return {"shape": list(value.shape), "dtype": str(value.dtype)} if isinstance(value, Tensor) else None


def _ranges(positions: Any) -> list[list[int]]:
    """Runs ``[start, stop)`` of increasing positions."""
    breaks = np.flatnonzero(np.diff(positions) != 1) + 1
    return [[int(run[0]), int(run[-1]) + 1] for run in np.split(positions, breaks) if len(run)]


def plan_structured(
    model: nn.Module,
    recipe: Recipe,
    *,
    target: str | Target,
    example: Any,
    evidence: Mapping[str, Any] | None = None,
    multiple: int = 8,
    where: str = "coupled",
) -> StructuredPlan:
    """Find what can go together, score it, and choose what goes, with a proof. The model is not changed.

    Args:
        example: inputs of one forward pass: a tensor, a tuple of positional or a dict of keyword inputs.
        evidence: layer name -> facts that the criterion needs beside the weights.
        multiple: sizes are rounded to it, where the units are single positions.
        where: see `unit_scores`.

    Raises:
        RecipeError: the allocation is not one of families.
        ModelError: the model does not run on the example.
    """
    wanted = target if isinstance(target, Target) else Target.parse(target)
    if recipe.allocation not in ALLOCATIONS:
        raise RecipeError(f"coupled units are allocated {', '.join(ALLOCATIONS)}; not '{recipe.allocation}'")
    args, kwargs = inputs(example)
    twin, twin_args, twin_kwargs = waking_twin(model, args, kwargs)
    found = dependencies(trace(twin, twin_args, twin_kwargs))
    scores = unit_scores(found, weight_scores(model, recipe, evidence or {}), where)
    active, left = chosen(found, recipe, model)
    left.update({i: f"criterion '{recipe.criterion}' has no score for it" for i in active if not len(scores[i])})
    active = [i for i in active if i not in left]
    notes: list[str] = []
    bytes_of = {n: t.element_size() for n, t in stored_tensors(model).items()}
    counted: dict[str, Callable[[frozenset[int]], int]] = {
        "params": found.parameters,
        "flops": found.flops,
        "bytes": lambda gone: found.parameters(gone, bytes_of),
    }
    proof, labels = Proof(False, None, 0.0, (), ""), frozenset[int]()
    counts: dict[int, int] = {}
    for _ in range(_ROUNDS):
        if not active:
            break
        labels, kept = meet(
            [found.families[i] for i in active],
            [scores[i] for i in active],
            wanted,
            recipe.allocation,
            multiple,
            counted[wanted.quantity],
        )
        counts = dict(zip(active, kept, strict=True))
        proof = prove(twin, found, labels, twin_args, twin_kwargs)
        if proof.proven:
            break
        failing = _failing(twin, found, scores, counts, twin_args, twin_kwargs)
        left.update(failing)
        if not failing:  # each alone is proven, all together are not: nothing is safe
            left.update(dict.fromkeys(active, f"together with others {proof.reason}"))
        active = [i for i in active if i not in left]
    if not proof.proven:
        labels, counts = frozenset(), {}
    before = {k: f(frozenset()) for k, f in counted.items()}
    after = {k: f(labels) for k, f in counted.items()}
    if after[wanted.quantity] > wanted.remaining(before[wanted.quantity]):
        notes.append(f"the target is not met: {wanted.quantity} can only go to {after[wanted.quantity]:,} here")
    elif labels and after[wanted.quantity] < 0.9 * wanted.remaining(before[wanted.quantity]):
        notes.append(
            f"more goes than was asked: the next larger sizes of these families leave more than {wanted} "
            f"(they are rounded to a multiple of {multiple}; heads and groups go whole)"
        )
    if found.trace.unread:
        notes.append(
            f"{len(found.trace.unread)} parameters are not read on this example and stay as they are, e.g. "
            f"{found.trace.unread[0]}: the proof says nothing of the path that reads them"
        )
    if found.trace.unknown:
        notes.append("operations without a rule froze what they read: " + ", ".join(sorted(found.trace.unknown)))
    if proof.proven and _statistics(found, labels):
        notes.append(
            "normalizations go over fewer channels than in the masked model; the proof takes them over what stays"
        )
    families = [
        FamilyPlan(f.name, len(f), counts.get(i, len(f)), left.get(i, "")) for i, f in enumerate(found.families)
    ]
    kept_names = kept_by_name(found, labels) if labels else {}
    return StructuredPlan(
        model,
        recipe,
        wanted,
        families,
        found.frozen,
        before,
        after,
        proof,
        notes,
        kept_names,
        _sizes(found, labels),
        (args, kwargs),
    )


def inputs(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword inputs of an example."""
    if isinstance(example, Mapping):
        return (), dict(example)
    if isinstance(example, Tensor):
        return (example,), {}
    if isinstance(example, (tuple, list)) and example:
        return tuple(example), {}
    raise ModelError("give example inputs of one forward pass: a tensor, a tuple of inputs or a dict of keywords")


def waking_twin(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """An awake copy in float64, or in the model's own dtype where its code does not take float64."""
    problem: Exception | None = None
    for convert in (True, False):
        a, k = args, kwargs
        try:
            twin = copy.deepcopy(model)
            if convert:
                twin, a, k = twin.double(), doubled(args), doubled(kwargs)
            wake(twin)
            with plain_operations(twin):
                twin(*a, **k)
            return twin, a, k
        except Exception as error:  # the user's own code
            problem = error
    reason = f"{type(problem).__name__}: {problem}"
    raise ModelError(f"the model cannot be copied and run on the example: {reason}") from problem


def _failing(
    twin: nn.Module,
    found: Dependencies,
    scores: Sequence[Scores],
    counts: Mapping[int, int],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> dict[int, str]:
    """Families whose cut cannot be proven beside the others'.

    Families of one kind, such as the heads of every block, stand or fall together; the kinds are tried one after
    the other, the one with most parameters first, and each is kept if the proof still holds with it.
    """
    kinds: dict[str, list[int]] = {}
    for i, count in counts.items():
        if count < len(found.families[i]):
            kinds.setdefault(found.families[i].kind, []).append(i)

    def labels_of(members: Sequence[int]) -> frozenset[int]:
        return gone([found.families[i] for i in members], [scores[i] for i in members], [counts[i] for i in members])

    weight = {kind: found.parameters(labels_of(members)) for kind, members in kinds.items()}
    good: list[int] = []
    left: dict[int, str] = {}
    for kind in sorted(kinds, key=lambda k: weight[k]):
        proof = prove(twin, found, labels_of([*good, *kinds[kind]]), args, kwargs)
        if proof.proven:
            good += kinds[kind]
        else:
            left.update(dict.fromkeys(kinds[kind], proof.reason))
    return left


def _sizes(found: Dependencies, labels: frozenset[int]) -> dict[int, list[int]]:
    lost = np.fromiter(labels, dtype=np.int64)
    sizes: dict[int, list[int]] = {}
    for axes in found.trace.seen.values():
        for axis in axes:
            left = int((~np.isin(found.trace.labels.roots(axis), lost)).sum())
            if left not in sizes.setdefault(len(axis), []):
                sizes[len(axis)].append(left)
    return {a: b for a, b in sizes.items() if b != [a]}


def _statistics(found: Dependencies, labels: frozenset[int]) -> bool:
    lost = np.fromiter(labels, dtype=np.int64)
    roots = found.trace.labels.roots
    return any(np.isin(roots(a), lost).any() for axes in found.trace.statistics.values() for _, a in axes)
