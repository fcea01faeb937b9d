"""Padding: what a mask of attention says where all that it says is which tokens are none."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..errors import DataError, ModelError

#: What is added to the attention that must not be is this or less; models add -10,000, or the least number there is.
_NEVER = -1e4


def padding(mask: Tensor, batch: int, tokens: int) -> Tensor | None:
    """Which tokens of a batch are not padding, ``(batch, tokens)``, or None where a mask says anything else.

    Args:
        mask: as ``scaled_dot_product_attention`` takes it: bool, True attends; or numbers that are added.

    >>> padding(torch.tensor([[[[True, True, False]]]]), 1, 3).tolist()
    [[True, True, False]]
    >>> padding(torch.ones(1, 1, 3, 3).tril().bool(), 1, 3) is None
    True
    """
    if mask.dim() > 4 or mask.shape[-1] != tokens:
        return None
    seen = mask if mask.dtype == torch.bool else mask == 0
    if mask.dtype != torch.bool and not bool((seen | (mask <= _NEVER)).all()):
        return None
    while seen.dim() < 4:
        seen = seen[None]
    row = seen[:, :1, :1]  # (batch or 1, 1, 1, tokens)
    if len(row) not in (1, batch) or not bool((seen == row).all()):
        return None
    return row[:, 0, 0].expand(batch, tokens)


def sizes(valid: Tensor) -> Tensor | None:
    """How many tokens each stands for before any has left: 1, and 0 for padding; None where there is no padding.

    Raises:
        ModelError: an input is padding from end to end.
    """
    if bool(valid.all()):
        return None
    if bool((empty := ~valid.any(1)).any()):
        raise ModelError(f"input {int(empty.nonzero()[0])} of the batch is all padding: leave it out")
    return valid.float()


def told(call: Iterable[Any], valid: Tensor) -> list[Tensor]:
    """Those of the model's inputs that say which tokens are padding: ones, and zeros where it is."""
    found = []
    for x in tree_leaves(call):
        if isinstance(x, Tensor) and x.shape == valid.shape and bool(((x == valid) & ((x == 0) | (x == 1))).all()):
            found.append(x)
    return found


def unpadded(batch: Any, ids: Tensor) -> Tensor:
    """Token ids of texts of one length.

    Raises:
        DataError: the batch says that some of them are padding.
    """
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if isinstance(mask, Tensor) and not bool(mask.bool().all()):
        raise DataError(
            "texts of the data are padded, and what is continued must be text: give windows of one length, without "
            "padding"
        )
    return ids
