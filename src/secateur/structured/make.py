"""Find what can go, choose what does, and prove it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..errors import ModelError, RecipeError
from ..graph import Dependencies, Trace, dependencies, trace
from ..graph.state import Place, duplicate, forget, remade
from ..graph.trace import stored_tensors
from ..recipe import Recipe
from ..surgery.prove import Proof, doubled, prove, wake
from ..surgery.shrink import Mend, kept_by_name
from .allocate import ALLOCATIONS, explicit, gone, meet
from .choose import chosen, keep_divisible
from .plan import FamilyPlan, StructuredPlan, inputs
from .score import Combined, Probes, Scores, combined, unit_scores, weight_scores
from .targets import Target

T = TypeVar("T")

#: Layer name -> facts, or what measures them, with probes of the units for those that need some.
Evidence = Mapping[str, Any] | Callable[[Probes], Mapping[str, Any]]

#: Rounds of dropping what cannot be proven and allocating the rest again.
_ROUNDS = 3
#: Ways to mend all families together that are tried before each kind is tried alone.
_FEW = 2


def plan_structured(
    model: nn.Module,
    recipe: Recipe,
    *,
    target: str | Target,
    example: Any,
    evidence: Evidence | None = None,
    multiple: int = 8,
    where: str = "coupled",
    origin: nn.Module | None = None,
) -> StructuredPlan:
    """Find what can go together, score it, and choose what goes, with a proof. The model is not changed.

    Args:
        model: a module, or the exported program of one.
        example: inputs of one forward pass: a tensor, a tuple of positional or a dict of keyword inputs.
        evidence: layer name -> facts that the criterion needs beside the weights, or what measures them.
        multiple: sizes are rounded to it, where the units are single positions.
        where: see `unit_scores`.
        origin: the module that a program was made of; layers, norms and blocks are looked for there.

    Raises:
        RecipeError: the allocation is not one of families.
        ModelError: the model does not run on the example.
    """
    wanted = target if isinstance(target, Target) else Target.parse(target)
    case = Case(model, recipe, example)
    found = case.found
    source = model if origin is None else origin
    scores, combine = case.scores(source, evidence, where)
    active, left = chosen(found, recipe, source, case.remade, origin is None)
    if origin is None:
        keep_divisible(found, model)
    left.update({i: f"criterion '{recipe.criterion}' has no score for it" for i in active if not len(scores[i])})
    active = [i for i in active if i not in left]
    allowed = set(active)
    proof, labels = NOTHING, frozenset[int]()
    counts: dict[int, int] = {}
    for _ in range(_ROUNDS):
        if not active:
            break
        some, theirs = [found.families[i] for i in active], [scores[i] for i in active]
        if recipe.allocation == "explicit":
            kept = explicit(found.families, active, named_table(recipe), recipe.sparsity, multiple)
            labels = gone(some, theirs, kept)
        else:
            labels, kept = meet(some, theirs, wanted, recipe.allocation, multiple, case.counted[wanted.quantity])
        counts = dict(zip(active, kept, strict=True))
        picked = list(scores)
        if combine is not None:  # how many go is known: which of them go best together?
            for i, count in counts.items():
                picked[i] = combine.chosen(i, scores[i], count)
            labels = gone([found.families[i] for i in active], [picked[i] for i in active], kept)
        proof = case.prove(labels, quick=True)
        if proof.proven:
            break
        # A family that cannot be cut fails in every way to mend the whole: it is found sooner by itself.
        failing = _failing(case, picked, counts)
        left.update(failing)
        if not failing and (proof := case.prove(labels)).proven:
            break
        if not failing:  # each alone is proven, all together are not: nothing is safe
            left.update(dict.fromkeys(active, f"together with others {proof.reason}"))
        active = [i for i in active if i not in left]
    plan = case.plan(wanted, labels, proof, left, multiple)
    plan.origin = origin
    if origin is None and (failed := len(allowed & set(left))):
        more = "1 family that is" if failed == 1 else f"{failed} families that are"
        plan.notes.append(f"{more} left alone here may be cut in the exported program: exported=True (--exported)")
    return plan


def plan_zeros(
    model: nn.Module, recipe: Recipe, *, target: str | Target, example: Any, multiple: int = 8
) -> StructuredPlan:  # fmt: skip
    """The plan that takes exactly the units whose making weights are all zero, with a proof.

    Args:
        recipe: which layers units may be of; it ranks nothing here.
        target: what the zeros were to meet, for the record.

    Raises:
        ModelError: nothing is zero, or the smaller model is not proven to compute what this one does.
    """
    wanted = target if isinstance(target, Target) else Target.parse(target)
    norms = Recipe(method=recipe.method, only=recipe.only, skip=recipe.skip, knobs={"criterion": {"p": 2.0}})
    case = Case(model, norms, example)
    scores, _ = case.scores(model, None, "output")
    active, left = chosen(case.found, norms, model, case.remade)
    zero = [u.gone for i in active for u, s in zip(case.found.families[i].units, scores[i], strict=False) if s == 0]
    if not zero:
        raise ModelError("no unit of this model is zero: nothing can be taken out")
    labels = frozenset[int]().union(*zero)
    proof = case.prove(labels)
    if not proof.proven:
        raise ModelError(f"the smaller model is not proven to compute what the masked one does: {proof.reason}")
    return case.plan(wanted, labels, proof, left, multiple)


def named_table(recipe: Recipe) -> Mapping[str, float]:
    """What the recipe's allocation ``explicit`` says of families by name."""
    return recipe.knobs_of("allocation")["table"] or {}


