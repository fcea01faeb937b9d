"""What can be pruned: every weight of a model seen as matrices ``(output features, input features)``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from .errors import DataError, ModelError, NumericalError, RecipeError
from .select import is_finite

_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True, eq=False)
class Layer:
    """One prunable matrix of a model.

    Attributes:
        name: path of the module, or of the parameter where a module holds several matrices;
            experts stored in one 3-D parameter are ``path.3`` for the fourth.
        kind: ``linear``, ``conv``, ``conv-transpose``, ``embedding``, ``conv1d-hf`` or ``expert``.
        module: the module that holds the parameter.
        parameter: name of the parameter in the module.
        index: the expert, or None.
        transposed: the stored matrix is ``(input, output)``; so is an embedding, whose input is one-hot.
    """

    name: str
    kind: str
    module: nn.Module
    parameter: str
    index: int | None = None
    transposed: bool = False

    @property
    def stored(self) -> Tensor:
        """The parameter itself, or the expert's slice of it; shares memory with the model."""
        whole: Tensor = getattr(self.module, self.parameter)
        return whole if self.index is None else whole.detach()[self.index]

    @property
    def shape(self) -> tuple[int, int]:
        """``(o, i)``: kernel positions are folded into ``i``; for a grouped convolution ``i`` is one group's."""
        stored = self.stored
        o = self._outputs()
        return (o, stored.numel() // max(o, 1))

    def _outputs(self) -> int:
        stored = self.stored
        if self.kind == "conv-transpose":
            return int(stored.shape[1]) * int(getattr(self.module, "groups", 1))
        return int(stored.shape[1] if self.transposed else stored.shape[0])

    @property
    def numel(self) -> int:
        return self.stored.numel()

    def to_oi(self, stored: Tensor) -> Tensor:
        """Rearrange a tensor of the stored shape (a weight, a gradient, a mask) into ``(o, i)``."""
        if self.kind == "conv-transpose":
            groups = int(getattr(self.module, "groups", 1))
            i, o = stored.shape[:2]
            return stored.reshape(groups, i // groups, o, -1).permute(0, 2, 1, 3).reshape(groups * o, -1)
        return stored.t() if self.transposed else stored.reshape(stored.shape[0], -1)

    def from_oi(self, matrix: Tensor) -> Tensor:
        """The inverse of `to_oi`."""
        stored = self.stored
        if self.kind == "conv-transpose":
            groups = int(getattr(self.module, "groups", 1))
            i, o = stored.shape[:2]
            return matrix.reshape(groups, o, i // groups, -1).permute(0, 2, 1, 3).reshape(stored.shape)
        return matrix.t() if self.transposed else matrix.reshape(stored.shape)

    def weight(self) -> Tensor:
        """The weight as ``(o, i)``, detached, in float32 or better; shares memory where it can."""
        weight = self.to_oi(self.stored.detach())
        return weight if weight.dtype in (torch.float32, torch.float64) else weight.float()

    @torch.no_grad()
    def write(self, weight_oi: Tensor) -> None:
        """Store ``weight_oi`` in place, in the parameter's dtype."""
        self.stored.copy_(self.from_oi(weight_oi.to(self.stored.dtype)))

    @torch.no_grad()
    def redraw(self, generator: torch.Generator) -> None:
        """New weights, normal with the root mean square of those that are there and not zero."""
        stored = self.stored
        spread = (stored.float().square().sum() / stored.count_nonzero().clamp_min(1)).sqrt()
        drawn = torch.randn(stored.shape, generator=generator, device=generator.device)
        stored.copy_(drawn.to(spread) * spread)

    def gradient(self) -> Tensor:
        """The parameter's gradient as ``(o, i)``, in float32 or better."""
        whole = getattr(self.module, self.parameter).grad
        if whole is None:
            raise ModelError(f"{self.name} received no gradient: is it used by the loss, and does it require grad?")
        gradient = self.to_oi((whole if self.index is None else whole[self.index]).detach())
        return gradient if gradient.dtype == torch.float64 else gradient.float()

    def check_finite(self) -> None:
        """Raise `NumericalError`, naming the layer, when a weight is NaN or infinite."""
        if not is_finite(self.stored.detach()):
            raise NumericalError(f"{self.name} has NaN or infinite weights; repair the model before pruning it")


def axis_sums(tensor: Tensor) -> dict[int, Tensor]:
    """For each axis the sums over all others, in float64.

    >>> axis_sums(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))[0].tolist()
    [3.0, 7.0]
    """
    axes = range(tensor.dim())
    wide = tensor.detach().double()
    return {a: wide.sum([d for d in axes if d != a]) if len(axes) > 1 else wide for a in axes}


@dataclass(frozen=True)
class Skipped:
    """A parameter that is not pruned, and why."""

    name: str
    numel: int
    reason: str


def _matrices(name: str, module: nn.Module) -> tuple[list[Layer], list[Skipped]]:
    """The matrices that one module holds itself (not its children)."""
    layers: list[Layer] = []
    skipped: list[Skipped] = []
    for key, parameter in module.named_parameters(recurse=False):
        path = f"{name}.{key}" if name else key
        if parameter.dim() < 2 or 1 in (parameter.numel(), parameter.dim()):
            skipped.append(Skipped(path, parameter.numel(), "a vector (bias or normalization)"))
        elif key == "weight" and isinstance(module, nn.Linear):
            layers.append(Layer(name or key, "linear", module, key))
        elif key == "weight" and isinstance(module, _CONV):
            layers.append(Layer(name or key, "conv", module, key))
        elif key == "weight" and isinstance(module, _TRANSPOSED):
            layers.append(Layer(name or key, "conv-transpose", module, key))
        elif key == "weight" and isinstance(module, nn.Embedding):
            layers.append(Layer(name or key, "embedding", module, key, transposed=True))
        elif key == "weight" and type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
            layers.append(Layer(name or key, "conv1d-hf", module, key, transposed=True))
        elif parameter.dim() == 3 and "expert" in f"{path} {type(module).__name__}".lower() and "bias" not in key:
            transposed = bool(getattr(module, "is_transposed", False))
            layers += [Layer(f"{path}.{e}", "expert", module, key, e, transposed) for e in range(parameter.shape[0])]
        elif parameter.dim() == 2 and "bias" not in key:
            layers.append(Layer(path, "bare", module, key))
        else:
            reason = f"a bare {parameter.dim()}-D parameter of {type(module).__name__}, whose axes are not known"
            skipped.append(Skipped(path, parameter.numel(), reason))
    return layers, skipped


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, p) or fnmatchcase(name, f"*.{p}") for p in patterns)


#: Kinds that are pruned only when ``only`` names them, with the reason that the report gives.
_ON_REQUEST = {
    "embedding": "an embedding",
    "bare": "a bare 2-D parameter (a router or a table)",
}


def find_layers(
    model: nn.Module,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    inside: Iterable[str] | None = None,
) -> tuple[list[Layer], list[Skipped]]:
    """Every matrix to prune, in the model's order, and every parameter that is left alone, with the reason.

    Args:
        model: any module. A parameter that appears twice (tied) is seen once, at its first place.
        only: globs over layer names (``*.q_proj``); what they name is pruned, nothing else.
        skip: globs over layer names that are left alone.
        inside: paths of the repeated blocks; without ``only``, layers outside them are left alone.

    Raises:
        RecipeError: a glob names nothing, or nothing is left to prune.
    """
    layers: list[Layer] = []
    skipped: list[Skipped] = []
    unnamed = {*only, *skip}
    prefixes = None if inside is None else tuple(f"{p}." for p in inside)
    tied = _tied(model)
    first = {n for n, _ in model.named_parameters()}  # where a tied parameter is met first
    seen: set[tuple[int, int | None]] = set()
    for path, module in model.named_modules():
        found, left = _matrices(path, module)
        skipped += [s for s in left if s.name in first]
        for layer in found:
            stored = getattr(layer.module, layer.parameter)
            mark = (id(stored), layer.index)
            if mark in seen:
                continue
            seen.add(mark)
            unnamed -= {p for p in unnamed if _matches(layer.name, (p,))}
            reason = None
            if _matches(layer.name, skip):
                reason = "skipped by --skip"
            elif only:
                reason = None if _matches(layer.name, only) else "not named by --only"
            elif layer.kind in _ON_REQUEST:
                reason = f"{_ON_REQUEST[layer.kind]}; name it with --only to prune it"
            elif id(stored) in tied:
                reason = f"tied to {tied[id(stored)]}; name it with --only to prune both"
            elif prefixes is not None and not f"{layer.name}.".startswith(prefixes):
                reason = "outside the repeated blocks; name it with --only to prune it"
            if reason is None:
                layers.append(layer)
            else:
                skipped.append(Skipped(layer.name, layer.numel, reason))
    if unnamed:
        names = ", ".join(f"'{p}'" for p in sorted(unnamed))
        raise RecipeError(f"no layer is named {names}; list the layers with 'secateur plan MODEL'")
    if not layers:
        raise RecipeError("nothing is left to prune: every parameter is skipped (see 'secateur plan MODEL')")
    return layers, skipped


def located(model: nn.Module) -> Iterator[tuple[Layer, str, int]]:
    """Every layer, the first name of its parameter, and the axis of that on which its outputs lie.

    >>> [(name, output) for _, name, output in located(nn.Sequential(nn.Linear(2, 3), nn.ConvTranspose2d(2, 3, 1)))]
    [('0.weight', 0), ('1.weight', 1)]
    """
    names = {id(p): n for n, p in model.named_parameters()}
    for layer in find_layers(model)[0]:
        output = int(layer.transposed or layer.kind == "conv-transpose") + int(layer.index is not None)
        yield layer, names[id(getattr(layer.module, layer.parameter))], output


def _tied(model: nn.Module) -> dict[int, str]:
    """Parameters that more than one module holds: id -> the places."""
    places: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            places.setdefault(id(parameter), []).append(f"{path}.{key}" if path else key)
    return {k: " and ".join(v) for k, v in places.items() if len(v) > 1}


@contextmanager
def settling(model: nn.Module) -> Iterator[None]:
    """Batch norms that have seen no batch yet normalize by the batch inside; those that have, as they do outside.

    The statistics of a fresh batch norm, mean 0 and variance 1, are of nothing: an evaluation by them would be of
    another network than the one that is trained. What the batches do to them is for the caller to undo.

    Raises:
        DataError: a batch has one value for each channel.
    """
    fresh = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and _is_fresh(m)]
    modes = [(m, m.training) for m in fresh]
    hooks = [m.register_forward_pre_hook(_refuse_single) for m in fresh]
    for m in fresh:
        m.training = True
    try:
        yield
    finally:
        for m, training in modes:
            m.training = training
        for hook in hooks:
            hook.remove()


def _is_fresh(norm: nn.Module) -> bool:
    mean, var, seen = (getattr(norm, n, None) for n in ("running_mean", "running_var", "num_batches_tracked"))
    if mean is None or var is None:
        return False
    return not (seen is not None and bool(seen)) and not bool(mean.any()) and bool((var == 1).all())


def _refuse_single(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
    if args and args[0].dim() > 1 and args[0].numel() == args[0].shape[1]:
        raise DataError(
            "a batch norm that has seen no batch yet normalizes by this one, which has a single value for each "
            "channel: give batches of two examples or more"
        )


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; every module is in its own mode again afterwards."""
    modes = [(m, m.training) for model in models for m in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
