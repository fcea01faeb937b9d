"""Distillation: the dense model teaches the pruned one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RecipeError
from ..registry import register
from .stored import Stored
from .training import Loss, Training


@register("recovery", paper="1503.02531", data="task", teacher=True)
def distill(
    run: Training, *, length: float = 0.5, rate: float = 0.1, logits: float = 0.9, temperature: float = 4.0,
    features: float = 0.0, attention: float = 0.0, layers: str = "", mapping: str = "same", top: int = 0,
) -> None:  # fmt: skip
    """Fine-tune to the dense model's outputs beside the labels.

    :: (1 - a) loss + a T^2 KL(softmax(z_dense / T) || softmax(z / T)) + f L_features + b L_attention

    a is ``logits``, f ``features``, b ``attention``. L_features is the mean over layers of
    ``|| h - h_dense ||^2 / || h_dense ||^2``; L_attention compares where a layer is active: the sum over channels of
    the squares, normalized over positions, so that it also works where the smaller model has fewer channels. The
    layers are the repeated blocks, or the model's parts where it has none, or those that the glob ``layers`` names.

    With ``mapping`` "nearest" four of the dense model's layers teach, spread over its depth, each the layer of the
    smaller model whose output is nearest at that step, in order; for models that lost blocks.

    With ``top`` the dense model's outputs are computed once for each example, and of each position the largest ``top``
    logits are kept; all other classes count as one. Then no dense model is needed while a language model trains.

    Choose it for the highest accuracy after pruning when the dense model is at hand: it costs one more forward pass.

    Beware: the teacher is in evaluation mode; for outputs that are no logits set ``logits`` to 0. What lies beyond
    ``top`` is taught as a sum alone, so keep more where many classes are likely.

    Source: Hinton et al., arXiv 1503.02531, section 2, for the logits; Romero et al., FitNets, arXiv 1412.6550, for
    features, here without a regressor and relative; Zagoruyko and Komodakis, arXiv 1612.03928, section 3.1, for
    attention, with the squared distance of the authors' code; Xia et al., CoFi, arXiv 2204.00408, section 3.2, and its
    official code, for the nearest layers, in order from the last to the first, without its learned linear map and with
    relative errors. One class for all that is not stored is our own; that stored logits alone are biased is said in
    Anshumann et al., arXiv 2503.16870 (abstract).
    """
    if not 0 <= logits <= 1 or not temperature > 0 or features < 0 or attention < 0:
        raise RecipeError(
            "recovery 'distill': logits is in [0, 1], temperature above 0, features and attention are not negative"
        )
    run.fit(length, rate=rate, loss=taught(run, logits, temperature, features, attention, layers, mapping, top))


def lessons(run: Training, *, length: float, rate: float, **knobs: Any) -> Loss:
    """The loss of `distill`, by all of its knobs, for a run of another length: while gates are learned."""
    return taught(run, **knobs)


def taught(
    run: Training, logits: float, temperature: float, features: float, attention: float, layers: str,
    mapping: str = "same", top: int = 0,
) -> Loss:  # fmt: skip
    """The loss of `distill`."""
    if mapping not in ("same", "nearest"):
        raise RecipeError(f"recovery 'distill': mapping is same or nearest, not '{mapping}'")
    if top:
        if features or attention:
            raise RecipeError("recovery 'distill': top keeps logits alone; features and attention need all of it")
        return _remembered(run, logits, temperature, top)
    teacher = run.teacher()
    if mapping == "nearest" and (features or attention):
        return _nearest(run, teacher, logits, temperature, features, attention, layers)
    names = chosen_layers(run.model, layers) if features or attention else []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        with outputs(model, names) as own:
            plain = run.loss(model, batch)
        with torch.no_grad(), outputs(teacher, names) as dense:
            run.loss(teacher, batch)
        whole = (1 - logits) * plain
        if logits:
            whole = whole + logits * soft(logits_of(own[""]), logits_of(dense[""]), temperature)
        if features:
            whole = whole + features * _mean([_relative(own[n], dense[n], n) for n in names])
        if attention:
            whole = whole + attention * _mean([(_map(own[n]) - _map(dense[n])).square().sum(-1).mean() for n in names])
        return whole

    return loss


def _remembered(run: Training, logits: float, temperature: float, top: int) -> Loss:
    """The loss with outputs of the teacher that are computed once."""
    given: Stored | None = getattr(run, "stored", None)
    if given is not None and (given.top, given.temperature) != (top, temperature):
        raise RecipeError(
            f"recovery 'distill': the stored teacher keeps {given.top} logits at temperature {given.temperature:g}, "
            f"not {top} at {temperature:g}"
        )
    known = Stored(top, temperature) if given is None else given
    at_hand: list[nn.Module] = []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        with outputs(model, []) as own:
            plain = run.loss(model, batch)
        lesson = known.look(batch)
        if lesson is None:
            teacher = at_hand[0] if at_hand else run.teacher()
            at_hand[:] = [teacher]
            with torch.no_grad(), outputs(teacher, []) as dense:
                run.loss(teacher, batch)
            known.add(batch, logits_of(dense[""]))
            lesson = known.look(batch)
        if lesson is None:
            raise RecipeError("recovery 'distill': top needs batches of examples, with a tensor first")
        return (1 - logits) * plain + logits * known.loss(logits_of(own[""]), lesson)

    return loss


def _nearest(
    run: Training, teacher: nn.Module, logits: float, temperature: float, features: float, attention: float,
    layers: str,
) -> Loss:  # fmt: skip
    """The loss with each of four layers of the teacher matched with the nearest of the smaller model."""
    names = chosen_layers(run.model, layers)
    theirs = spread(chosen_layers(teacher, layers))

    def loss(model: nn.Module, batch: Any) -> Tensor:
        with outputs(model, names) as own:
            plain = run.loss(model, batch)
        with torch.no_grad(), outputs(teacher, theirs) as dense:
            run.loss(teacher, batch)
        with torch.no_grad():
            apart = torch.tensor([[float(_relative(own[n], dense[t], n)) for n in names] for t in theirs])
        pairs = [(names[k], t) for t, k in zip(theirs, aligned(apart), strict=True)]
        whole = (1 - logits) * plain
        if logits:
            whole = whole + logits * soft(logits_of(own[""]), logits_of(dense[""]), temperature)
        if features:
            whole = whole + features * _mean([_relative(own[n], dense[t], n) for n, t in pairs])
        if attention:
            maps = [(_map(own[n]) - _map(dense[t])).square().sum(-1).mean() for n, t in pairs]
            whole = whole + attention * _mean(maps)
        return whole

    return loss


def spread(names: Sequence[str], count: int = 4) -> list[str]:
    """As many of a list, the last of each of its equal parts; all where there are no more.

    >>> spread([str(k) for k in range(12)])
    ['2', '5', '8', '11']
    """
    few = min(count, len(names))
    return [names[(k + 1) * len(names) // few - 1] for k in range(few)]


def aligned(apart_ts: Tensor) -> list[int]:
    """For each layer of the teacher the nearest of the student's, in order: the last first, others before it.

    Where none is left before, the same layer learns from both.

    >>> aligned(torch.tensor([[1.0, 0.0, 2.0], [0.0, 3.0, 1.0]]))
    [0, 0]
    >>> aligned(torch.tensor([[1.0, 0.0, 0.0], [3.0, 3.0, 1.0]]))
    [1, 2]
    """
    last, found = apart_ts.shape[1], list[int]()
    for row in apart_ts.flip(0):
        last = int(row[:last].argmin()) if last > 0 else last
        found.append(last)
    return found[::-1]


def soft(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """``T^2 KL(softmax(teacher / T) || softmax(student / T))``, mean over all but the last axis.

    >>> z = torch.tensor([[1.0, 2.0]])
    >>> float(soft(z, z, 2.0))
    0.0
    """
    log_p = (_wide(student) / temperature).log_softmax(-1)
    log_q = (_wide(teacher) / temperature).log_softmax(-1)
    each = log_q.exp() * (log_q - log_p)
    divergence = torch.where(log_q == -torch.inf, 0.0, each).sum(-1)  # classes that the teacher masks
    return temperature**2 * divergence.mean()


def _wide(x: Tensor) -> Tensor:
    """Float32 where it was less: differences and sums of half precision are of nothing."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def chosen_layers(model: nn.Module, glob: str) -> list[str]:
    """Names of the modules whose outputs are compared."""
    if glob:
        found = [n for n, _ in model.named_modules() if n and fnmatchcase(n, glob)]
        if not found:
            raise RecipeError(f"recovery 'distill': no module is named '{glob}'")
        return found
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    if lists:
        name, longest = max(lists, key=lambda x: len(x[1]))
        return [f"{name}.{k}" if name else str(k) for k in range(len(longest))]
    # Single operations (an activation, a norm) are no parts to compare; blocks of several layers are.
    found = [n for n, m in model.named_children() if sum(1 for x in m.modules() if list(x.parameters(False))) > 1]
    if not found:
        raise RecipeError(
            "recovery 'distill': the model has no repeated blocks to compare: name modules with the knob layers"
        )
    return found


