"""Huffman codes: frequent symbols take fewer bits; encoding and decoding run in many streams at once."""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ModelError

_LONGEST = 16  # bits of a code word
_CHUNK = 1024  # symbols of a stream


@dataclass(frozen=True, eq=False)
class Encoded:
    """Symbols as bits.

    Attributes:
        count: how many symbols.
        lengths: ``(symbols,)`` uint8, bits of each symbol's code word; 0 where it does not occur. They say it all: the
            words are canonical, in the order of their lengths, then of their symbols.
        starts: ``(streams,)`` int64, the first bit of every stream of 1024 symbols, so that all are decoded at once.
        data: uint8, the words one after the other, the first bit highest.
    """

    count: int
    lengths: Tensor
    starts: Tensor
    data: Tensor

    def bytes(self) -> int:
        """Bytes of all parts."""
        return sum(t.numel() * t.element_size() for t in (self.lengths, self.starts, self.data))


def code_lengths(counts: Tensor) -> Tensor:
    """Bits of each symbol's word in a Huffman code for these counts.

    >>> code_lengths(torch.tensor([5, 1, 1, 0])).tolist()
    [1, 2, 2, 0]
    """
    found = torch.zeros(counts.numel(), dtype=torch.uint8)
    weights = {s: int(c) for s, c in enumerate(counts.tolist()) if c}
    if len(weights) == 1:
        found[next(iter(weights))] = 1
    while len(weights) > 1:
        heap: list[tuple[int, int, list[int]]] = [(c, s, [s]) for s, c in weights.items()]
        heapq.heapify(heap)
        depth = dict.fromkeys(weights, 0)
        while len(heap) > 1:
            a, b = heapq.heappop(heap), heapq.heappop(heap)
            for s in (*a[2], *b[2]):
                depth[s] += 1
            heapq.heappush(heap, (a[0] + b[0], a[1], a[2] + b[2]))
        if max(depth.values()) <= _LONGEST:
            found[list(depth)] = torch.tensor(list(depth.values()), dtype=torch.uint8)
            break
        weights = {s: (c + 1) // 2 for s, c in weights.items()}  # flatter counts, shorter words
    return found


def encode(symbols: Tensor, count: int) -> Encoded:
    """Encode a vector of symbols below ``count``."""
    symbols = symbols.reshape(-1).long()
    lengths = code_lengths(torch.bincount(symbols, minlength=count))
    words, sizes = _words(lengths)[symbols], lengths.long()[symbols]
    ends = sizes.cumsum(0)
    begins = ends - sizes
    total = int(ends[-1]) if symbols.numel() else 0
    bits = torch.zeros(-(-total // 8) * 8, dtype=torch.uint8)
    for k in range(int(sizes.max()) if symbols.numel() else 0):
        there = sizes > k
        bits[begins[there] + k] = ((words[there] >> (sizes[there] - 1 - k)) & 1).to(torch.uint8)
    data = (bits.view(-1, 8) << torch.arange(7, -1, -1, dtype=torch.uint8)).sum(1, dtype=torch.uint8)
    return Encoded(symbols.numel(), lengths, begins[::_CHUNK].clone(), data)


def decode(encoded: Encoded) -> Tensor:
    """The symbols, int64.

    Raises:
        ModelError: the parts do not belong together.
    """
    count, starts = encoded.count, encoded.starts
    if starts.numel() != -(-count // _CHUNK) or not _complete(encoded.lengths, count):
        raise ModelError("a Huffman code is damaged")
    symbol_of, size_of = _table(encoded.lengths)
    padded = torch.cat([encoded.data.long(), torch.zeros(4, dtype=torch.int64)])
    last = encoded.data.numel() * 8
    out = torch.zeros(starts.numel(), _CHUNK, dtype=torch.int64)
    at = starts.clone()
    for k in range(min(_CHUNK, count)):
        alive = torch.arange(starts.numel()) * _CHUNK + k < count
        place = at[alive]
        if bool(((place < 0) | (place >= last)).any()):
            raise ModelError("a Huffman code is damaged: a stream leaves its data")
        byte = place >> 3
        window = (padded[byte] << 16) | (padded[byte + 1] << 8) | padded[byte + 2]
        prefix = (window >> (24 - _LONGEST - (place & 7))) & (2**_LONGEST - 1)
        out[alive, k] = symbol_of[prefix]
        at[alive] = place + size_of[prefix]
    return out.reshape(-1)[:count]


def _words(lengths: Tensor) -> Tensor:
    """Canonical words."""
    words = torch.zeros(lengths.numel(), dtype=torch.int64)
    word, before = 0, 0
    for size, symbol in sorted((n, s) for s, n in enumerate(lengths.tolist()) if n):
        word <<= size - before
        words[symbol] = word
        word, before = word + 1, size
    return words


def _complete(lengths: Tensor, count: int) -> bool:
    """Whether words of these lengths can be told apart, and there are any where there are symbols."""
    used = lengths[lengths > 0].double()
    return (not count or used.numel() > 0) and float((2.0**-used).sum()) <= 1 and int(lengths.max()) <= _LONGEST


def _table(lengths: Tensor) -> tuple[Tensor, Tensor]:
    """For each run of 16 bits the symbol whose word it begins with, and the word's length."""
    symbol_of, size_of = (torch.zeros(2**_LONGEST, dtype=torch.int64) for _ in range(2))
    for symbol, (word, size) in enumerate(zip(_words(lengths).tolist(), lengths.tolist(), strict=True)):
        if size:
            part = slice(word << (_LONGEST - size), (word + 1) << (_LONGEST - size))
            symbol_of[part], size_of[part] = symbol, size
    return symbol_of, size_of
