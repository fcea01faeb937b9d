"""Integers instead of floats: the grid that weights are rounded to, one for each group of inputs of an output."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import RecipeError

#: How the range of a grid is found: the largest weight, or the clipping with the least squared error.
CLIPS = ("mse", "absmax")
_FEW = 64  # columns that tell most rows of floats from rows of integers
_FACTORS = [1 - k / 40 for k in range(21)]  # of the largest weight, that ``mse`` tries


@dataclass(frozen=True, eq=False)
class Grid:
    """Evenly spaced values, zero among them: ``w = scale * (code - zero)``.

    Attributes:
        bits: of a code; codes lie in ``[-2^(bits-1), 2^(bits-1) - 1]``. Where 8 bits are symmetric -128 is left out:
            kernels of int8 do without it.
        group: inputs that share a scale.
        scale: ``(o, groups)`` float32, positive, with no more digits than bfloat16 has: ``w`` is exact in float32.
        zero: ``(o, groups)`` float32, the code of the value zero; None where that is zero (symmetric).
    """

    bits: int
    group: int
    scale: Tensor
    zero: Tensor | None = None

    def codes(self, weight: Tensor) -> Tensor:
        """The code of the value nearest to each weight: ``(o, i)`` int8, int32 beyond 8 bits."""
        found = _codes(self._cut(weight), self.scale[..., None], self._zero(), self.bits)
        return found.reshape(weight.shape).to(torch.int8 if self.bits <= 8 else torch.int32)

    def values(self, codes: Tensor) -> Tensor:
        """What codes stand for, ``(o, i)`` float32."""
        return ((self._cut(codes).float() - self._zero()) * self.scale[..., None]).reshape(codes.shape)

    def round(self, weight: Tensor) -> Tensor:
        """The nearest values, ``(o, i)`` float32; what is zero stays zero."""
        return self.values(self.codes(weight))

    def column(self, weight: Tensor, index: int) -> Tensor:
        """The nearest values of column ``index``, ``(o,)``."""
        k = index // self.group
        zero = None if self.zero is None else self.zero[:, k]
        return _rounded(weight, self.scale[:, k], zero, self.bits)

    def _cut(self, matrix: Tensor) -> Tensor:
        return matrix.reshape(matrix.shape[0], -1, self.group)

    def _zero(self) -> Tensor | float:
        return 0.0 if self.zero is None else self.zero[..., None]


def grid(
    weight: Tensor,
    bits: int = 4,
    group: int = 64,
    *,
    symmetric: bool = True,
    clip: str = "mse",
    mask: Tensor | None = None,
) -> Grid:
    """The grid for a matrix.

    Args:
        weight: ``(o, i)``.
        bits: 2 to 16.
        group: inputs that share a scale; 0 for all of an output's.
        symmetric: around zero; otherwise between the smallest and the largest weight, and zero.
        clip: ``absmax``, where no weight is clipped and the error is at most half a step; or ``mse``, which also tries
            smaller ranges, down to half, and takes the one with the least squared error.
        mask: which weights count.

    Raises:
        RecipeError: the group does not divide the inputs, or a knob is not understood.

    >>> grid(torch.tensor([[-7.5, 3.2]]), 4, 0, clip="absmax").round(torch.tensor([[-7.5, 3.2]])).tolist()
    [[-8.0, 3.0]]
    """
    check_grid((weight.shape[0], weight.shape[1]), "the matrix", bits=bits, group=group, clip=clip, most=16)
    group = group or weight.shape[1]
    w = weight.float() if mask is None else weight.float() * mask
    w = w.reshape(w.shape[0], -1, group)
    low, high = w.amin(-1).clamp_max(0), w.amax(-1).clamp_min(0)
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high
    best = torch.full_like(low, torch.inf)
    scale, zero = torch.ones_like(low), torch.zeros_like(low)
    for factor in _FACTORS if clip == "mse" else [1.0]:
        step = short((high - low) * factor / (254 if symmetric and bits == 8 else 2**bits - 1))
        step = torch.where(step > 0, step, 1.0)
        code = torch.zeros_like(low) if symmetric else _code_of_zero(low * factor, step, bits)
        moved = (
            _rounded(w, step[..., None], None if symmetric else code[..., None], bits) - w
        )  # zero is on every grid: the mask costs nothing
        error = moved.square_().sum(-1)
        better = error < best
        best = torch.where(better, error, best)
        scale, zero = torch.where(better, step, scale), torch.where(better, code, zero)
    return Grid(bits, group, scale, None if symmetric else zero)


def steps_of(weight: Tensor, most: int = 127) -> Tensor:
    """The largest step of which all weights of a row are whole multiples, exactly; 0 where they are more than ``most``.

    It is how a model that was quantized with one scale for each output is known again: its codes, with their common
    factor taken out.

    Args:
        weight: ``(o, i)`` of floats.

    Returns:
        ``(o,)`` float32; 1 for a row of zeros.

    >>> steps_of(torch.tensor([[0.75, -1.5, 0.0], [1.0, 2.0, 1e-3]])).tolist()
    [0.75, 0.0]
    """
    if weight.shape[1] > 2 * _FEW:  # most rows of floats are known by their first weights
        found = steps_of(weight[:, :_FEW], most)
        able = found > 0
        if bool(able.any()):
            found[able] = _steps_of(weight[able], most)
        return found
    return _steps_of(weight, most)


def grid_of(weight: Tensor, group: int, bits: int = 4) -> Grid | None:
    """The grid that a matrix lies on exactly, with as many bits; None where it lies on none.

    It is how a model that was quantized in groups is known again by its values: whatever `Grid.round` gave is found,
    up to a common factor of the codes of a group.

    Args:
        weight: ``(o, i)`` of floats.
        group: inputs that share a scale.

    >>> weight = torch.tensor([[1.5, -2.0, 0.0, 3.5]])
    >>> found = grid_of(weight, 4)
    >>> found.scale.tolist(), found.codes(weight).tolist(), grid_of(weight, 4, 3)
    ([[0.5]], [[3, -4, 0, 7]], None)
    """
    if 0 in weight.shape or weight.shape[1] % group:
        return None
    return next(iter(grids_of(weight, group, bits)), None)


def _steps_of(weight: Tensor, most: int) -> Tensor:
    mantissa, exponent = torch.frexp(weight.detach().float())
    there = mantissa != 0
    lowest = exponent.masked_fill(~there, 1 << 20).amin(1, keepdim=True)
    shift = (exponent - lowest).masked_fill(~there, 0)
    numbers = (mantissa.abs() * 2**24).long() << shift.clamp_max(32)  # whole, in units of 2^(lowest - 24)
    common = numbers
    while common.shape[1] > 1:
        common = torch.nn.functional.pad(common, (0, common.shape[1] % 2))
        common = torch.gcd(common[:, 0::2], common[:, 1::2])
    common = common.amax(1)
    found = torch.ldexp(common.double(), lowest[:, 0] - 24)
    fits = (shift <= 32).all(1) & (numbers.amax(1) <= most * common) & (found.float().double() == found)
    return torch.where(~there.any(1), 1.0, torch.where(fits, found, 0.0)).float()


def grids_of(weight: Tensor, group: int = 0, bits: int | None = None) -> list[Grid]:
    """The grids with so many inputs to a scale on which a matrix lies exactly: symmetric, and one that is not.

    It is how weights that were quantized are known again by their values alone.

    Args:
        weight: ``(o, i)``.
        group: a divisor of its inputs; 0 for all of an output's.
        bits: of the codes; as few as hold them where not given.

    >>> (found,) = grids_of(torch.tensor([[-8.0, 3.0], [0.5, 0.25]]), bits=4)[:1]
    >>> found.scale.tolist(), found.codes(torch.tensor([[-8.0, 3.0], [0.5, 0.25]])).tolist()
    ([[1.0], [0.25]], [[-8, 3], [2, 1]])
    """
    group = group or weight.shape[1]
    runs = weight.detach().float().reshape(-1, group)
    if not bool(runs.isfinite().all()) or not bool((steps_of(runs[:8], 255) > 0).all()):
        return []
    step = steps_of(runs, 255)
    if not bool((step > 0).all()):
        return []
    codes = (runs / step[:, None]).round()
    low, high = codes.amin(1).clamp_max(0), codes.amax(1).clamp_min(0)
    found = []
    for symmetric in (True, False):
        far = torch.maximum(-low, high + 1) * 2 if symmetric else high - low + 1  # how many codes hold them
        least = max(2, int(far.max() - 1).bit_length())
        if symmetric and least == 8 and bool((low < -127).any()):
            least = 9  # 8 bits leave -128 out
        if least > 8 or (bits is not None and least > bits):
            continue
        own = least if bits is None else bits
        scale = _shortest(step, low, high, own, symmetric)
        code = _code_of_zero(low * step, scale, own).reshape(weight.shape[0], -1)
        made = Grid(own, group, scale.reshape(weight.shape[0], -1), None if symmetric else code)
        if torch.equal(made.round(weight.float()), weight.float()):
            found.append(made)
    return found


def _shortest(step: Tensor, low: Tensor, high: Tensor, bits: int, symmetric: bool) -> Tensor:
    """Whole parts of the steps that have no more digits than bfloat16, where the codes leave room for one."""
    most = torch.maximum(-low, high) if symmetric else high - low
    room, best = 2 ** (bits - 1) - 1 if symmetric else 2**bits - 1, step.clone()
    for part in range(2, room + 1):
        waits = (short(best) != best) & (most * part <= room)
        if not bool(waits.any()):
            break
        best = torch.where(waits & (short(step / part) == step / part), step / part, best)
    return best


def check_grid(
    shape: tuple[int, int], name: str, *, bits: int, group: int, clip: str = "mse", most: int = 8, run: int = 1
) -> None:
    """Refuse a grid that a matrix cannot have, with the way out.

    Args:
        most: the largest number of bits.
        run: columns that are chosen together as a solver comes to them.
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= most:
        raise RecipeError(f"bits must be a whole number from 2 to {most}, not {bits!r}")
    if isinstance(group, bool) or not isinstance(group, int) or group < 0:
        raise RecipeError(f"group must be a number of inputs, or 0 for all of an output's, not {group!r}")
    if clip not in CLIPS:
        raise RecipeError(f"clip must be {' or '.join(CLIPS)}, not '{clip}'")
    if group and (shape[1] % group or group % run):
        whole = math.gcd(shape[1], group) // run * run
        way = f"choose a group of {whole}, or 0" if whole >= 8 and shape[1] % whole == 0 else "choose a group of 0"
        what = f"a multiple of {run}" if shape[1] % group == 0 else f"a divisor of the {shape[1]} inputs of {name}"
        raise RecipeError(f"a group of {group} inputs is not {what}: {way} (one scale for each output)")


