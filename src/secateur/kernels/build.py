"""Compile the sparse kernels: ``python -m secateur.kernels``, and the hook that runs when the package is built.

Uses the standard library alone, for the hook runs before anything else is installed.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

SOURCE = Path(__file__).parent / "native"
BUILT = Path(__file__).parent / "built"

_COMMON = ("-O3", "-std=c++17", "-fPIC", "-shared", "-pthread", "-fvisibility=hidden", "-ffp-contract=fast")
_X86 = ("-mfma", "-mbmi2", "-mpopcnt")
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
#: Instruction set -> what the compiler is told, the widest first.
TARGETS: dict[str, tuple[str, ...]] = {
    "avx512vnni": (*_AVX512, "-mavx512vbmi", "-mavx512vbmi2", "-mavx512vnni", *_X86),
    "avx512": (*_AVX512, *_X86),
    "avx2": ("-mavx2", *_X86),
    "portable": (),
}


def targets(machine: str | None = None) -> list[str]:
    """The instruction sets worth compiling for on this kind of machine; Arm's vectors are in its portable one."""
    x86 = (machine or platform.machine()).lower() in ("x86_64", "amd64")
    return [name for name in TARGETS if x86 or name == "portable"]


def compiler() -> str | None:
    """The C++ compiler: ``$CXX``, or one on the path."""
    named = os.environ.get("CXX")
    return named or next((found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None)


def compile_one(
    cxx: str, out: Path, flags: Sequence[str], source: Sequence[str] = ("sparse.cpp", "int4.cpp")
) -> str | None:
    """Compile to ``out``, which appears only when it is whole; what the compiler said where it could not."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(suffix=out.suffix, dir=out.parent)
    except OSError as error:
        return f"{out} cannot be written: {error}"
    os.close(handle)
    command = [*cxx.split(), *flags, *(str(SOURCE / name) for name in source), "-o", part]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        if done.returncode:
            return done.stderr.strip() or f"{cxx} ended with {done.returncode}"
        os.chmod(part, 0o755)
        os.replace(part, out)
    except (OSError, subprocess.SubprocessError) as error:
        return f"{cxx}: {error}"
    finally:
        Path(part).unlink(missing_ok=True)
    return None


def build(out: Path = BUILT) -> dict[str, str | None]:
    """Compile for every instruction set; name -> None, or why it is not there."""
    cxx = compiler()
    if cxx is None:
        return dict.fromkeys(targets(), "no C++ compiler was found")
    return {name: compile_one(cxx, out / f"sparse_{name}.so", (*_COMMON, *TARGETS[name])) for name in targets()}
