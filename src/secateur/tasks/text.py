"""Ready tasks on the texts that ship with the package."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..data import CALIBRATION, EVALUATION, read_text
from ..errors import DataError
from ..registry import register
from .arrays import batched
from .base import Task, adamw
from .nets import TextTransformer

_PERIODS = 4
_WORD = re.compile(r"[a-z]+|\d+|[^\w\s]")


def _passages(words: list[int], length: int, stride: int) -> list[list[int]]:
    return [words[k : k + length] for k in range(0, len(words) - length + 1, stride)]


@register("task", name="text-encoder")
def text_encoder(
    *, length: int = 64, words: int = 2000, width: int = 64, depth: int = 2, epochs: int = 8, batch: int = 32
) -> Task:
    """Which of four periods between 1946 and 2021 a passage of a State of the Union address is from, by a transformer.

    The first four fifths of every address are for training and validation, the last fifth is the test. Words beyond
    the most frequent ones of the training part are one unknown word.

    Choose it for encoders in the manner of BERT, without a download.

    Beware: small: passages of one address are alike, so validation is easier than the test.

    Source: the addresses as they ship with the package; Vaswani et al., arXiv 1706.03762, for the network, with the
    normalization in front.
    """
    documents = [t for source in (CALIBRATION, EVALUATION) for t in read_text(source).split("\n\n") if t.strip()]
    cut = [_WORD.findall(text.lower()) for text in documents]
    first = [d[: int(0.8 * len(d))] for d in cut]
    last = [d[int(0.8 * len(d)) :] for d in cut]
    known = {w: k + 1 for k, (w, _) in enumerate(Counter(w for d in first for w in d).most_common(words))}

    def examples(parts: list[list[str]], stride: int) -> tuple[Tensor, Tensor]:
        rows, labels = [], []
        for number, part in enumerate(parts):
            found = _passages([known.get(w, 0) for w in part], length, stride)
            rows += found
            labels += [number * _PERIODS // len(parts)] * len(found)
        if not rows:
            raise DataError(f"no address has a passage of {length} words: ask for a shorter length")
        return torch.tensor(rows), torch.tensor(labels)

    # Passages for training do not overlap: a passage that is held out shares no word with them.
    batches = batched(examples(first, length), examples(last, length), batch)
    return Task(
        lambda seed: TextTransformer(len(known) + 1, length, _PERIODS, width, depth, causal=False),
        batches, optimizer=adamw, epochs=epochs,
    )  # fmt: skip


def next_character(model: nn.Module, batch: Any) -> Tensor:
    """Mean over positions of the loss of the next character, in nats."""
    inputs, targets = batch
    return nn.functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


def bits_per_character(model: nn.Module, batches: Iterable[Any]) -> float:
    """The same in bits, over all batches."""
    total, count = 0.0, 0
    for batch in batches:
        total += float(next_character(model, batch)) * batch[1].numel()
        count += batch[1].numel()
    if count == 0:
        raise DataError("a metric needs at least one batch")
    return total / count / math.log(2)


@register("task", name="char-lm")
def char_lm(
    *, characters: int = 230000, length: int = 64, width: int = 64, depth: int = 3, epochs: int = 5, batch: int = 8
) -> Task:
    """The next character of State of the Union addresses, by a causal transformer; measured in bits, lower is better.

    Trained and validated on addresses of 1946 to 1989, tested on those of 1991 to 2021.

    Choose it for language models in small, without a download.

    Beware: the transformer reads 64 characters, so it learns spelling and short phrases: about 2.4 bits as it is set.

    Source: the addresses as they ship with the package; Vaswani et al., arXiv 1706.03762, for the network.
    """
    text = read_text(CALIBRATION)[:characters]
    known = {c: k for k, c in enumerate(sorted(set(text)))}

    def windows(found: str) -> tuple[Tensor, Tensor]:
        ids = torch.tensor([known.get(c, known[" "]) for c in found])
        count = (len(ids) - 1) // length
        if count < 1:
            raise DataError(f"{len(found)} characters are less than one window of {length}: ask for more")
        return ids[: count * length].reshape(-1, length), ids[1 : count * length + 1].reshape(-1, length)

    return Task(
        lambda seed: TextTransformer(len(known), length, len(known), width, depth, causal=True),
        batched(windows(text), windows(read_text(EVALUATION)), batch),
        loss=next_character, metric=bits_per_character, optimizer=partial(adamw, rate=5e-3), epochs=epochs,
        metric_name="bits per character", higher_is_better=False,
    )  # fmt: skip