#: The proof of a plan that cuts nothing.
NOTHING = Proof(False, None, 0.0, (), "")


class Case:
    """A model analysed on an example: what can go together, counted and proven on an awake copy.

    Raises:
        RecipeError: the allocation is not one of families.
        ModelError: the model does not run on the example.
    """

    def __init__(self, model: nn.Module, recipe: Recipe, example: Any) -> None:
        if recipe.allocation not in (*ALLOCATIONS, "explicit"):
            known = ", ".join((*ALLOCATIONS, "explicit"))
            raise RecipeError(f"coupled units are allocated {known}; not '{recipe.allocation}'")
        self.model, self.recipe = model, recipe
        self.args, self.kwargs = inputs(example)
        self._emptied: list[Place] = []
        self._twin, self._args, self._kwargs, traced = waking_twin(model, self.args, self.kwargs, self._trace)
        #: Buffers that the model makes as it runs.
        self.remade = remade(self._twin, lambda: _ran(self._twin, self._args, self._kwargs))
        self._hint: tuple[Mend, ...] = ()
        found = self.found = dependencies(traced)
        bytes_of = {n: t.element_size() for n, t in stored_tensors(model).items()}
        self.counted: dict[str, Callable[[frozenset[int]], int]] = {
            "params": found.parameters,
            "flops": found.flops,
            "bytes": lambda gone: found.parameters(gone, bytes_of),
        }

    def counting(self, wanted: Target) -> Callable[[frozenset[int]], int]:
        """What is left of the target's quantity without some labels.

        Raises:
            RecipeError: it can only be measured.
        """
        if wanted.quantity not in self.counted:
            raise RecipeError(
                f"while a model trains a target is in {', '.join(self.counted)}, which are counted; not {wanted}"
            )
        return self.counted[wanted.quantity]

    def scores(self, source: nn.Module, evidence: Evidence | None, where: str) -> tuple[list[Scores], Combined | None]:
        """A score for every unit of every family, and what made them of whole units; layers are looked for in
        ``source``."""
        recipe, found = self.recipe, self.found
        probes = Probes(found, source, where, recipe.seed)
        each = weight_scores(source, recipe, evidence(probes) if callable(evidence) else evidence or {})
        combine = combined(recipe, each, probes)
        return unit_scores(found, each, where, recipe.allocation == "standardized", combine), combine

    def _trace(self, twin: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Trace:
        twin.eval()
        self._emptied = forget(twin, lambda: _ran(twin, args, kwargs))
        before = _stamps(twin)
        first = trace(twin, args, kwargs)
        # What a first run leaves in buffers shows another path than all later runs take.
        return first if _stamps(twin) == before else trace(twin, args, kwargs)

    def prove(self, labels: frozenset[int], quick: bool = False, draft: bool = False) -> Proof:
        """Whether the model without these labels computes what the masked one does.

        ``quick`` tries few mends; a ``draft`` may hold more mends than it must.
        """
        options: dict[str, Any] = {"hint": self._hint, "fewest": not draft, "dense": self.found.trace.outputs}
        if quick:
            options["tries"] = _FEW
        proof = prove(self._twin, self.found, labels, self._args, self._kwargs, **options)
        if proof.proven:
            self._hint = proof.mends
        return proof

    def plan(
        self, wanted: Target, labels: frozenset[int], proof: Proof, left: Mapping[int, str], multiple: int
    ) -> StructuredPlan:
        """The plan that takes these labels, or none where that is not proven; ``left`` says which families may not."""
        found = self.found
        if not proof.proven:
            labels = frozenset()
        before = {k: f(frozenset()) for k, f in self.counted.items()}
        after = {k: f(labels) for k, f in self.counted.items()}
        notes: list[str] = []
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
            FamilyPlan(f.name, len(f), sum(not u.gone <= labels for u in f.units), left.get(i, ""))
            for i, f in enumerate(found.families)
        ]
        return StructuredPlan(
            self.model,
            self.recipe,
            wanted,
            families,
            found.frozen,
            before,
            after,
            proof,
            notes,
            kept_by_name(found, labels) if labels else {},
            _sizes(found, labels),
            (self.args, self.kwargs),
            self._emptied,
        )


