"""The compiled kernels: which of them this machine runs, and their C interface."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from ..disk import digest
from ..errors import SecateurError
from .build import BUILT, targets

#: Floats behind scratch memory that no kernel needs: its size is then never zero.
SLACK = 256

KINDS: Mapping[torch.dtype, int] = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
#: Of int8 values whose activations become int8 as well.
DYNAMIC = 3
ACTIVATIONS: Mapping[str, int] = {"none": 0, "relu": 1}

_Pointer, _Long, _Int = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32


class Matrix(ctypes.Structure):
    """``Matrix`` of ``native/sparse.h``."""

    _fields_ = (
        ("rows", _Long),
        ("cols", _Long),
        ("group", _Int),
        ("panel", _Int),
        ("kind", _Int),
        ("activation", _Int),
        ("values", _Pointer),
        ("start", _Pointer),
        ("col", _Pointer),
        ("bits", _Pointer),
        ("quad", _Pointer),
        ("scale", _Pointer),
        ("bias", _Pointer),
    )


class Int4(ctypes.Structure):
    """``Int4`` of ``native/int4.h``."""

    _fields_ = (
        ("rows", _Long),
        ("cols", _Long),
        ("group", _Int),
        ("activation", _Int),
        ("values", _Pointer),
        ("scale", _Pointer),
        ("zero", _Pointer),
        ("bias", _Pointer),
    )


class Convolution(ctypes.Structure):
    """``Convolution`` of ``native/sparse.h``."""

    _fields_ = (
        ("offset", _Pointer),
        ("count", _Long),
        ("lines", _Long),
        ("length", _Long),
        ("out_h", _Long),
        ("out_w", _Long),
        ("pitch", _Long),
        ("copied", _Int),
        ("laid", _Int),
        ("in_h", _Int),
        ("in_w", _Int),
        ("stride_h", _Int),
        ("stride_w", _Int),
        ("phase_h", _Int),
        ("phase_w", _Int),
        ("pad_h", _Int),
        ("pad_w", _Int),
    )


class Library:
    """One compiled set of kernels."""

    def __init__(self, path: Path) -> None:
        loaded = ctypes.CDLL(str(path))
        self.digest = digest(path)  # measurements of one build say nothing of another
        matrix = ctypes.POINTER(Matrix)
        self.linear, self.vector, self.convolution = (
            loaded.sparse_linear,
            loaded.sparse_vector,
            loaded.sparse_convolution,
        )
        for multiply in (self.linear, self.vector):
            multiply.argtypes = (matrix, _Pointer, _Long, _Pointer, _Pointer, _Int)
            multiply.restype = None
        self.convolution.argtypes = (
            matrix, ctypes.POINTER(Convolution), _Pointer, _Pointer, _Pointer, _Int,
        )  # fmt: skip
        self.convolution.restype = None
        self.scratch_convolution, self.block_convolution = loaded.scratch_convolution, loaded.block_convolution
        for about in (self.scratch_convolution, self.block_convolution):
            about.argtypes = (ctypes.POINTER(Convolution),)
            about.restype = _Long
        self.scratch_linear, self.scratch_vector = loaded.scratch_linear, loaded.scratch_vector
        for scratch in (self.scratch_linear, self.scratch_vector):
            scratch.argtypes = (matrix, _Long)
            scratch.restype = _Long
        self.int4_vector, self.int4_floats, self.scratch_int4 = (
            loaded.int4_vector,
            loaded.int4_floats,
            loaded.scratch_int4,
        )
        int4 = ctypes.POINTER(Int4)
        self.int4_vector.argtypes = (int4, _Pointer, _Long, _Pointer, _Pointer, _Int)
        self.int4_floats.argtypes = (int4, _Long, _Long, _Pointer, _Int, _Int)
        self.int4_vector.restype = self.int4_floats.restype = None
        self.scratch_int4.argtypes = (int4, _Long)
        self.scratch_int4.restype = _Long
        loaded.sparse_isa.restype = ctypes.c_char_p
        self.isa = str(loaded.sparse_isa().decode())
        self.lanes = int(loaded.sparse_lanes())
        self.quads = self.isa == "avx512vnni"  # others multiply quads too, slower than single values
        pool = openmp()
        loaded.sparse_use_pool.argtypes = (_Pointer,)
        loaded.sparse_use_pool.restype = None
        loaded.sparse_use_pool(pool)
        self.threads = "those of torch" if pool else "its own"
        if pool and hasattr(os, "register_at_fork"):  # an OpenMP pool does not live on in a forked process
            os.register_at_fork(after_in_child=lambda: loaded.sparse_use_pool(None))


def openmp() -> int | None:
    """The address of the OpenMP entry that torch has loaded: two pools on the same processors would slow each other."""
    try:
        entry = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):
        return None
    return ctypes.cast(entry, _Pointer).value


def supported() -> list[str]:
    """The instruction sets that this processor runs, the widest first."""
    found = torch.backends.cpu.get_cpu_capability()
    missing = {"AVX512": [], "AVX2": ["avx512"]}.get(found, ["avx512", "avx2"])
    if found != "AVX512" or not {"avx512_vbmi2", "avx512_vnni"} <= instructions():
        missing.append("avx512vnni")
    return [name for name in targets() if name not in missing]


@lru_cache(maxsize=1)
def instructions() -> frozenset[str]:
    """What Linux says that the processor has beyond what torch asks for; elsewhere nothing."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    return frozenset(flag for line in lines if line.startswith("flags") for flag in line.split())


@lru_cache(maxsize=1)
def library() -> Library | None:
    """The widest kernels that are built and that this processor runs, or None.

    ``SECATEUR_KERNELS`` names another: ``avx2``, ``portable``, or ``none``.

    Raises:
        SecateurError: the one that is named is not there, or cannot run here.
    """
    asked = os.environ.get("SECATEUR_KERNELS")
    if asked == "none":
        return None
    usable = supported()
    if asked is not None and asked not in usable:
        raise SecateurError(f"SECATEUR_KERNELS is '{asked}': this machine runs {', '.join(usable)} or none")
    for name in [asked] if asked else usable:
        path = BUILT / f"sparse_{name}.so"
        if path.exists():
            try:
                return Library(path)
            except (OSError, AttributeError) as error:
                raise SecateurError(f"{path} cannot be used: {error}; build it again: {BUILD}") from None
    if asked is not None:
        raise SecateurError(f"SECATEUR_KERNELS is '{asked}', which is not built: {BUILD}")
    return None


BUILD = "python -m secateur.kernels"


def described() -> dict[str, Any]:
    """Which kernels are active, for a bug report."""
    found = library()
    if found is None:
        if os.environ.get("SECATEUR_KERNELS") == "none":
            return {"active": None, "reason": "SECATEUR_KERNELS is 'none'"}
        return {"active": None, "reason": f"none is built for this machine: {BUILD} needs a C++ compiler"}
    return {"active": found.isa, "floats in a vector": found.lanes, "threads": found.threads}
