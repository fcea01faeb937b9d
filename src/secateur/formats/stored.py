"""The smallest file for pruned and quantized weights: each matrix in the form that takes the fewest bytes.

================== ======================================================== ========================================
form               what it keeps of a matrix ``(o, i)``                     bytes
================== ======================================================== ========================================
dense              every float                                              ``o i s``, s bytes a float
bitmask            a bit for each weight, and the floats that are not zero  ``ceil(o i / 8) + n s``, n not zero
integers           every code of a grid, and its scales                     ``ceil(o i b / 8) + 2 o groups``
bitmask+integers   a bit for each weight, codes of what is not zero, scales ``ceil(o i / 8) + ceil(n b / 8) + scales``
shared             k-means values, Huffman codes of values and of gaps      as `sharing.Shared` has it
================== ======================================================== ========================================

No other tool reads these files: they have names that stock loaders do not look for. A matrix is decoded before it is
used. The directory holds ``stored.json``, which says what stands for each tensor, and ``stored-*.safetensors``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..errors import ModelError, RecipeError
from .grid import Grid, check_grid, grids_of
from .sharing import Codebook, restored, share

#: What a solver says of weights that take few values.
OnGrid = Grid | Codebook

RECORD = "stored.json"
FORMS = ("dense", "bitmask", "integers", "bitmask+integers")
_GROUPS = (512, 256, 128, 64, 32, 16)  # inputs that share a scale, which are tried where none are told
_AT_ONCE = 1 << 19  # numbers that are taken apart into bits, a multiple of eight
_FLOATS = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def bytes_of(
    form: str,
    shape: tuple[int, int],
    *,
    nonzeros: int | None = None,
    bits: int = 4,
    group: int = 64,
    symmetric: bool = True,
    itemsize: int = 2,
) -> int:
    """Bytes of a matrix in a form, exactly; a file adds a header of about a hundred bytes for each tensor.

    Args:
        form: one of `FORMS`, or ``pack-quantized``, the stock layout that ``--quantize`` writes.
        shape: ``(o, i)``.
        nonzeros: weights that are not zero; all where not given.
        bits, group, symmetric: of the grid; a group of 0 is a whole row.
        itemsize: bytes of a float.

    >>> bytes_of("dense", (64, 128)), bytes_of("bitmask", (64, 128), nonzeros=4096)
    (16384, 9216)
    >>> bytes_of("integers", (64, 128)), bytes_of("bitmask+integers", (64, 128), nonzeros=4096)
    (4352, 3328)
    """
    o, i = shape
    n = o * i if nonzeros is None else nonzeros
    if not 0 <= n <= o * i:
        raise RecipeError(f"{n} of {o} x {i} weights cannot be other than zero")
    if form == "dense":
        return o * i * itemsize
    if form == "bitmask":
        return _whole(o * i) + n * itemsize
    if form not in (*FORMS, "pack-quantized"):
        raise RecipeError(f"a form is one of {', '.join(FORMS)} or pack-quantized, not '{form}'")
    check_grid(shape, "the matrix", bits=bits, group=group)
    groups = i // group if group else 1
    scales = 2 * o * groups
    if form == "pack-quantized":
        zeros = 0 if symmetric else 4 * -(-o * bits // 32) * groups
        return 4 * o * -(-i * bits // 32) + scales + 16 + zeros
    scales += 0 if symmetric else _whole(o * groups * bits)
    if form == "integers":
        return _whole(o * i * bits) + scales
    return _whole(o * i) + _whole(n * bits) + scales


def encode(weight: Tensor, grid: OnGrid | None = None, form: str = "") -> tuple[dict[str, Tensor], Any]:
    """What stands for a weight in a file: tensors, and facts as JSON.

    Args:
        weight: of any shape; its first axis are the outputs.
        grid: whose values it has, if it has any; a weight beside its grid is refused. Where none is given, one with a
            scale for each output, or each group of 16 to 512 inputs, is looked for, and values that many share.
        form: one of `FORMS`; the smallest that loses nothing where not given.
    """
    matrix = weight.detach().reshape(weight.shape[0], -1) if weight.dim() > 1 else weight.detach().reshape(1, -1)
    facts: dict[str, Any] = {"shape": list(weight.shape), "dtype": str(weight.dtype).removeprefix("torch.")}
    if isinstance(grid, Codebook):
        if matrix[matrix != 0].unique().numel() > 2**grid.bits:
            raise RecipeError("a weight has values beside those that it shared: it was changed after it was quantized")
        return share(matrix, grid.bits).stored(), {**facts, "form": "shared"}
    n, size = int(matrix.count_nonzero()), (matrix.shape[0], matrix.shape[1])
    known: dict[str, Any] = {"nonzeros": n, "itemsize": weight.element_size()}
    sizes: dict[tuple[str, Grid | None], int] = {}
    for one in _found(matrix) if grid is None and form == "" else [grid]:
        if one is not None and one.bits <= 8:
            known |= {"bits": one.bits, "group": one.group, "symmetric": one.zero is None}
            sizes |= {(f, one): bytes_of(f, size, **known) for f in ("integers", "bitmask+integers")}
    sizes |= {(f, None): bytes_of(f, size, **known) for f in ("dense", "bitmask")}
    able = list(dict.fromkeys(f for f, _ in sizes))
    if form and form not in able:
        raise RecipeError(f"this weight can be stored as {', '.join(able)}, not '{form}'")
    tries = form == "" and grid is None
    form, grid = min((k for k in sizes if form in ("", k[0])), key=lambda k: sizes[k])
    if tries and grid is None and n and (few := _few(matrix)):
        shared = share(matrix, few)
        if shared.bytes() < sizes[form, None]:
            return shared.stored(), {**facts, "form": "shared"}
    facts["form"] = form
    mask = matrix != 0
    tensors = {"mask": pack_bits(mask, 1)} if "bitmask" in form else {}
    if "integers" not in form or grid is None:
        tensors["values"] = matrix[mask] if form == "bitmask" else weight.detach()
        return tensors, facts
    codes = grid.codes(matrix.float())
    if not torch.equal(grid.values(codes).to(matrix.dtype), matrix):
        raise RecipeError("a weight does not lie on its grid: it was changed after it was quantized")
    half = 1 << (grid.bits - 1)
    kept = codes[mask] if form == "bitmask+integers" else codes
    tensors["codes"] = pack_bits(kept.long() + half, grid.bits)
    short = grid.scale.to(torch.bfloat16)
    tensors["scale"] = short if torch.equal(short.float(), grid.scale) else grid.scale
    if grid.zero is not None:
        tensors["zero"] = pack_bits(grid.zero.long() + half, grid.bits)
    return tensors, {**facts, "bits": grid.bits, "group": grid.group, "symmetric": grid.zero is None}


def _found(matrix: Tensor) -> list[Grid]:
    """Grids that a matrix lies on: with one scale for each output, and for groups of inputs."""
    sizes = [g for g in _GROUPS if g < matrix.shape[1] and matrix.shape[1] % g == 0]
    return [found for group in (matrix.shape[1], *sizes) for found in grids_of(matrix, group)]


def _few(matrix: Tensor) -> int:
    """Bits that tell the values of a matrix apart, where there are no more than 8 bits can; else 0."""
    flat, distinct = matrix.float().reshape(-1), 0
    for part in (flat[: 1 << 12], flat):
        distinct = part[part != 0].unique().numel()
        if distinct > 256 or not bool(part.isfinite().all()):
            return 0
    return max(1, (distinct - 1).bit_length())


def decode(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Tensor:
    """The weight that `encode` was given.

    Raises:
        ModelError: the parts do not fit each other.
    """
    try:
        shape, dtype = [int(n) for n in facts["shape"]], _FLOATS[facts["dtype"]]
        form = facts["form"]
        if form == "shared":
            return restored(tensors).dense().reshape(shape).to(dtype)
        if form not in FORMS or min(shape, default=1) < 1:
            raise ValueError(f"form {form} of {shape}")
        rows = shape[0] if len(shape) > 1 else 1
        n = 1
        for size in shape:
            n *= size
        if form == "dense":
            return tensors["values"].reshape(shape).to(dtype)
        mask = unpack_bits(tensors["mask"], 1, n).bool() if "bitmask" in form else None
        count = n if mask is None else int(mask.sum())
        flat = torch.zeros(n, dtype=dtype if form == "bitmask" else torch.float32)
        if form == "bitmask":
            assert mask is not None
            flat[mask] = tensors["values"].to(dtype)
            return flat.reshape(shape)
        grid = _grid(tensors, facts)
        if grid.scale.shape != (rows, n // rows // grid.group):
            raise ValueError("scales")
        codes = unpack_bits(tensors["codes"], grid.bits, count) - (1 << (grid.bits - 1))
        if mask is None:
            whole = codes
        else:
            nothing = torch.zeros_like(grid.scale) if grid.zero is None else grid.zero
            whole = nothing.long()[..., None].expand(*grid.scale.shape, grid.group).reshape(-1).clone()
            whole[mask] = codes
        return grid.values(whole.reshape(rows, -1)).reshape(shape).to(dtype)
    except (KeyError, TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
        raise ModelError(f"a stored weight is damaged: {error}") from None


def _grid(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Grid:
    """The grid of a weight that is stored as codes."""
    bits, scale, zero = int(facts["bits"]), tensors["scale"].float(), None
    if not 2 <= bits <= 8 or scale.dim() != 2 or not bool(scale.isfinite().all()):
        raise ValueError("scales")
    if not facts["symmetric"]:
        zero = (unpack_bits(tensors["zero"], bits, scale.numel()) - (1 << (bits - 1))).float().reshape(scale.shape)
    return Grid(bits, int(facts["group"]), scale, zero)


def grids_in(path: str | Path) -> dict[str, Grid]:
    """The grids of the weights that a directory holds as codes: by layer, those of ``(i, o)`` turned round."""
    record = read_record(path)
    found: dict[str, Grid] = {}
    for file in record["files"]:
        tensors = load_file(Path(path) / file)
        for name, told in record["weights"].items():
            if "integers" in told["form"] and f"{name}:codes" in tensors:
                parts = {part: tensors[f"{name}:{part}"] for part in told["parts"]}
                found[name.removesuffix(".weight") if told.get("turned") else name] = _grid(parts, told)
    return found


def pack_bits(numbers: Tensor, bits: int) -> Tensor:
    """Numbers below ``2^bits``, one after the other, the lowest bit first: ``(ceil(n bits / 8),)`` uint8.

    >>> pack_bits(torch.tensor([1, 2, 3]), 4).tolist()
    [33, 3]
    """
    flat = numbers.reshape(-1)
    place = torch.arange(bits, device=flat.device)
    parts = []
    for part in flat.split(_AT_ONCE):
        ones = ((part.long()[:, None] >> place) & 1).reshape(-1)
        ones = torch.nn.functional.pad(ones, (0, -len(ones) % 8)).view(-1, 8)
        parts.append((ones << torch.arange(8, device=flat.device)).sum(1).to(torch.uint8))
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.uint8)


def unpack_bits(packed: Tensor, bits: int, n: int) -> Tensor:
    """The inverse of `pack_bits`: ``(n,)`` int64.

    Raises:
        ValueError: there are more or fewer bytes than so many numbers take.
    """
    if packed.dtype != torch.uint8 or packed.shape != (_whole(n * bits),):
        raise ValueError(f"{tuple(packed.shape)} bytes are not {n} numbers of {bits} bits")
    place = torch.arange(bits)
    parts = []
    for part, start in zip(packed.split(_AT_ONCE // 8 * bits), range(0, max(n, 1), _AT_ONCE), strict=False):
        ones = ((part.long()[:, None] >> torch.arange(8)) & 1).reshape(-1)
        count = min(_AT_ONCE, n - start)
        parts.append((ones[: count * bits].view(count, bits) << place).sum(1))
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)


def encode_all(
    tensors: Mapping[str, Tensor], grids: Mapping[str, OnGrid], turned: Iterable[str] = ()
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A file's tensors with the smallest form of each, and the facts by the tensor's name.

    Args:
        tensors: by name.
        grids: by the name of a tensor.
        turned: tensors that store a matrix ``(i, o)``, whose grid is of ``(o, i)``.
    """
    out: dict[str, Tensor] = {}
    facts: dict[str, Any] = {}
    away = set(turned)
    for name, tensor in tensors.items():
        able = tensor.is_floating_point() and tensor.dim() > 1 and tensor.numel() > 0
        if not able or str(tensor.dtype)[6:] not in _FLOATS:
            out[name] = tensor
            continue
        parts, told = encode(tensor.t() if name in away else tensor, grids.get(name))
        if told["form"] == "dense":
            out[name] = tensor
            continue
        out |= {f"{name}:{part}": t.contiguous() for part, t in parts.items()}
        facts[name] = {**told, **({"turned": True} if name in away else {}), "parts": sorted(parts)}
    return out, facts


