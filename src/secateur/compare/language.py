"""Held-out text of a language model: two splits, and what is lost on which kind of token."""

from __future__ import annotations

import math
import unicodedata
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data import Windows, digest
from ..errors import DataError, NumericalError

#: Kinds of tokens, in the order in which they are tried.
KINDS = ("space and marks", "numbers", "names and first words", "whole words", "ends of words")


@dataclass(frozen=True, eq=False)
class Held:
    """Windows ``(n, length)`` for validation and for the test: the first third and the rest, which do not overlap."""

    valid: Tensor
    test: Tensor
    hashes: tuple[str, str]

    @staticmethod
    def of(text: Windows) -> Held:
        """Raises:
        DataError: fewer than three windows.
        """
        cut = len(text) // 3
        if cut == 0:
            raise DataError(
                f"{len(text)} held-out windows cannot be cut into validation and test: ask for three or more"
            )
        valid, test = text.ids[:cut], text.ids[cut:]
        return Held(valid, test, (digest(valid)[:16], digest(test)[:16]))


@dataclass(frozen=True, eq=False)
class Losses:
    """Negative log-likelihoods in nats of predicted tokens, and which tokens they were; both ``(n,)``."""

    nats: Tensor
    tokens: Tensor

    @property
    def count(self) -> int:
        return self.nats.numel()

    @property
    def perplexity(self) -> float:
        return math.exp(min(float(self.nats.double().mean()), 700.0))

    def by_kind(self, kinds: Tensor) -> dict[str, float]:
        """Perplexity of the tokens of each kind that occurs."""
        found, own = {}, kinds[self.tokens]
        for k, name in enumerate(KINDS):
            if bool((at := own == k).any()):
                found[name] = math.exp(min(float(self.nats[at].double().mean()), 700.0))
        return found


@torch.no_grad()
def losses(model: Any, ids: Tensor, batch: int = 2) -> Losses:
    """The loss of every token but the first of each window.

    Raises:
        NumericalError: the logits are not finite.
    """
    device = next(model.parameters()).device
    found = []
    model.eval()
    for rows in ids.to(device).split(batch):
        logits = model(input_ids=rows, use_cache=False).logits[:, :-1].float()
        found.append(F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="none").cpu())
    nats = torch.cat(found)
    if not bool(torch.isfinite(nats).all()):
        raise NumericalError("the model's logits are NaN or infinite on the held-out text")
    return Losses(nats, ids[:, 1:].flatten().cpu())


def kinds_of_tokens(tokenizer: Any, vocabulary: int) -> Tensor:
    """The kind of each token, by its text: indices into `KINDS`, int64 ``(vocabulary,)``."""
    pieces = tokenizer.convert_ids_to_tokens(list(range(min(vocabulary, len(tokenizer)))))
    found = torch.zeros(vocabulary, dtype=torch.long)
    for k, piece in enumerate(pieces):
        found[k] = kind_of(piece or "")
    return found


def kind_of(piece: str) -> int:
    """The kind of a token as a byte-level or sentence-piece tokenizer writes it.

    >>> [KINDS[kind_of(x)] for x in ("Ġhouse", "Ġ1", "ing", ".", "ĠParis")]
    ['whole words', 'numbers', 'ends of words', 'space and marks', 'names and first words']
    """
    begins = piece[:1] in ("Ġ", "▁", " ")  # a space before it, in one spelling or another
    text = piece.lstrip("Ġ▁ Ċ")
    if not text or not any(c.isalnum() for c in text):
        return 0
    if all(unicodedata.category(c).startswith("N") for c in text):
        return 1
    if text[0].isupper():
        return 2
    return 3 if begins else 4
