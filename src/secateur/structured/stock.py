"""Smaller transformers models that stock ``from_pretrained`` loads: the config that describes their sizes."""

from __future__ import annotations

import copy
import itertools
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..surgery.prove import outputs

_TRIES = 512


def stock_config(
    model: nn.Module, sizes: Mapping[int, Sequence[int]], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> bool:
    """Give the model, in place, a config from which its own class builds exactly this model; False if there is none.

    No table of field names: every whole number in the config that equals a size which changed may take its new
    value, and the choice that reproduces every shape, and with these weights the very outputs, is the config. There is
    none where layers differ.

    Args:
        model: the smaller model, with the config of the original.
        sizes: old number -> what such sizes, or numbers of layers or experts, have become.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_dict") or not hasattr(model, "save_pretrained"):
        return False
    due = {name: tuple(p.shape) for name, p in model.named_parameters()}
    if _uneven(due, model, config):
        return False
    fields = {k: v for k, v in config.to_dict().items() if type(v) is int and v in sizes}
    options = [(*sizes[v], v) for v in fields.values()]
    for choice in itertools.islice(itertools.product(*options), _TRIES):
        trial = copy.deepcopy(config)
        for field, value in zip(fields, choice, strict=True):
            setattr(trial, field, value)
        try:
            with torch.device("meta"):
                built = type(model)(trial)
            if callable(check := getattr(trial, "validate", None)):
                check()  # as save_pretrained will
        except Exception:  # sizes that do not go together, as the class itself finds
            continue
        if {name: tuple(p.shape) for name, p in built.named_parameters()} == due and same(model, trial, args, kwargs):
            for module in model.modules():
                if getattr(module, "config", None) is config:
                    module.config = trial
            return True
    return False


def _uneven(due: Mapping[str, tuple[int, ...]], model: nn.Module, config: Any) -> bool:
    """Whether tensors of one place in all blocks, alike in the original, no longer are: no whole number says that."""
    try:
        with torch.device("meta"):
            original = type(model)(config)
    except Exception:  # the class itself says no more
        return False
    before: defaultdict[str, set[tuple[int, ...]]] = defaultdict(set)
    after: defaultdict[str, set[tuple[int, ...]]] = defaultdict(set)
    for shapes, found in (({n: tuple(p.shape) for n, p in original.named_parameters()}, before), (due, after)):
        for name, shape in shapes.items():
            found[re.sub(r"(?<=\.)\d+(?=\.)", "#", name)].add(shape)
    return any(len(after[kind]) > len(shapes) for kind, shapes in before.items())


class _Undrawn(TorchFunctionMode):
    """Leaves out random draws: the weights are loaded afterwards."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in ("normal_", "uniform_", "trunc_normal_", "kaiming_uniform_"):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def same(model: nn.Module, config: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a fresh model of the config, given these weights, computes the same."""
    state = model.state_dict()
    with torch.random.fork_rng(), _Undrawn():
        fresh = type(model)(config)
    fresh.to(next(model.parameters()).dtype).load_state_dict(state, strict=False)
    a, b = (outputs(m, args, kwargs) for m in (model, fresh))
    return len(a) == len(b) and all(x.shape == y.shape and torch.allclose(x, y) for x, y in zip(a, b, strict=True))
