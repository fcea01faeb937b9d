"""Plan the removal of experts: what each is worth, and the proof that closing them and taking them out is one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError, RecipeError
from ..graph.trace import plain_operations
from ..measure.flops import flops
from ..recipe import Recipe
from ..registry import get
from ..surgery.experts import EXPERTS, Mixture, mixtures, prove_experts
from ..surgery.prove import outputs
from .choose import globbed
from .make import NOTHING, waking_twin
from .plan import inputs
from .score import weight_scores
from .targets import Target
from .whole import Piece, WholePlan, totals


def plan_experts(
    model: nn.Module,
    recipe: Recipe,
    *,
    target: str | Target,
    example: Any,
    batches: Sequence[Any] = (),
    run: Callable[[nn.Module, Any], Any],
    evidence: Mapping[str, Any] | None = None,
) -> WholePlan:
    """Take the least of the experts out of every mixture, the same number everywhere, until the target.

    Args:
        example: inputs of one forward pass.
        batches, run: data that the criterion measures on, and how a model is run on it.
        evidence: layer name -> facts, where the criterion scores single weights; an expert's score is their sum.

    Raises:
        RecipeError: the target is in FLOPs, or the criterion measures routing, and the experts are called with none.
        ModelError: the model does not run on the example.
    """
    wanted = target if isinstance(target, Target) else Target.parse(target)
    if wanted.quantity == "flops":
        raise RecipeError(
            "a token goes to as many experts as before, so FLOPs stay: give a target in params, bytes or memory"
        )
    args, kwargs = inputs(example)
    known, odd = mixtures(model)
    left: dict[Piece, str] = {(path, -1): why for path, why in odd.items()}
    free: dict[str, list[int]] = {}
    for path, mixture in known.items():
        held = {k: why for k in range(mixture.count) if (why := globbed(recipe, [path, f"{path}.{k}"]))}
        if len(held) < mixture.count:
            free[path] = [k for k in range(mixture.count) if k not in held]
            left.update({(path, k): why for k, why in held.items()})
        else:
            left[path, -1] = held[0]
    before = totals(model, flops(model, *args, **kwargs).total)
    notes: list[str] = []
    score = _scores(model, recipe, {p: known[p] for p in free}, batches, run, evidence or {}, notes)
    order = {path: sorted(numbers, key=lambda k: float(score[path][k]), reverse=True) for path, numbers in free.items()}

    def going(size: int) -> dict[str, list[int]]:
        return {path: sorted(best[-size:]) for path, best in order.items()} if size else {}

    parameters = dict(model.named_parameters())
    each = [(parameters[n], known[p].count) for p in free for n in known[p].tensors if n in parameters]
    one = sum(t.numel() // count for t, count in each)  # of one expert in every mixture
    size_of_one = sum(t.numel() // count * t.element_size() for t, count in each)

    def counts(size: int) -> dict[str, int]:
        return {
            "params": before["params"] - size * one,
            "flops": before["flops"],  # a token still goes to as many
            "bytes": before["bytes"] - size * size_of_one,
        }

    limit = wanted.remaining(before[wanted.quantity])
    most = min((min(len(best), known[p].count - 1) for p, best in order.items()), default=0)
    due = next((n for n in range(1, most + 1) if counts(n)[wanted.quantity] <= limit), most)
    proof, size, why = NOTHING, due, ""
    if due:
        double, twin_args, twin_kwargs, _ = waking_twin(model, args, kwargs, outputs)
        holds, failed = 0, due + 1  # sizes between which the largest that holds lies
        while failed - holds > 1:
            size = due if failed > due else (holds + failed) // 2
            tried = prove_experts(double, going(size), twin_args, twin_kwargs)
            if tried.proven:
                proof, holds = tried, size
            else:
                why, failed = why or tried.reason, size
        size = holds
    if not known:
        notes.append("no expert can be taken out: " + (next(iter(left.values())) if left else "there are none"))
    elif size < due:
        notes.append(f"{due} experts of each mixture are more than can go: {size} go" + (why and f" ({why})"))
    removed = going(size)
    after = before
    if removed:
        small = EXPERTS.without(model, removed)
        after = totals(small, flops(small, *args, **kwargs).total)
    if known and after[wanted.quantity] > limit:
        notes.append(f"the target is not met: {wanted.quantity} can only go to {after[wanted.quantity]:,} here")
    scores = {(path, k): float(score[path][k]) for path, numbers in free.items() for k in numbers}
    return WholePlan(model, recipe, wanted, EXPERTS, scores, left, removed, before, after, proof, notes, (args, kwargs))


def _scores(
    model: nn.Module,
    recipe: Recipe,
    known: Mapping[str, Mixture],
    batches: Sequence[Any],
    run: Callable[[nn.Module, Any], Any],
    evidence: Mapping[str, Any],
    notes: list[str],
) -> dict[str, Tensor]:
    """Path -> what each expert there is worth; notes say what was not seen."""
    if recipe.criterion is None:
        raise RecipeError("experts are ranked by a criterion: name one with --criterion")
    part = get("criterion", recipe.criterion)
    if part.facts.get("of") == "expert":
        measured = _measure(model, known, batches, run, "expert_gain" in part.needs)
        if unseen := sum(int((facts["expert_tokens"] == 0).sum()) for facts in measured.values()):
            notes.append(f"{unseen} experts were given no token of the data: their scores say little (give more data)")
        return {p: part(measured[p], **recipe.knobs_of("criterion")) for p in known}
    scored = weight_scores(model, recipe, evidence)
    found: dict[str, Tensor] = {}
    for path, mixture in known.items():
        stacks = [scored[n].weights() for n in mixture.tensors if n in scored and n.startswith(f"{path}.")]
        found[path] = torch.stack([s.flatten(1).sum(1) for s in stacks]).sum(0)
    return found


def _measure(
    model: nn.Module,
    known: Mapping[str, Mixture],
    batches: Sequence[Any],
    run: Callable[[nn.Module, Any], Any],
    outputs: bool,
) -> dict[str, dict[str, Any]]:
    """Path -> facts of the experts there, from how they are called on the batches; ``outputs`` runs each by itself."""
    tokens = {p: torch.zeros(m.count, dtype=torch.int64) for p, m in known.items()}
    gain = {p: torch.zeros(m.count, dtype=torch.float64) for p, m in known.items()}
    inside = False

    def seen(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, given: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            nonlocal inside
            if inside:
                return
            call = _Call.read(path, given, kwargs)
            inside = True
            try:
                for k in call.index.unique().tolist():
                    if not 0 <= k < known[path].count:
                        continue  # a place that stands for nobody
                    rows, places = (call.index == k).nonzero(as_tuple=True)
                    tokens[path][k] += len(rows)
                    if not outputs:
                        continue
                    norms = call.alone(module, rows, k).double().norm(dim=-1)
                    gain[path][k] += float((norms * call.weights[rows, places].double()).sum())
            finally:
                inside = False

        return hook

    hooks = [model.get_submodule(p).register_forward_pre_hook(seen(p), with_kwargs=True) for p in known]
    try:
        with plain_operations(model):
            for batch in batches:
                run(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return {p: {"expert_tokens": tokens[p], "expert_gain": (gain[p] / tokens[p].clamp_min(1)).float()} for p in known}


class _Call:
    """How a module of stacked experts is called: hidden states, and for each an index of experts and their weights."""

    def __init__(self, values: list[Any], names: list[str], places: tuple[int, int, int]) -> None:
        self._values, self._names, self._places = values, names, places
        self.hidden, self.index, self.weights = (values[p] for p in places)

    @staticmethod
    def read(path: str, given: Sequence[Any], kwargs: Mapping[str, Any]) -> _Call:
        values = [*given, *kwargs.values()]
        tensors = [(i, x) for i, x in enumerate(values) if isinstance(x, Tensor) and x.dim() == 2]
        index = [i for i, x in tensors if not x.is_floating_point() and x.dtype != torch.bool]
        shape = values[index[0]].shape if len(index) == 1 else None
        weights = [i for i, x in tensors if x.is_floating_point() and x.shape == shape and i != 0]
        hidden = [
            i for i, x in tensors if x.is_floating_point() and i not in weights and x.shape[0] == (shape or [0])[0]
        ]
        if len(index) != 1 or len(weights) != 1 or len(hidden) != 1:
            raise RecipeError(
                f"{path} is not called with an index of experts and their weights for each token, from which the "
                "routing is measured: rank experts by their weights, e.g. --criterion magnitude"
            )
        return _Call(values, list(kwargs), (hidden[0], index[0], weights[0]))

    def alone(self, module: nn.Module, rows: Tensor, expert: int) -> Tensor:
        """What one expert makes of these rows, not weighted: the module itself, told to send all of them there."""
        values = list(self._values)
        hidden, index, weights = self._places
        values[hidden] = self.hidden[rows]
        values[index] = self.index.new_full((len(rows), 1), expert)
        values[weights] = self.weights.new_ones((len(rows), 1))
        split = len(values) - len(self._names)
        output: Any = module(*values[:split], **dict(zip(self._names, values[split:], strict=True)))
        if not isinstance(output, Tensor) or output.shape != values[hidden].shape:
            raise ModelError(f"{type(module).__name__} does not return a hidden state for each token")
        return output