def waking_twin(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    run: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], T],
) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any], T]:
    """An awake copy in float64, or in the model's own dtype where its code does not take float64; and its first run."""
    problem: Exception | None = None
    for convert in (True, False):
        a, k = args, kwargs
        try:
            if convert:
                a, k = doubled(args), doubled(kwargs)
            twin = duplicate(model, _doubles(model) if convert else None)
            if convert:
                twin = twin.double()
            wake(twin)
            return twin, a, k, run(twin, a, k)
        except Exception as error:  # the user's own code
            problem = error
    reason = f"{type(problem).__name__}: {problem}"
    raise ModelError(f"the model cannot be copied and run on the example: {reason}") from problem


def _ran(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """One run that leaves behind what it sets."""
    with torch.no_grad():
        return model(*args, **kwargs)


def _stamps(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Which tensors a model holds, and how often each was written."""
    return {name: (id(tensor), tensor._version) for name, tensor in stored_tensors(model).items()}


def _doubles(model: nn.Module) -> dict[int, Any]:
    """Copies in float64 of the stored tensors by their ids, made in one step; others are left to a deep copy."""
    found: dict[int, Any] = {}
    for tensor in stored_tensors(model).values():
        if type(tensor) in (Tensor, nn.Parameter) and tensor.is_floating_point() and tensor.is_leaf:
            double = tensor.detach().to(torch.float64, copy=True)
            is_parameter = isinstance(tensor, nn.Parameter)
            found[id(tensor)] = nn.Parameter(double, tensor.requires_grad) if is_parameter else double
    return found


def _failing(case: Case, scores: Sequence[Scores], counts: Mapping[int, int]) -> dict[int, str]:
    """Families whose cut cannot be proven beside the others'.

    Families of one place, such as the heads of every block, are tried together, the place that takes most parameters
    first, and are kept if the proof still holds with them. Where it does not, those of one length are tried by
    themselves, until two have failed and none has held.
    """
    found = case.found
    places: dict[str, dict[str, list[int]]] = {}
    for i, count in counts.items():
        family = found.families[i]
        if count < len(family):
            places.setdefault(family.kind.rpartition(":")[0], {}).setdefault(family.kind, []).append(i)

    def labels_of(members: Sequence[int]) -> frozenset[int]:
        return gone([found.families[i] for i in members], [scores[i] for i in members], [counts[i] for i in members])

    everything = {place: [i for members in kinds.values() for i in members] for place, kinds in places.items()}
    left_over = {place: found.parameters(labels_of(members)) for place, members in everything.items()}
    good: list[int] = []
    left: dict[int, str] = {}
    for place in sorted(places, key=lambda p: left_over[p]):
        whole = case.prove(labels_of([*good, *everything[place]]), draft=True)
        if whole.proven:
            good += everything[place]
            continue
        failed: list[str] = []
        held = len(good)
        for members in places[place].values():
            tried = whole
            if len(places[place]) > 1 and (len(failed) < 2 or len(good) > held):
                tried = case.prove(labels_of([*good, *members]), draft=True)
            if tried.proven:
                good += members
            else:
                failed.append(tried.reason)
                left.update(dict.fromkeys(members, tried.reason))
    return left


def _sizes(found: Dependencies, labels: frozenset[int]) -> dict[int, list[int]]:
    """Length of an axis anywhere in the run -> what such axes become, where some change."""
    merged: dict[int, list[int]] = {}
    for sizes in found.sizes(labels).values():
        for old, new in sizes.items():
            known = merged.setdefault(old, [])
            known += [n for n in new if n not in known]
    return merged


def _statistics(found: Dependencies, labels: frozenset[int]) -> bool:
    mask, roots = found.mask(labels), found.trace.labels.roots
    return any(mask[roots(a)].any() for axes in found.trace.statistics.values() for _, a in axes)
