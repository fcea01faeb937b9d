"""secateur's side of the zoo: plan, shrink, and checks that are written here and take nothing from its proof.

The check zeroes, in a float64 copy, what the plan says goes, and compares with a float64 copy of the smaller model, on
other inputs than those of the plan. Where normalizations run over removed channels, zeros count in their mean and
variance, so the masked copy is run a second time with every normalization module reading the channels that stay alone.
"""

from __future__ import annotations

import contextlib
import copy
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from zoo_models import Case

from secateur.errors import SecateurError

TARGET = "params 50%"
#: Largest difference of outputs, relative to the largest output: in float64, where code of some models computes
#: parts in float32 all the same, and in float32 for models that do not run in float64.
EXACT, COARSE = 1e-5, 1e-3


def run(case: Case, say: Callable[..., None]) -> dict[str, Any]:
    """Everything that is recorded of one model; ``say`` reports what is known so far."""
    from secateur.recipe import Recipe
    from secateur.structured import plan_structured

    say(stage="build")
    model = case.build(0)
    wake(model)
    example = case.inputs(0)
    call(model, case.inputs(1))
    before = count(model)
    say(stage="plan", params=[before, before])
    begun = time.perf_counter()
    plan = plan_structured(model, Recipe.of("magnitude"), target=TARGET, example=example)
    seconds = {"plan": time.perf_counter() - begun}
    cut = sum(f.kept < f.units for f in plan.families)
    known: dict[str, Any] = {
        "families": {"all": len(plan.families), "cut": cut, "left alone": sum(bool(f.reason) for f in plan.families)},
        "notes": list(plan.notes),
        "left": dict(Counter(f.reason for f in plan.families if f.reason).most_common(3)),
    }
    if not plan.kept:
        return {**known, "seconds": seconds, **nothing(plan)}
    say(stage="shrink", **known)
    begun = time.perf_counter()
    small = plan.shrink()
    seconds["shrink"] = time.perf_counter() - begun
    known |= {"seconds": seconds, "params": [before, count(small)], "proof": vars_of(plan.proof)}
    say(stage="check", **known)
    wrong = []
    if not plan.proof.proven:
        wrong.append("it was cut without a proof")
    if known["params"][1] != plan.after["params"]:
        wrong.append(f"the plan says {plan.after['params']} parameters, it has {known['params'][1]}")
    statistics = any("normalizations" in note for note in plan.notes)
    known["check"] = compared(model, small, plan.kept, case.inputs(1), statistics)
    if known["check"]["kind"] == "differs":
        wrong.append(f"it computes something else than the masked model, off by {known['check']['error']:.1e}")
    say(stage="gradients", **known)
    known["gradients"] = gradients(model, small, case.inputs(1))
    say(stage="save and load", **known)
    known["saved"] = saved(case, small, case.inputs(1))
    wrong += [f"{k}: {known[k]}" for k in ("gradients", "saved") if known[k] != "ok"]
    gone = 1 - known["params"][1] / before
    outcome = "wrong" if wrong else "smaller" if gone >= 0.25 else "little"
    return {**known, "outcome": outcome, "reason": "; ".join(wrong)}


def nothing(plan: Any) -> dict[str, str]:
    """What a plan that cuts nothing says about it; it must give reasons, and refuse to shrink."""
    reasons = Counter(f.reason for f in plan.families if f.reason) + Counter(plan.frozen.values())
    said = [f"{reason} ({n} times)" for reason, n in reasons.most_common(2)]
    with contextlib.suppress(SecateurError):
        plan.shrink()
        return {"outcome": "wrong", "reason": "nothing is cut, and shrink() does not say so"}
    outcome = "refused" if said and plan.notes else "wrong"
    return {"outcome": outcome, "reason": "; ".join(["nothing is cut", *plan.notes, *said])}


def vars_of(proof: Any) -> dict[str, Any]:
    return {"proven": proof.proven, "error": proof.error, "effect": proof.effect, "mends": len(proof.mends)}


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def wake(model: nn.Module) -> None:
    """Random values for statistics, and for parameters that a constructor leaves at one value, in place.

    Else a batch norm of zero mean, a branch whose last layer is zero or a layer scale of 1e-6 would hide what is wrong.
    """
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not tensor.is_floating_point() or tensor.numel() < 2:
                continue
            x = torch.rand(tensor.shape, generator=generator)
            if name.endswith("running_mean"):
                tensor.copy_(x - 0.5)
            elif name.endswith("running_var"):
                tensor.copy_(x + 0.5)
            elif isinstance(tensor, nn.Parameter) and float(tensor.max() - tensor.min()) < 1e-3:
                tensor.copy_(x + 0.5 if tensor.dim() == 1 else 0.2 * (x - 0.5))


def call(model: nn.Module, inputs: Any) -> list[Tensor]:
    """All outputs in floating point, but for caches."""
    return tensors(model(**inputs) if isinstance(inputs, Mapping) else model(inputs))


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, Mapping):
        value = [v for k, v in value.items() if k not in ("cache", "past_key_values", "cache_params", "state")]
    return [t for v in value for t in tensors(v)] if isinstance(value, (list, tuple)) else []


