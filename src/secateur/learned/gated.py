"""A gate in a model: for as long as it is trained, a parametrization computes the weight; then nothing is left of it.

The model's ``state_dict`` has the keys of the dense model all the while: hooks rename what torch's parametrization
renames, and what gates learn is not in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..granularity import Granularity
from ..layers import Layer
from .base import Gate, Now

_LISTS = "parametrizations"


def form_of(layer: Layer) -> Layer:
    """The layer without its module: how its matrix lies in the parameter, whatever the module's attribute gives."""
    whole: Tensor = getattr(layer.module, layer.parameter)
    there = {layer.parameter: torch.empty(whole.shape, device="meta"), "groups": getattr(layer.module, "groups", 1)}
    stub: Any = SimpleNamespace(**there)
    return replace(layer, module=stub)


def wide(x: Tensor) -> Tensor:
    """In float32 or better."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


class Trained(nn.Module):
    """What a gate learns, as parameters, and what it fixes for a step, as buffers."""

    def __init__(self, gate: Gate, like: Tensor) -> None:
        super().__init__()
        self.gate = replace(gate, learned={})
        self._names = tuple(gate.learned)
        self._fixed: tuple[str, ...] = ()
        dtype = like.dtype if like.dtype in (torch.float32, torch.float64) else torch.float32
        for name, first in gate.learned.items():
            self.register_parameter(name, nn.Parameter(first.detach().to(like.device, dtype, copy=True)))

    @property
    def learned(self) -> dict[str, Tensor]:
        """What is trained, by name."""
        return {name: getattr(self, name) for name in self._names}

    @property
    def fixed(self) -> dict[str, Tensor]:
        """What holds for this step, by name."""
        return {name: getattr(self, f"fixed_{name}") for name in self._fixed}

    @torch.no_grad()
    def settle(self, weight: Tensor, now: Now) -> None:
        """Compute what holds until the next step."""
        made = self.gate.settle(weight, self.learned, now)
        for name, value in made.items():
            key = f"fixed_{name}"
            known = getattr(self, key, None)
            if known is not None and known.shape == value.shape and known.dtype == value.dtype:
                known.copy_(value)  # in place: a compiled model sees the same tensor
            else:
                self.register_buffer(key, value.detach().clone(), persistent=False)
        self._fixed = tuple(made)


class Gated(Trained):
    """The weight of one matrix under a gate."""

    def __init__(self, gate: Gate, form: Layer, pattern: Granularity, like: Tensor) -> None:
        super().__init__(gate, like)
        self.form, self.pattern = form, pattern

    def forward(self, stored: Tensor) -> Tensor:
        """The effective weight, in the parameter's shape and dtype."""
        return self.form.from_oi(self.effective(stored)).to(stored.dtype)

    def effective(self, stored: Tensor) -> Tensor:
        """The effective weight as ``(o, i)``."""
        w = wide(self.form.to_oi(stored))
        if self.gate.weight is not None:
            return self.gate.weight(w, self.learned, self.fixed, self.training)
        assert self.gate.factor is not None
        factor = self.gate.factor(self.learned, self.fixed, self.training)
        return w * spread(factor, self.pattern, self.form.shape)


def spread(x_pu: Tensor, pattern: Granularity, shape: tuple[int, int]) -> Tensor:
    """A number of each unit on all of its weights, ``(o, i)``."""
    return pattern.unpool(x_pu, shape)


class Stacked(nn.Module):
    """A parameter that holds several matrices, of which some are gated."""

    def __init__(self, gated: Mapping[int, Gated]) -> None:
        super().__init__()
        self.gated = nn.ModuleDict({str(k): m for k, m in gated.items()})

    def forward(self, stored: Tensor) -> Tensor:
        """The effective weights, stacked as they were."""
        parts = list(stored.unbind(0))
        for k, gated in self.gated.items():
            parts[int(k)] = gated(parts[int(k)])
        return torch.stack(parts)


