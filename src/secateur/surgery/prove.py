"""The proof: a smaller model computes what the masked one does.

Masked means that everything a removed unit touches is zero. Where zeros would count in a statistic (the mean and
variance of a layer norm, a softmax over heads), the masked model is run with the statistic over what stays, so that
the comparison is exact everywhere.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from ..graph.labels import Array
from ..graph.state import as_before, duplicate
from ..graph.trace import floating, plain_operations, stored_tensors
from ..graph.units import Dependencies
from .shrink import Mend, candidates, exact, kept_by_name, mend, shrink

_SCATTERED = (
    "_softmax", "_log_softmax", "_safe_softmax", "native_layer_norm", "_fused_rms_norm", "native_group_norm",
    "native_batch_norm", "_native_batch_norm_legit", "_batch_norm_with_update", "cudnn_batch_norm",
)  # fmt: skip
_TRIES = 12
#: Floating point operations of one run above which shapes are tried without data first; below, the run is cheaper.
_COSTLY = 1e11


@dataclass(frozen=True)
class Proof:
    """What a comparison of the masked and the smaller model gave.

    Attributes:
        proven: the outputs agree.
        error: largest difference relative to the largest output; None when the smaller model did not run.
        effect: how far masking itself moved the outputs, in the same unit: a proof at no effect says little.
        mends: numbers to change in modules.
        reason: what went wrong, if anything.
    """

    proven: bool
    error: float | None
    effect: float
    mends: tuple[Mend, ...]
    reason: str = ""


def wake(model: nn.Module, seed: int = 0) -> None:
    """Give parameters and statistics that are zero, tiny or all alike random values, in place.

    A batch norm fresh from its constructor, a zero-initialized branch or a layer scale of 1e-6 would make a proof
    pass whatever is wrong behind it.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(like: Tensor, low: float, high: float) -> Tensor:
        x = torch.rand(like.shape, generator=generator, dtype=torch.float64)
        return (low + (high - low) * x).to(like)

    with torch.no_grad():
        for module in model.modules():
            mean, var = getattr(module, "running_mean", None), getattr(module, "running_var", None)
            if isinstance(mean, Tensor) and isinstance(var, Tensor):
                mean.copy_(draw(mean, -0.3, 0.3))
                var.copy_(draw(var, 0.5, 1.5))
        for parameter in model.parameters():
            if not parameter.is_floating_point() or parameter.numel() < 2:
                continue
            least, most = torch.aminmax(parameter)
            if float(most - least) < 1e-3:
                parameter.copy_(draw(parameter, 0.5, 1.5) if parameter.dim() == 1 else draw(parameter, -0.1, 0.1))