def doubled(inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return {k: doubled(v) for k, v in inputs.items()}
    return inputs.double() if isinstance(inputs, Tensor) and inputs.is_floating_point() else inputs


def distance(a: list[Tensor], b: list[Tensor]) -> float:
    """Largest difference relative to the largest value of ``b``; infinite where shapes differ or a value is NaN."""
    if [x.shape for x in a] != [x.shape for x in b]:
        return float("inf")
    scale = max(float(x.abs().max()) for x in b) or 1.0
    worst = max(float((x.double() - y.double()).abs().max()) for x, y in zip(a, b, strict=True)) / scale
    return worst if worst == worst else float("inf")


@torch.no_grad()
def compared(
    model: nn.Module, small: nn.Module, kept: Mapping[str, Any], inputs: Any, statistics: bool
) -> dict[str, Any]:
    """How the smaller model differs from the masked one, and how it was compared.

    ``exact``: they agree. ``norms``: they agree when normalization modules of the masked model read what stays alone.
    ``statistics``: neither, but statistics over removed channels may be the cause; the library's proof stands alone.
    ``differs``: wrong.
    """
    wide, narrow, inputs_of, tolerance = copied(model).double(), copied(small).double(), doubled, EXACT
    try:
        dense = call(wide, doubled(inputs))
    except Exception:  # the model's own code does not take float64
        wide, narrow, inputs_of, tolerance = copied(model), small, lambda x: x, COARSE
        dense = call(wide, inputs)
    result = call(narrow, inputs_of(inputs))
    zero(wide, kept)
    masked = call(wide, inputs_of(inputs))
    found = {"error": distance(result, masked), "effect": distance(dense, masked), "kind": "exact"}
    found["dtype"] = "float64" if tolerance == EXACT else "float32"
    if found["error"] <= tolerance:
        return found
    if not statistics:
        return {**found, "kind": "differs"}
    with contextlib.suppress(RuntimeError, TypeError, IndexError), norms_over(wide, kept):
        masked = call(wide, inputs_of(inputs))
        if (error := distance(result, masked)) <= tolerance:
            return {**found, "error": error, "effect": distance(dense, masked), "kind": "norms"}
    return {**found, "kind": "statistics"}


def zero(model: nn.Module, kept: Mapping[str, Any]) -> None:
    """Set to zero what goes of every parameter, in place."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        for axis, positions in kept.get(name, {}).items():
            goes = torch.ones(parameter.shape[axis], dtype=torch.bool)
            goes[torch.as_tensor(positions)] = False
            parameter.data.movedim(axis, 0)[goes] = 0


@contextlib.contextmanager
def norms_over(model: nn.Module, kept: Mapping[str, Any]) -> Iterator[None]:
    """Normalization modules of which channels go compute over those that stay, and give zero for the others."""
    changed = []
    try:
        for name, module in model.named_modules():
            own = dict(module.named_parameters(recurse=False))
            cuts = [kept.get(f"{name}.{n}", {}).get(0) for n in own]
            simple = own and "norm" in type(module).__name__.lower() and all(p.dim() == 1 for p in own.values())
            if not simple or isinstance(module, nn.modules.batchnorm._NormBase) or any(c is None for c in cuts):
                continue
            module.forward = over(module, own, torch.as_tensor(cuts[0]))  # type: ignore[method-assign]
            changed.append(module)
        yield
    finally:
        for module in changed:
            del module.forward


def copied(model: nn.Module) -> nn.Module:
    """A copy without what modules have kept of earlier runs, such as biases gathered once for each device."""
    kept = [
        value
        for module in model.modules()
        for name, value in vars(module).items()
        if type(value) is dict
        and value
        and not name.startswith("_")
        and all(isinstance(x, Tensor) for x in value.values())
    ]
    return copy.deepcopy(model, {id(value): {} for value in kept})


def over(module: nn.Module, own: Mapping[str, nn.Parameter], keep: Tensor) -> Callable[..., Tensor]:
    """The forward pass of a normalization over some of its channels."""
    small: Any = copy.deepcopy(module)
    size = len(next(iter(own.values())))
    for name, parameter in own.items():
        setattr(small, name, nn.Parameter(parameter.detach()[keep]))
    if hasattr(small, "normalized_shape"):
        small.normalized_shape = (len(keep),)
    if isinstance(small, nn.GroupNorm):
        small.num_groups, small.num_channels = len(torch.unique(keep // (size // small.num_groups))), len(keep)
    first = isinstance(module, nn.GroupNorm) or "2d" in type(module).__name__
    axis = 1 if first or getattr(module, "data_format", "") == "channels_first" else getattr(module, "channel_dim", -1)

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = small(x.index_select(axis, keep), *args, **kwargs)
        shape = list(y.shape)
        shape[axis] = size
        return y.new_zeros(shape).index_copy_(axis, keep, y)

    return forward


def gradients(model: nn.Module, small: nn.Module, inputs: Any) -> str:
    """Whether every parameter of the smaller model has a finite gradient where it has one in the dense model."""
    reached = []
    for which in (model, small):
        which.zero_grad()
        with torch.enable_grad():
            torch.stack([x.square().mean() for x in call(which, inputs)]).sum().backward()
        found = {n: p.grad for n, p in which.named_parameters()}
        reached.append({n: g is not None and bool(g.isfinite().all()) for n, g in found.items()})
        which.zero_grad()
    lost = [n for n, fine in reached[0].items() if fine and not reached[1].get(n)]
    return f"no finite gradient for {lost[0]} and {len(lost) - 1} others" if lost else "ok"


@torch.no_grad()
def saved(case: Case, small: nn.Module, inputs: Any) -> str:
    """Whether a fresh model, with other random weights, computes the very same after loading what was saved."""
    from secateur.structured import load, save

    with tempfile.TemporaryDirectory() as folder:
        path = save(small, Path(folder) / "model")
        loaded = load(path, case.build(1)).eval()
    pairs = zip(call(small, inputs), call(loaded, inputs), strict=True)
    same = all(torch.allclose(a, b, rtol=0, atol=0, equal_nan=True) for a, b in pairs)
    return "ok" if same else "the loaded model computes something else"
