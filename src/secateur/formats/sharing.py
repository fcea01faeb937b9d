"""Deep compression: survivors share a few values, and both the values and the gaps between them are Huffman codes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ModelError, RecipeError
from .huffman import Encoded, decode, encode

_GAPS = 5  # bits of a gap before it is encoded


@dataclass(frozen=True, eq=False)
class Shared:
    """A sparse matrix whose survivors take few values.

    Attributes:
        shape: of the matrix.
        values: float32, ascending.
        codes: which value each survivor takes, row by row.
        gaps: zeros before each survivor, 0 to 30; 31 stands for 31 zeros with no survivor behind them.
    """

    shape: tuple[int, int]
    values: Tensor
    codes: Encoded
    gaps: Encoded

    def dense(self) -> Tensor:
        """The matrix, float32.

        Raises:
            ModelError: the parts do not fit each other.
        """
        gaps, codes = decode(self.gaps), decode(self.codes)
        skip = 2**_GAPS - 1
        ends = torch.where(gaps == skip, skip, gaps + 1).cumsum(0)
        place = ends[gaps != skip] - 1
        out = torch.zeros(self.shape[0] * self.shape[1])
        inside = place.numel() == codes.numel() and (not place.numel() or int(place[-1]) < out.numel())
        if not inside or (codes.numel() and int(codes.max()) >= self.values.numel()):
            raise ModelError(f"a shared matrix of {self.shape[0]} x {self.shape[1]} is damaged")
        out[place] = self.values[codes]
        return out.view(self.shape)

    def bytes(self) -> int:
        """Bytes of all parts, as a file holds them."""
        return sum(t.numel() * t.element_size() for t in self.stored().values())

    def stored(self) -> dict[str, Tensor]:
        """What a file keeps; `restored` reads it."""
        out = {"shape": torch.tensor([*self.shape, self.codes.count, self.gaps.count]), "values": self.values}
        for name, part in (("codes", self.codes), ("gaps", self.gaps)):
            out |= {f"{name}.lengths": part.lengths, f"{name}.starts": part.starts, f"{name}.data": part.data}
        return out


@dataclass(frozen=True, eq=False)
class Codebook:
    """Values that the survivors of a matrix share, as a solver returns them in place of a grid.

    Attributes:
        bits: of a code; there are at most ``2^bits`` values.
        values: float32, ascending.
    """

    bits: int
    values: Tensor

    def round(self, weight: Tensor) -> Tensor:
        """The nearest values, float32; what is zero stays zero."""
        if not self.values.numel():
            return torch.zeros_like(weight, dtype=torch.float32)
        nearest = self.values[_nearest(weight.float(), self.values)]
        return torch.where(weight == 0, 0.0, nearest)


def codebook(weight: Tensor, bits: int) -> Codebook:
    """The values that k-means finds for what is not zero in a matrix.

    Raises:
        RecipeError: bits outside 1 to 8.
    """
    check_bits(bits)
    flat = weight.detach().reshape(-1).float()
    return Codebook(bits, cluster(flat[flat != 0], bits)[0])


def restored(tensors: Mapping[str, Tensor]) -> Shared:
    """From what `Shared.stored` gave.

    Raises:
        ModelError: a part is missing.
    """
    try:
        rows, columns, codes, gaps = (int(n) for n in tensors["shape"])
        parts = [
            Encoded(count, *(tensors[f"{name}.{part}"] for part in ("lengths", "starts", "data")))
            for name, count in (("codes", codes), ("gaps", gaps))
        ]
        return Shared((rows, columns), tensors["values"], *parts)
    except (KeyError, ValueError) as error:
        raise ModelError(f"a shared matrix is damaged: {error}") from None


def cluster(values: Tensor, bits: int, rounds: int = 50) -> tuple[Tensor, Tensor]:
    """k-means of numbers on a line: at most ``2^bits`` centers, ascending, and which one each number is nearest to.

    Centers begin evenly spaced between the smallest and the largest number, and no round makes the error larger. Where
    there are no more distinct numbers than centers, they are the centers.

    >>> centers, nearest = cluster(torch.tensor([0.0, 1.0, 9.0, 11.0]), 1)
    >>> centers.tolist(), nearest.tolist()
    ([0.5, 10.0], [0, 0, 1, 1])
    """
    x = values.reshape(-1).double()
    if not x.numel():
        return x.float(), torch.zeros_like(x, dtype=torch.int64)
    distinct, place = torch.unique(x, return_inverse=True)
    if distinct.numel() <= 2**bits:
        return distinct.float(), place
    centers = torch.linspace(float(x.min()), float(x.max()), 2**bits, dtype=torch.float64, device=x.device)
    nearest = _nearest(x, centers)
    for _ in range(rounds):
        count = torch.bincount(nearest, minlength=centers.numel())
        mean = torch.bincount(nearest, x, minlength=centers.numel()) / count.clamp_min(1)
        centers = torch.where(count > 0, mean, centers).sort().values
        moved = _nearest(x, centers)
        if torch.equal(moved, nearest):
            break
        nearest = moved
    used, nearest = torch.unique(nearest, return_inverse=True)
    return centers[used].float(), nearest


def share(weight: Tensor, bits: int = 5) -> Shared:
    """Let the survivors of a matrix share ``2^bits`` values, and encode what is left.

    :: min over c of sum over survivors of min_k (w - c_k)^2;  codes and gaps by Huffman

    Choose it for the smallest file: zeros cost the bits of their gaps, and values the entropy of their codes.

    Beware: for storage; the matrix is decoded before it is used. Values are per matrix, not per group, so at 4 bits a
    language model loses more than by groups of integers.

    >>> share(torch.tensor([[0.0, 3.0], [0.0, -1.0]]), 1).dense().tolist()
    [[0.0, 3.0], [0.0, -1.0]]

    Source: Han, Mao and Dally, Deep compression, arXiv 1510.00149, sections 2 to 4: relative indices, k-means with
    linear initialization, Huffman codes of both. Where a gap is too long the paper stores a zero among the values;
    here a gap of its own says so.
    """
    if weight.dim() != 2 or not weight.is_floating_point() or not bool(weight.isfinite().all()):
        raise RecipeError(f"only finite matrices of floats can be shared, not {tuple(weight.shape)} of {weight.dtype}")
    check_bits(bits)
    flat = weight.detach().to("cpu", torch.float32).reshape(-1)
    place = flat.nonzero()[:, 0]
    values, codes = cluster(flat[place], bits)
    skip = 2**_GAPS - 1
    zeros = torch.diff(place, prepend=torch.tensor([-1])) - 1
    skips = zeros // skip
    gaps = torch.full((int(skips.sum()) + place.numel(),), skip)
    gaps[(skips + 1).cumsum(0) - 1] = zeros % skip
    shape = (weight.shape[0], weight.shape[1])
    return Shared(shape, values, encode(codes, max(1, values.numel())), encode(gaps, skip + 1))


def parse_shared(text: str) -> int:
    """Bits of ``shared:5``; 5 where none are named.

    >>> parse_shared("shared:4"), parse_shared("shared")
    (4, 5)
    """
    found = re.fullmatch(r"shared(?::([1-8]))?", text)
    if found is None:
        raise RecipeError(f"'{text}' is not understood: write shared:5, with 1 to 8 bits of a code")
    return int(found[1] or 5)


def check_bits(bits: int) -> None:
    """Refuse a number of bits that codes of shared values do not have."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 8:
        raise RecipeError(f"bits must be a whole number from 1 to 8, not {bits!r}")


def _nearest(x: Tensor, centers: Tensor) -> Tensor:
    return torch.bucketize(x, (centers[1:] + centers[:-1]) / 2)
