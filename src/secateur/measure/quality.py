"""Held-out quality."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import DataError, NumericalError


@dataclass(frozen=True)
class Perplexity:
    """A perplexity with everything that it depends on.

    ``tokens`` is the number of predicted tokens; windows do not overlap (``stride == length``), and
    the first token of each is context only.
    """

    value: float
    tokens: int
    windows: int
    length: int
    stride: int
    text: str
    sha256: str
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def perplexity(
    model: Any, ids: Tensor, *, text: str = "", sha256: str = "", batch: int = 2, tick: Callable[[], None] | None = None
) -> Perplexity:
    """``exp`` of the mean negative log-likelihood over all windows.

    Args:
        model: a causal language model called with ``input_ids`` that returns ``logits``.
        ids: int64 ``(windows, length)``.
        batch: windows per forward pass.
        tick: called after each window.

    Raises:
        DataError: fewer than two tokens in a window.
        NumericalError: the logits are not finite.
    """
    if ids.dim() != 2 or ids.shape[1] < 2 or ids.shape[0] == 0:
        raise DataError("perplexity needs at least one window of at least two tokens")
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    start = time.perf_counter()
    lost = 0.0
    try:
        for rows in ids.to(device).split(batch):
            logits = model(input_ids=rows, use_cache=False).logits
            for row, logit in zip(rows, logits, strict=True):
                lost += float(F.cross_entropy(logit[:-1].float(), row[1:], reduction="sum"))
                if tick is not None:
                    tick()
    finally:
        model.train(training)
    tokens = ids.shape[0] * (ids.shape[1] - 1)
    if not math.isfinite(lost):
        raise NumericalError("the model's logits are NaN or infinite on the evaluation text")
    value = math.exp(min(lost / tokens, 700.0))
    return Perplexity(
        value, tokens, ids.shape[0], ids.shape[1], ids.shape[1], text, sha256, time.perf_counter() - start
    )
