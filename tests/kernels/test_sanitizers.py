"""The kernels under AddressSanitizer and UndefinedBehaviorSanitizer, over heap blocks of exactly the right sizes."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from secateur.kernels import build
from secateur.kernels.library import supported

# Unoptimized: every read of the source is one of the program, and it compiles in half the time of -O1.
FLAGS = ("-std=c++17", "-pthread", "-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
#: Blocks are freed; a leak check would fail where processes may not be traced.
ENVIRONMENT = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=1"}


@pytest.fixture(scope="module")
def cxx(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A compiler whose sanitizers find an overrun."""
    found = build.compiler()
    if found is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("sanitizers")
    (folder / "overrun.cpp").write_text("int main(int n, char**) { char* c = new char[n]; return c[n]; }\n")
    if build.compile_one(found, folder / "overrun", FLAGS, [str(folder / "overrun.cpp")]) is not None:
        pytest.skip("the compiler has no sanitizers")
    done = subprocess.run([folder / "overrun"], capture_output=True, text=True, env=ENVIRONMENT, check=False)
    if "heap-buffer-overflow" not in done.stderr:
        pytest.skip(f"sanitizers do not run here: {done.stderr[:200]}")
    return found


@pytest.mark.parametrize("name", [name for name in ("avx2", "portable") if name in supported()])
def test_no_read_or_write_past_an_end(cxx: str, name: str, tmp_path: Path) -> None:
    problem = build.compile_one(cxx, tmp_path / "check", (*FLAGS, *build.TARGETS[name]), ["check.cpp"])
    assert problem is None, problem
    done = subprocess.run([tmp_path / "check"], capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[:4000]
