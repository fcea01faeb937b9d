"""Products of symmetric matrices at half the price: only the blocks on and above the diagonal are computed."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .errors import NumericalError

_LEAF = 144  # a smaller block costs more in calls than its half saves
_CHUNK = 2048  # blocks of a block-diagonal matrix that are worked on at a time, in float64


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


def in_blocks(fisher_blocks: Tensor, *matrices: Tensor) -> Iterator[tuple[list[Tensor], Tensor]]:
    """Parts of matrices ``(o, i)`` as the Fisher's blocks cut them, ``(p, b)``, padded with zeros, and the blocks."""
    blocks, block, _ = fisher_blocks.shape
    flat = [
        torch.nn.functional.pad(m.reshape(-1), (0, blocks * block - m.numel())).view(blocks, block) for m in matrices
    ]
    for a in range(0, blocks, _CHUNK):
        yield [m[a : a + _CHUNK] for m in flat], fisher_blocks[a : a + _CHUNK].double()


def among(fisher: Tensor, stays: Tensor) -> Tensor:
    """Blocks of which only the rows and columns that stay are left; the others become those of the identity."""
    s = stays.to(fisher.dtype)
    return fisher * s[:, :, None] * s[:, None, :] + torch.diag_embed(1 - s)


def factor(matrix: Tensor) -> Tensor:
    """Lower Cholesky factors of blocks.

    Raises:
        NumericalError: a block is not positive definite.
    """
    lower, info = torch.linalg.cholesky_ex(matrix)
    if int(info.max()):
        raise NumericalError(
            "a block of the Fisher is not positive definite: raise fisher_damp, or scale the loss down"
        )
    found: Tensor = lower
    return found
