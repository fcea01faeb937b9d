"""How much each layer of a block leaves out, such that the block's output changes least."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import evaluating
from ..stream import find_blocks
from .decoder import ids_of
from .sparse import Inputs, patched

#: How much of a block one step leaves out.
_STEP = 0.05


def shares(model: nn.Module, sites: list[Inputs], batch: Any, sparsity: float, step: float = _STEP) -> dict[str, float]:
    """Fractions of each layer, whose mean over the weights of a block is ``sparsity``.

    Each step raises the one fraction by which the block's output, on this batch, changes least; by so much that the
    block as a whole leaves out ``step`` more.
    """
    blocks = find_blocks(model)
    assert blocks is not None
    found: dict[str, float] = {}
    with evaluating(model), torch.no_grad():
        for number in range(len(blocks.modules)):
            path = f"{blocks.path}.{number}"
            mine = [site for site in sites if site.path.startswith(f"{path}.")]
            if mine:
                found |= _greedy(model, path, mine, batch, sparsity, step)
    return found


def _greedy(
    model: nn.Module, path: str, sites: list[Inputs], batch: Any, sparsity: float, step: float
) -> dict[str, float]:
    block = model.get_submodule(path)
    known: list[tuple[Any, Any, Any]] = []
    inputs: dict[str, Tensor] = {}

    def hook(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        known.append((args, kwargs, out))

    handles = [block.register_forward_hook(hook, with_kwargs=True)]
    for site in sites:
        handles.append(site.layer.register_forward_pre_hook(partial(_keep, inputs, site.path)))
    try:
        model(input_ids=ids_of(batch), use_cache=False)  # a cache would grow each time that the block runs
    finally:
        for handle in handles:
            handle.remove()
    args, kwargs, out = known[0]
    wanted = _hidden(out)
    order = {name: x.flatten().sort().values for name, x in inputs.items()}
    total = sum(site.layer.weight.numel() for site in sites)
    weight = {site.path: site.layer.weight.numel() / total for site in sites}
    shares = dict.fromkeys(weight, 0.0)

    def error(trial: Mapping[str, float]) -> float:
        for site in sites:
            rank = int(trial[site.path] * len(order[site.path]) + 0.5)
            site.threshold = float(order[site.path][rank - 1]) if rank else -1.0
        with patched((site.layer, partial(site.run, sparse=False)) for site in sites):
            return float((_hidden(block(*args, **kwargs)) - wanted).float().norm())

    done = 0.0
    while sparsity - done > 1e-9:
        more = min(step, sparsity - done)
        trials = [
            shares | {name: min(1.0, shares[name] + more / weight[name])} for name in shares if shares[name] < 1 - 1e-9
        ]
        shares = min(trials, key=error)
        done = sum(shares[name] * weight[name] for name in shares)
    return shares


def _keep(inputs: dict[str, Tensor], name: str, module: nn.Module, args: Any) -> None:
    inputs[name] = args[0].abs().float()


def _hidden(out: Any) -> Tensor:
    found: Tensor = out[0] if isinstance(out, (tuple, list)) else out
    return found