class Along(nn.Module):
    """A parameter whose positions along one axis are multiplied by the gates of units of the whole model.

    Args:
        units: shared by all parameters that the units touch.
        axis: of the parameter.
        places: ``(units, positions of each)`` along it.
    """

    def __init__(self, units: Trained, axis: int, places: Tensor) -> None:
        super().__init__()
        self.units, self.axis = units, axis
        self.register_buffer("places", places.reshape(-1), persistent=False)
        self._each = places.shape[1]

    def forward(self, stored: Tensor) -> Tensor:
        """The parameter times its gates."""
        gate = self.units.gate.factor
        assert gate is not None
        factor = gate(self.units.learned, self.units.fixed, self.units.training)[0]
        return self.times(wide(stored), factor).to(stored.dtype)

    def times(self, weight: Tensor, factor: Tensor) -> Tensor:
        """The parameter times a number for each unit."""
        places: Any = self.places
        line = torch.ones(weight.shape[self.axis], dtype=weight.dtype, device=weight.device)
        line = line.index_copy(0, places, factor.to(weight.dtype).repeat_interleave(self._each))
        return weight * line.reshape([-1 if a == self.axis else 1 for a in range(weight.dim())])


class Insertion:
    """Parametrizations put into a model, and how it was before."""

    def __init__(self, inserted: Iterable[tuple[nn.Module, str, nn.Module]]) -> None:
        self._places: list[tuple[nn.Module, str]] = []
        self._order: dict[nn.Module, tuple[str, ...]] = {}
        self._handles: list[Any] = []
        for module, name, gate in inserted:
            if module not in self._order:
                self._order[module] = tuple(module._parameters)
            if (module, name) not in self._places:
                self._places.append((module, name))
            parametrize.register_parametrization(module, name, gate, unsafe=True)
        for module, order in self._order.items():
            lists: Any = getattr(module, _LISTS)
            lists.order = order  # goes with the module where it is copied
            saved: Any = module._register_state_dict_hook(_saved)
            loaded = module.register_load_state_dict_pre_hook(_loaded)
            self._handles += [saved, loaded]

    def plain(self) -> list[tuple[nn.Parameter, list[Any]]]:
        """The parameter behind each place, and the parametrizations in front of it."""
        found = []
        for module, name in self._places:
            lists: Any = getattr(module, _LISTS)[name]
            found.append((lists.original, [m for k, m in lists.named_children()]))
        return found

    def remove(self) -> None:
        """Take everything out: modules, parameters and hooks are those of before."""
        for handle in self._handles:
            handle.remove()
        for module, name in self._places:
            parametrize.remove_parametrizations(module, name, leave_parametrized=False)
        for module, order in self._order.items():
            for name in order:
                module._parameters[name] = module._parameters.pop(name)


def _own(module: nn.Module, prefix: str) -> Callable[[str], str | None]:
    """The dense name of a key under ``prefix``: of a weight under a gate its own, of what belongs to gates None."""
    lists: Any = getattr(module, _LISTS)
    there = {f"{prefix}{_LISTS}.{name}.original": f"{prefix}{name}" for name in lists}
    inner = f"{prefix}{_LISTS}."
    return lambda key: there.get(key) if key.startswith(inner) else key


def _saved(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Rename what was just saved of a module, in the order that it has without gates."""
    dense, lists = _own(module, prefix), getattr(module, _LISTS)
    found = {}
    for key in [k for k in state if k.startswith(prefix)]:
        value = state.pop(key)
        if (name := dense(key)) is not None:
            found[name] = value
    for name in lists.order:
        if (key := f"{prefix}{name}") in found:
            state[key] = found.pop(key)
    state.update(found)


def _loaded(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Rename what is about to be loaded; what gates have learned stays as it is."""
    lists: Any = getattr(module, _LISTS)
    for name in lists:
        if (key := f"{prefix}{name}") in state:
            state[f"{prefix}{_LISTS}.{name}.original"] = state.pop(key)
    for name, tensor in lists.state_dict(prefix=f"{prefix}{_LISTS}.").items():
        if not name.endswith(".original"):
            state.setdefault(name, tensor)
