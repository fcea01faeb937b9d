"""``nn.MultiheadAttention`` as what it is made of, so that its keys can be seen."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch import bool as bool_
from torch.nn.functional import linear, multi_head_attention_forward

from ..errors import ModelError

_NAMES = tuple(inspect.signature(multi_head_attention_forward).parameters)
_LIMITS = ("attn_mask", "is_causal")
_UNKNOWN = ("bias_k", "bias_v", "add_zero_attn", "use_separate_proj_weight", "static_k", "static_v")


def packed_arguments(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of ``multi_head_attention_forward`` by name; those that are at their defaults may be missing."""
    return {**dict(zip(_NAMES, args, strict=False)), **kwargs}


def is_limited(given: Mapping[str, Any]) -> bool:
    """Whether there is a mask other than one of padding, or causality."""
    return any(given.get(name) is not None and given.get(name) is not False for name in _LIMITS)


def padding_mask(given: Mapping[str, Any]) -> Tensor | None:
    """The mask of padding as ``scaled_dot_product_attention`` takes it, ``(batch, 1, 1, tokens)``."""
    mask: Tensor | None = given.get("key_padding_mask")
    if mask is None:
        return None
    return (~mask if mask.dtype == bool_ else mask)[:, None, None]


def attend_packed(given: Mapping[str, Any], attend: Callable[[dict[str, Any]], Tensor]) -> tuple[Tensor, None]:
    """Self-attention by ``attend``, which takes the arguments of ``scaled_dot_product_attention``.

    Raises:
        ModelError: an option of nn.MultiheadAttention that this does not know.
    """
    x = given["query"]
    other = [name for name in _UNKNOWN if given.get(name) is not None and given.get(name) is not False]
    other += [] if given["key"] is x and given["value"] is x else ["other keys than queries"]
    other += ["need_weights"] if given.get("need_weights", True) else []
    if other:
        raise ModelError(f"tokens cannot leave an nn.MultiheadAttention that uses {other[0]}")
    heads = given["num_heads"]
    packed = linear(x, given["in_proj_weight"], given["in_proj_bias"]).unflatten(-1, (3, heads, -1))
    query, key, value = packed.permute(2, 1, 3, 0, 4)  # each (batch, heads, tokens, width of a head)
    dropout = given["dropout_p"] if given.get("training", True) else 0.0
    out = attend(
        {
            "query": query, "key": key, "value": value, "attn_mask": padding_mask(given), "dropout_p": dropout,
            "is_causal": False, "scale": None, "enable_gqa": False,
        }
    )  # fmt: skip
    return linear(out.permute(2, 0, 1, 3).flatten(2), given["out_proj_weight"], given["out_proj_bias"]), None