@contextmanager
def outputs(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """What the model (under "") and the modules of that name give while the model runs."""
    seen: dict[str, Any] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            seen[name] = output

        return hook

    handles = [model.get_submodule(n).register_forward_hook(keep(n)) for n in ("", *names)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _first(output: Any) -> Tensor:
    """The tensor that matters of what a module gives."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        output = tuple(output.values())
    if isinstance(output, (tuple, list)):
        for item in output:
            if isinstance(item, Tensor) and item.is_floating_point():
                return item
    raise RecipeError(f"recovery 'distill' compares tensors, and a module gives a {type(output).__name__}")


def logits_of(output: Any) -> Tensor:
    """The logits among what a model gives: those that it calls so, else the first tensor."""
    found = getattr(output, "logits", None)
    return found if isinstance(found, Tensor) else _first(output)


def _relative(own: Any, dense: Any, name: str) -> Tensor:
    h, other = _first(own), _first(dense)
    if h.shape != other.shape:
        raise RecipeError(
            f"recovery 'distill': {name} gives {tuple(h.shape)}, the dense model {tuple(other.shape)} there: features "
            "need equal shapes; use the knob attention"
        )
    h, other = _wide(h), _wide(other)
    return (h - other).square().sum() / other.square().sum().clamp_min(1e-12)


def _map(output: Any) -> Tensor:
    """Where a layer is active ``(n, positions)``: channels are axis 1 of feature maps, the last one of tokens."""
    h = _wide(_first(output))
    if h.dim() < 3:
        raise RecipeError("recovery 'distill': attention compares layers with positions, feature maps or tokens")
    positions = h.square().sum(1 if h.dim() > 3 else -1).flatten(1)
    return nn.functional.normalize(positions, dim=-1)


def _mean(values: list[Tensor]) -> Tensor:
    return torch.stack(values).mean()