def parse_integers(text: str) -> tuple[int, int]:
    """Bits and group of ``int4``, ``int8`` or ``int4:128``.

    Four bits and less take groups of 64 where none is named, more bits one scale for each output.

    >>> parse_integers("int4"), parse_integers("int4:128"), parse_integers("int8")
    ((4, 64), (4, 128), (8, 0))
    """
    found = re.fullmatch(r"int([2-8])(?::(\d+))?", text)
    if found is None:
        raise RecipeError(f"'{text}' is not understood: write int4, int8, or with a group of inputs int4:128")
    bits = int(found[1])
    return bits, int(found[2]) if found[2] is not None else 64 if bits <= 4 else 0


def short(scale: Tensor) -> Tensor:
    """Scales rounded up to the digits of bfloat16, still float32."""
    bits = scale.float().contiguous().view(torch.int32)
    found: Tensor = ((bits + 0xFFFF) & ~0xFFFF).view(torch.float32)
    return found


def _code_of_zero(low: Tensor, step: Tensor, bits: int) -> Tensor:
    half = 1 << (bits - 1)
    return (-half - low / step).round().clamp(-half, half - 1)


def _codes(w: Tensor, scale: Tensor, zero: Tensor | float, bits: int) -> Tensor:
    half = 1 << (bits - 1)
    low = -127 if bits == 8 and not isinstance(zero, Tensor) else -half
    return ((w / scale).round_() + zero).clamp_(low, half - 1)


def _rounded(w: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Tensor:
    if zero is None:
        return _codes(w, scale, 0.0, bits) * scale
    return (_codes(w, scale, zero, bits) - zero) * scale
