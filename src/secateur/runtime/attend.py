"""Attention over a pruned cache, which tells it what entries receive; imported where transformers is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ..errors import ModelError
from .cache import PrunedLayer, updated

#: Under this name transformers knows the attention below.
NAME = "secateur"
#: Queries whose attention is computed at once.
_ROWS = 256
#: What attention may be called with that changes its weights beyond the usual.
_UNUSUAL = {"softcap": "a cap on its logits", "s_aux": "a sink of its own", "position_bias": "a bias by positions"}


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Attention over the entries that there are, after which some leave."""
    if unusual := [name for name in _UNUSUAL if kwargs.get(name) is not None]:
        raise ModelError(
            f"attention in {type(module).__name__} has {_UNUSUAL[unusual[0]]}, which entries cannot leave: "
            "take another model"
        )
    layer: Any = updated.get()
    updated.set(None)
    if layer is None or layer.keys is not key:
        found: tuple[Tensor, Tensor | None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, **kwargs
        )
        return found
    mask = layer.columns(attention_mask)
    window, new = layer.policy.window, query.shape[2]
    watched = layer.policy.attends and not (layer.policy.once and layer.seen > layer.entered)
    received: Tensor | None = None
    out: Tensor | None = None
    if watched:
        start = 0 if window is None else max(0, new - window)
        whole, received = _observed(query, key, value, mask, kwargs.get("scaling"), layer, start)
        out = whole if start == 0 else None
    if out is None:
        wide = mask
        if mask is not None and mask.shape[1] not in (1, query.shape[1]):
            wide = mask.repeat_interleave(query.shape[1] // mask.shape[1], 1)
        out = sdpa_attention_forward(module, query, key, value, wide, **kwargs)[0]
    layer.settle(received, mask)
    return out, None


def _observed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    layer: PrunedLayer,
    start: int,
) -> tuple[Tensor, Tensor]:
    """What the queries from ``start`` on find, ``(batch, queries, heads, width)``, and what entries receive of them."""
    batch, heads, new, width = query.shape
    kv = key.shape[1]
    scale = width**-0.5 if scaling is None else scaling
    grouped = query.view(batch, kv, heads // kv, new, width)
    parts: list[Tensor] = []
    received: Tensor | None = None
    for begin in range(start, new, _ROWS):
        rows = slice(begin, min(new, begin + _ROWS))
        q = grouped[:, :, :, rows] * scale
        logits = (q.flatten(2, 3) @ key.mT).view(*q.shape[:4], key.shape[2]).float()
        if new > 1 and mask is None:
            at = torch.arange(layer.seen - new + rows.start, layer.seen - new + rows.stop, device=key.device)
            logits = logits.masked_fill(layer.position[:, :, None, None] > at[:, None], -torch.inf)
        sees = None
        if mask is not None:
            here = mask[:, :, None, rows]
            if here.dtype == torch.bool:
                logits = logits.masked_fill(~here, torch.finfo(logits.dtype).min)
            else:
                logits = logits + here
            sees = _sees(mask, layer, rows)
        attention = logits.softmax(-1)
        if sees is not None:  # padding asks nothing
            attention = attention * sees[:, :, None, :, None]
        more = layer.policy.received(attention)
        received = more if received is None else received + more
        mixed = attention.to(value.dtype).flatten(2, 3) @ value
        parts.append(mixed.view(*q.shape[:4], value.shape[3]))
    whole = parts[0] if len(parts) == 1 else torch.cat(parts, 3)
    assert received is not None
    return whole.flatten(1, 2).transpose(1, 2).contiguous(), received


def _sees(mask: Tensor, layer: PrunedLayer, rows: slice) -> Tensor:
    """Which queries see themselves, as all do that are no padding: ``(batch, 1 or heads, queries)``."""
    old = layer.length - layer.entered
    own = mask[:, :, rows, old + rows.start : old + rows.stop].diagonal(dim1=-2, dim2=-1)
    return own if own.dtype == torch.bool else own > torch.finfo(own.dtype).min / 2


def configs(model: nn.Module) -> list[Any]:
    """The configs by which modules of a model know how they attend, each once."""
    found = {id(c): c for m in model.modules() if hasattr(c := getattr(m, "config", None), "_attn_implementation")}
    return list(found.values())


@contextmanager
def attending(known: list[Any]) -> Iterator[None]:
    """Models with these configs attend as `_attend` does, inside."""
    before = [(c, c._attn_implementation) for c in known]
    for config, _ in before:
        config._attn_implementation_internal = NAME
    try:
        yield
    finally:
        for config, name in before:
            config._attn_implementation_internal = name
        updated.set(None)


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
