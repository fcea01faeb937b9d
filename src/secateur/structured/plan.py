"""Plan a structured pruning: families, scores, counts, proof; then mask or shrink."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..graph.state import duplicate
from ..graph.trace import plain_operations, stored_tensors
from ..graph.units import kind_of
from ..recipe import Recipe
from ..surgery.factors import carried
from ..surgery.program import Program
from ..surgery.prove import Proof
from ..surgery.shrink import shrink
from .exported import recorded
from .stock import stock_config
from .targets import Target


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
        emptied: module and attribute of what modules keep from one run to the next, which a smaller model must not.
        healed: tensors of the smaller model that a recovery changed, by name.
        untied: parameters of ``model`` that share their values with others in the model that was given.
        origin: what ``model`` is the exported program of, with the same parameters; None where it is no such.
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
    emptied: list[tuple[str, str]] = field(default_factory=list, repr=False)
    healed: dict[str, Tensor] = field(default_factory=dict, repr=False)
    untied: tuple[str, ...] = field(default=(), repr=False)
    origin: nn.Module | None = field(default=None, repr=False)

    def mask(self) -> nn.Module:
        """Set to zero, in place, every parameter position that goes; shapes stay as they are.

        What stays gets the values that a recovery gave it.
        """
        zero(self.model, self.kept)
        tensors = stored_tensors(self.model)
        with torch.no_grad():
            for name, values in self.healed.items():
                tensor, axes = tensors[name], self.kept.get(name, {})
                index = np.ix_(*[np.asarray(axes.get(a, np.arange(n))) for a, n in enumerate(tensor.shape)])
                tensor[tuple(torch.from_numpy(i) for i in index)] = values
        return self.model if self.origin is None else self.origin

    def heal(self, recover: Callable[[nn.Module], list[str]]) -> None:
        """Let a recovery change the smaller model's tensors; `mask` and `shrink` give them from then on."""
        small = self.shrink()
        before = {n: t.detach().clone() for n, t in stored_tensors(small).items()}
        self.notes += recover(small)
        after = stored_tensors(small)
        changed = {n: after[n].detach() for n, old in before.items() if not torch.equal(old, after[n])}
        self.healed = {**self.healed, **changed}

    def shrink(self) -> nn.Module:
        """A smaller copy of the model. The model itself stays as it is.

        Raises:
            ModelError: the smaller model does not run on the example; this cannot follow a proof.
        """
        if not self.kept:
            raise ModelError("nothing can be removed: " + "; ".join(self.notes or ["no family is free"]))
        small = duplicate(self.model)
        for path, attribute in self.emptied:
            getattr(small.get_submodule(path), attribute).clear()
        shrink(small, self.kept, self.proof.mends)
        tensors = stored_tensors(small)
        with torch.no_grad():
            for name, values in self.healed.items():
                tensors[name].copy_(values)
        args, kwargs = self.example
        with plain_operations(small):
            small(*args, **kwargs)
        surgery = describe(self) | carried(self.model)
        if stock_config(small, self.sizes, args, kwargs):
            surgery["format"] = "transformers"
        small.secateur_surgery = surgery  # type: ignore[assignment]
        return small

    run = shrink

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {
            **asked(self.recipe, self.target, self.before, self.after),
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
        lines = header(self.recipe, self.target, self.before, self.after)
        lines += [f"  {name:60} {what}" for name, what in _grouped(self.families)]
        kinds: dict[str, int] = {}
        for reason in self.frozen.values():
            kinds[reason] = kinds.get(reason, 0) + 1
        lines += [f"  frozen: {count} axes, {reason}" for reason, count in sorted(kinds.items(), key=lambda x: -x[1])]
        lines += proof_line(self.proof.proven, self.proof.error)
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)


@torch.no_grad()
def zero(model: nn.Module, kept: Mapping[str, Mapping[int, Any]]) -> None:
    """Set to zero, in place, every position of a parameter that is not among those that stay."""
    tensors = stored_tensors(model)
    for name, axes in kept.items():
        tensor = tensors[name]
        if isinstance(tensor, nn.Parameter):
            for axis, positions in axes.items():
                lost = np.setdiff1d(np.arange(tensor.shape[axis]), positions)
                tensor.index_fill_(axis, torch.from_numpy(lost).to(tensor.device), 0)


def header(recipe: Recipe, target: Target, before: Mapping[str, int], after: Mapping[str, int]) -> list[str]:
    """The first lines of a printed plan: what was asked for, and every count before and after."""
    lines = [f"{recipe.method}, target {target}", f"{'':12}{'before':>18}{'after':>18}{'ratio':>10}"]
    for key, a in before.items():
        lines.append(f"{key:12}{a:>18,}{after[key]:>18,}{after[key] / max(a, 1):>10.3f}")
    return [*lines, ""]


def proof_line(proven: bool, error: float | None) -> list[str]:
    """What a printed plan says of its proof."""
    size = "-" if error is None else f"{error:.1e}"
    return ["", f"masked == smaller: {'proven' if proven else 'NOT proven'}, error {size}"]


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
        **described(plan.recipe, plan.target, plan.before, plan.after, plan.proof.error, plan.example),
        "sizes": {str(a): b for a, b in plan.sizes.items()},
        **({"untied": list(plan.untied)} if plan.untied else {}),
        **({"exported": recorded(plan.model, *plan.example)} if isinstance(plan.model, Program) else {}),
        "kept": {
            name: {str(axis): {"of": tensors[name].shape[axis], "keep": _ranges(p)} for axis, p in axes.items()}
            for name, axes in plan.kept.items()
        },
        "mends": [
            {"module": m.module, "attribute": m.attribute, "item": m.item, "old": m.old, "new": m.new}
            for m in plan.proof.mends
        ],
    }


def asked(recipe: Recipe, target: Target, before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, Any]:
    """What was asked for, and every count before and after, as JSON data."""
    return {"recipe": recipe.to_dict(), "target": str(target), "before": before, "after": after}


def described(
    recipe: Recipe,
    target: Target,
    before: Mapping[str, int],
    after: Mapping[str, int],
    error: float | None,
    example: tuple[tuple[Any, ...], Mapping[str, Any]],
) -> dict[str, Any]:
    """What every surgery plan says, as JSON data."""
    values = (*example[0], *example[1].values())
    return {
        "version": 1,
        "format": "secateur",
        **asked(recipe, target, before, after),
        "error": error,
        "example": [{"shape": list(x.shape), "dtype": str(x.dtype)} if isinstance(x, Tensor) else None for x in values],
    }


def _ranges(positions: Any) -> list[list[int]]:
    """Runs ``[start, stop)`` of increasing positions."""
    last = np.flatnonzero(np.diff(positions, append=-1) != 1)
    first = np.concatenate([[0], last[:-1] + 1])
    return np.stack([positions[first], positions[last] + 1], 1).tolist() if len(positions) else []


def inputs(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword inputs of an example."""
    if isinstance(example, Mapping):
        return (), dict(example)
    if isinstance(example, Tensor):
        return (example,), {}
    if isinstance(example, (tuple, list)) and example:
        return tuple(example), {}
    raise ModelError("give example inputs of one forward pass: a tensor, a tuple of inputs or a dict of keywords")