def decode_all(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> dict[str, Tensor]:
    """The inverse of `encode_all`."""
    parts = {f"{name}:{part}" for name, told in facts.items() for part in told["parts"]}
    if lost := sorted(parts - set(tensors)):
        raise ModelError(f"a stored model is damaged: {lost[0]} is missing")
    out = {name: t for name, t in tensors.items() if name not in parts}
    for name, told in facts.items():
        found = decode({part: tensors[f"{name}:{part}"] for part in told["parts"]}, told)
        out[name] = found.t().contiguous() if told.get("turned") else found
    return out


def describe(folder: Path, weights: Mapping[str, Any], **more: Any) -> str:
    """The text of ``stored.json`` for the files in a folder.

    Args:
        weights: facts by tensor, as `encode_all` gave them.
        more: what else is to be said.
    """
    files = {f.name: _hash(f) for f in sorted(folder.glob("stored-*.safetensors"))}
    return json.dumps({"version": 1, **more, "files": files, "weights": dict(weights)}, indent=1) + "\n"


def is_stored(path: str | Path) -> bool:
    """Whether a directory holds weights in these forms."""
    return (Path(path) / RECORD).is_file()


def read_record(path: str | Path) -> dict[str, Any]:
    """What ``stored.json`` says.

    Raises:
        ModelError: it cannot be read, or is of another version.
    """
    try:
        record = json.loads((Path(path) / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{Path(path) / RECORD} cannot be read: {error}") from None
    whole = isinstance(record, dict) and all(isinstance(record.get(k), dict) for k in ("files", "weights"))
    if not whole or record.get("version") != 1:
        raise ModelError(f"{Path(path) / RECORD} has another version than this secateur reads")
    return dict(record)


def read(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a directory, decoded.

    Raises:
        ModelError: a file is missing or was changed.
    """
    folder, record = Path(path), read_record(path)
    tensors: dict[str, Tensor] = {}
    for file, expected in record["files"].items():
        try:
            if Path(file).name != file or _hash(folder / file) != expected:
                raise ModelError(f"{folder / file} is not the file that {RECORD} describes: it was changed or cut off")
            tensors |= load_file(folder / file)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{folder / file} cannot be read: {error}") from None
    try:
        return decode_all(tensors, record["weights"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{folder / RECORD} is damaged: {error}") from None


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _whole(bits: int) -> int:
    return -(-bits // 8)
