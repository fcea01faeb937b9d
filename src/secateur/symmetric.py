"""Products of symmetric matrices at half the price: only the blocks on and above the diagonal are computed."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_LEAF = 144  # a smaller block costs more in calls than its half saves


def upper_blocks(size: int, leaf: int = _LEAF) -> Iterator[tuple[int, int, int, int]]:
    """Blocks ``(top, bottom, left, right)`` that cover the upper triangle once, by halving.

    Those on the diagonal are square with ``top == left``; the others lie wholly above it.

    >>> list(upper_blocks(4, leaf=2))
    [(0, 2, 2, 4), (0, 2, 0, 2), (2, 4, 2, 4)]
    """
    spans = [(0, size)]
    while spans:
        a, b = spans.pop()
        if b - a <= leaf:
            yield a, b, a, b
            continue
        middle = (a + b) // 2
        yield a, middle, middle, b
        spans += [(middle, b), (a, middle)]


def add_gram(gram: Tensor, x: Tensor) -> None:
    """Add ``x^T x`` to the upper blocks of ``gram`` in place; ``x`` is ``(n, i)``, ``gram`` ``(i, i)``."""
    for top, bottom, left, right in upper_blocks(gram.shape[0]):
        gram[top:bottom, left:right].addmm_(x[:, top:bottom].t(), x[:, left:right])


def mirror(gram: Tensor) -> None:
    """Copy the upper blocks of ``gram`` below the diagonal, in place."""
    for top, bottom, left, right in upper_blocks(gram.shape[0]):
        if top != left:
            gram[left:right, top:bottom] = gram[top:bottom, left:right].t()


def quadratic(rows: Tensor, gram: Tensor) -> float:
    """``trace(rows @ gram @ rows^T)`` of a symmetric ``gram``."""
    total = 0.0
    for top, bottom, left, right in upper_blocks(gram.shape[0]):
        part = float(((rows[:, top:bottom] @ gram[top:bottom, left:right]) * rows[:, left:right]).sum())
        total += part if top == left else 2 * part
    return total


def invert_upper(upper: Tensor, leaf: int = 64) -> Tensor:
    """The inverse of an upper triangular matrix, by halving: a third of the work of solving for the identity."""
    size = upper.shape[0]
    if size <= leaf:
        identity = torch.eye(size, dtype=upper.dtype, device=upper.device)
        solved: Tensor = torch.linalg.solve_triangular(upper, identity, upper=True)
        return solved
    middle = size // 2
    inverse = torch.zeros_like(upper)
    inverse[:middle, :middle] = first = invert_upper(upper[:middle, :middle], leaf)
    inverse[middle:, middle:] = last = invert_upper(upper[middle:, middle:], leaf)
    inverse[:middle, middle:] = (first @ upper[:middle, middle:] @ last).neg_()
    return inverse
