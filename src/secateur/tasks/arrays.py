"""Batches of tensors in memory: splits, orders."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import DataError
from .base import Split

#: Seed of the validation split: the same in every run, whatever its seed.
_SPLIT = 20231


def hold_out(tensors: Sequence[Tensor], share: float = 0.1) -> tuple[list[Tensor], list[Tensor]]:
    """Cut rows into what is trained on and what is validated on, always the same way.

    >>> [len(part[0]) for part in hold_out([torch.arange(20)])]
    [18, 2]
    """
    count = len(tensors[0])
    held = max(1, round(share * count))
    if held >= count:
        raise DataError(f"{count} examples cannot be cut into training and validation data: give more")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(_SPLIT))
    return [t[order[held:]] for t in tensors], [t[order[:held]] for t in tensors]


def batched(
    train: Sequence[Tensor], test: Sequence[Tensor], size: int, share: float = 0.1
) -> Callable[[Split, int, int], Any]:
    """``batches`` of a task over tensors of rows: a tenth of the training data is for validation.

    The order of the training data follows from the seed and the epoch, and its last, smaller batch is left out.
    """
    part, valid = hold_out(train, share)
    splits = {"train": part, "valid": valid, "test": list(test)}
    if len(part[0]) < size:
        raise DataError(f"{len(part[0])} training examples are less than one batch of {size}: ask for more")

    def batches(split: Split, seed: int = 0, epoch: int = 0) -> _Rows:
        if split not in splits:
            raise DataError(f"a task has train, valid and test data, not '{split}'")
        tensors = splits[split]
        if split != "train":
            return _Rows(tensors, torch.arange(len(tensors[0])).split(500))
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(len(tensors[0]), generator=generator)
        return _Rows(tensors, order[: len(order) // size * size].split(size))

    return batches


class _Rows:
    """Batches that know how many they are."""

    def __init__(self, tensors: Sequence[Tensor], rows: Sequence[Tensor]) -> None:
        self._tensors, self._rows = tensors, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        return (tuple(t[rows] for t in self._tensors) for rows in self._rows)