def outputs(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Every floating point tensor of one run's output, in evaluation mode."""
    with plain_operations(model):
        return floating(model(*args, **kwargs))


def masked_outputs(
    model: nn.Module, found: Dependencies, gone: Iterable[int], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[Tensor]:
    """Outputs with everything that goes at zero, and statistics over what stays. The model is as before after."""
    gone = np.fromiter(gone, dtype=np.int64)
    tensors = stored_tensors(model)
    lost: dict[int, list[tuple[Tensor, int, Tensor, Tensor]]] = {}
    with torch.no_grad():
        for name, axes in kept_by_name(found, gone).items():
            tensor = tensors[name]
            if not isinstance(tensor, nn.Parameter) or id(tensor) in lost:
                continue
            steps = lost[id(tensor)] = []
            for axis, positions in axes.items():
                out = torch.from_numpy(np.delete(np.arange(tensor.shape[axis]), positions)).to(tensor.device)
                steps.append((tensor, axis, out, tensor.index_select(axis, out)))
                tensor.index_fill_(axis, out, 0)
    try:
        with plain_operations(model), _Kept(found, gone):
            result = model(*args, **kwargs)
    finally:
        with torch.no_grad():
            for steps in lost.values():
                for tensor, axis, out, before in reversed(steps):
                    tensor.index_copy_(axis, out, before)
    return floating(result)


class _OtherPath(Exception):
    """What the trace says of operations by number does not hold for this run."""


class _NoProof(Exception):
    """There is nothing that a smaller model could be compared with."""


class _Kept(TorchDispatchMode):
    """Takes statistics over the positions that stay."""

    def __init__(self, found: Dependencies, gone: Array) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._found, self._gone, self._count = found, found.mask(gone.tolist()), -1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._count += 1
        known = self._found.trace.sequence
        if self._count >= len(known) or known[self._count] != str(func):
            raise _OtherPath("the masked model takes another path through the code than the dense one")
        noted = self._found.trace.statistics.get(self._count, ())
        kept: dict[int, Tensor] = {}
        for axis, labels in noted:
            stays = ~self._gone[self._found.trace.labels.roots(labels)]
            if not stays.all():
                kept[axis] = torch.from_numpy(np.flatnonzero(stays))
        if not kept:
            return func(*args, **kwargs)
        name = str(func).removeprefix("aten.").split(".")[0]
        x = args[0]
        small = x
        for axis, positions in kept.items():
            small = small.index_select(axis, positions.to(x.device))
        rest = list(args[1:])
        if name in ("native_layer_norm", "_fused_rms_norm"):
            start = x.dim() - len(rest[0])
            rest[0] = list(small.shape[start:])
            for i in (1, 2):
                if i < len(rest) and isinstance(rest[i], Tensor):
                    for axis, positions in kept.items():
                        rest[i] = rest[i].index_select(axis - start, positions.to(x.device))
        elif name == "native_group_norm":
            per = x.shape[1] // rest[5]
            groups = len(torch.unique(kept[1] // per))
            rest[:2] = [r if r is None else r.index_select(0, kept[1].to(x.device)) for r in rest[:2]]
            rest[3], rest[5] = small.shape[1], groups
        out = func(small, *rest, **kwargs)
        if name not in _SCATTERED:
            return out
        first = out if isinstance(out, Tensor) else out[0]
        for axis, positions in kept.items():
            shape = list(first.shape)
            shape[axis] = x.shape[axis]
            first = first.new_zeros(shape).index_copy_(axis, positions.to(x.device), first)
        return first if isinstance(out, Tensor) else (first, *out[1:])


class _Trial:
    """One cut, against which ways to mend are tried; the masked model runs when a smaller one first does."""

    def __init__(
        self,
        model: nn.Module,
        found: Dependencies,
        gone: frozenset[int],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        dense: list[Tensor],
    ) -> None:
        self.model, self.found, self.gone, self.args, self.kwargs, self.dense = model, found, gone, args, kwargs, dense
        self.kept = kept_by_name(found, gone)

    @cached_property
    def small(self) -> nn.Module:
        """The smaller model before anything is mended."""
        copy = twin(self.model)
        shrink(copy, self.kept, ())
        return copy

    @cached_property
    def empty(self) -> bool:
        """Whether shapes are worth trying without data first: a run is long, and the model runs without data.

        A model that looks at values does not.
        """
        return self.found.flops() > _COSTLY and _shapes_fail(self.model, {}, (), self.args, self.kwargs) is None

    @cached_property
    def masked(self) -> list[Tensor]:
        """Outputs with everything that goes at zero.

        Raises:
            _NoProof: there is nothing to compare with.
        """
        try:
            masked = masked_outputs(self.model, self.found, self.gone, self.args, self.kwargs)
        except _OtherPath as problem:
            raise _NoProof(str(problem)) from None
        except Exception as problem:  # the model's own code, where zeros or statistics over less are not expected
            said = f"{type(problem).__name__}: {first_line(problem)}"
            raise _NoProof(f"the masked model does not run: {said}") from None
        if not any(x.numel() for x in masked):
            raise _NoProof("the run gives no floating point output to compare")
        if not all(bool(torch.isfinite(x).all()) for x in masked):
            raise _NoProof("the masked model's output is not finite")
        return masked

    def attempt(self, mends: tuple[Mend, ...]) -> Proof:
        try:
            if self.empty:
                problem = _shapes_fail(self.model, self.kept, mends, self.args, self.kwargs)
                if problem is not None:
                    raise problem
            with as_before(self.small, buffers=True):
                mend(self.small, mends)
                result = outputs(self.small, self.args, self.kwargs)
        except Exception as problem:  # the model's own code, on sizes it may not expect
            return Proof(False, None, 0.0, mends, f"{type(problem).__name__}: {first_line(problem)}")
        masked = self.masked
        scale = max((float(x.abs().max()) for x in masked if x.numel()), default=0.0) or 1.0
        effect = distance(self.dense, masked, scale) or 0.0
        tolerance = 1e-9
        if self.found.trace.low_precision:
            tolerance = 2e-5 if all(x.dtype == torch.float64 for x in masked) else 2e-4
        error = distance(result, masked, scale)
        if error is not None and error <= tolerance:
            return Proof(True, error, effect, mends)
        why = "its outputs have other shapes" if error is None else f"it computes something else (off by {error:.1e})"
        return Proof(False, error, effect, mends, why)


def prove(
    model: nn.Module,
    found: Dependencies,
    gone: Iterable[int],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    tries: int = _TRIES,
    hint: Sequence[Mend] = (),
    fewest: bool = True,
    dense: list[Tensor] | None = None,
) -> Proof:
    """Compare the masked model with a smaller copy, trying the numbers that its modules may have to change.

    Args:
        model: the very model that ``found`` was traced on, best in float64 and awake (`wake`); not changed.
        tries: how many ways to mend are tried.
        hint: mends of another proof on this model; numbers of their kinds are tried first.
        fewest: leave out mends without which the proof holds as well.
        dense: the model's own `outputs`, where they are known.

    Returns:
        The first proof that holds, or the last that did not.
    """
    trial = _Trial(model, found, frozenset(gone), args, kwargs, dense or outputs(model, args, kwargs))
    failed = Proof(False, None, 0.0, (), "nothing was tried")
    try:
        for mends in itertools.islice(_choices(model, found, trial.gone, hint), tries):
            tried = trial.attempt(mends)
            if tried.proven:
                return _fewer(model, tried, trial.attempt) if fewest else tried
            if failed.error is None:
                failed = tried
    except _NoProof as problem:
        return Proof(False, None, 0.0, (), str(problem))
    return failed


def _fewer(model: nn.Module, proof: Proof, attempt: Callable[[tuple[Mend, ...]], Proof]) -> Proof:
    """Leave out mends without which the proof is as exact: a number may equal a size by chance.

    Those of a class are left out together first: a class that only describes the model reads none of its numbers.
    """
    kinds = [k for k in dict.fromkeys(_kinds(model, proof.mends)) if not getattr(k[0], "keeps_sizes", False)][:_TRIES]
    for owner in dict.fromkeys(kind[0] for kind in kinds):
        own = [kind for kind in kinds if kind[0] is owner]
        for some in [own, *([kind] for kind in own if len(own) > 1)]:
            left = tuple(m for m, k in zip(proof.mends, _kinds(model, proof.mends), strict=True) if k not in some)
            tried = attempt(left)
            if tried.proven and (tried.error or 0.0) <= 10 * max(proof.error or 0.0, 1e-14):
                proof = tried
                if some is own:
                    break
    return proof


def _kinds(model: nn.Module, mends: Sequence[Mend]) -> list[tuple[type, str, int | None]]:
    """What is decided alike in all modules of a class: the class, the attribute, and the item of it."""
    modules = dict(model.named_modules())
    return [(type(modules[m.module]), m.attribute, m.item) for m in mends]


def twin(model: nn.Module, meta: bool = False) -> nn.Module:
    """A copy that shares the tensors, which `shrink` replaces and an evaluation only reads; or one without data."""
    memo: dict[int, Any] = {}
    for tensor in stored_tensors(model).values():
        new = tensor
        if meta:
            new = tensor.detach().to("meta")
            new = nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
        memo[id(tensor)] = new
    return duplicate(model, memo)


def _shapes_fail(
    model: nn.Module,
    kept: Mapping[str, Mapping[int, Array]],
    mends: Sequence[Mend],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Exception | None:
    """Run the smaller model without data, which costs little: what goes wrong, if anything does.

    Of a model that itself runs without data, that is its shapes.
    """
    small = twin(model, meta=True)
    on_meta = tree_map(lambda x: x.to("meta") if isinstance(x, Tensor) else x, (list(args), dict(kwargs)))
    try:
        shrink(small, kept, mends)
        with torch.device("meta"):
            outputs(small, *on_meta)
    except Exception as problem:  # the model's own code
        return problem
    return None


def _choices(
    model: nn.Module, found: Dependencies, gone: frozenset[int], hint: Sequence[Mend]
) -> Iterator[tuple[Mend, ...]]:
    """Ways to mend: those of the hint, all numbers that equal a changed size, then with some left as they are.

    A number is decided alike in all modules of a class, so that there are few ways.
    """
    options, sure = candidates(model, found, gone), exact(model, found, gone)
    modules = dict(model.named_modules())
    groups: dict[tuple[type, str, int | None], list[list[Mend]]] = {}
    for (name, _, attribute, item), mends in options.items():
        groups.setdefault((type(modules[name]), attribute, item), []).append(mends)
    if not groups:
        yield sure
        return
    keys = list(groups)
    ranks = [[*range(max(len(m) for m in groups[k])), None] for k in keys]
    done = set()

    def chosen(choice: Sequence[int | None]) -> tuple[Mend, ...]:
        picked = [*sure]
        for key, rank in zip(keys, choice, strict=True):
            if rank is not None:
                picked += [m[min(rank, len(m) - 1)] for m in groups[key]]
        return tuple(picked)

    first: list[int | None] = [0] * len(keys)
    alone = [[*first[:i], r, *first[i + 1 :]] for i in range(len(keys)) for r in ranks[i][1:]]
    told = set(_kinds(model, hint))
    hinted: list[list[int | None]] = [[0 if k in told else None for k in keys]] if told else []
    for choice in itertools.chain(hinted, [first], alone, [[None] * len(keys)], itertools.product(*ranks)):
        key = tuple(choice)
        if key not in done:
            done.add(key)
            yield chosen(choice)


def first_line(problem: Exception) -> str:
    """What an exception says, cut to one line."""
    lines = str(problem).strip().splitlines()
    return lines[0][:200] if lines else ""


def distance(a: Sequence[Tensor], b: Sequence[Tensor], scale: float) -> float | None:
    """The largest difference of outputs over ``scale``; None where their shapes differ."""
    if len(a) != len(b) or any(x.shape != y.shape for x, y in zip(a, b, strict=True)):
        return None
    if not all(bool(torch.isfinite(x).all()) for x in a):
        return float("inf")
    return (
        max((float((x.double() - y.double()).abs().max()) for x, y in zip(a, b, strict=True) if x.numel()), default=0.0)
        / scale
    )


def doubled(value: Any) -> Any:
    """Floating point tensors of a nested value in float64."""
    return tree_map(lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, value)
