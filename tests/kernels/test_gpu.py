"""Kernels for GPUs against dense arithmetic in float64: interpreted where there is no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from secateur.errors import SecateurError
from secateur.formats import Packed, pack
from secateur.formats.packed import PADDING
from secateur.kernels import gpu
from tests.kernels.sample import sparse

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
#: Without a GPU the kernels run in triton's interpreter (see conftest.py), which is slow: few examples, small shapes.
needs_triton = pytest.mark.skipif(gpu.kernels() is None, reason="triton is not installed: pip install triton")
SEEDS = st.integers(0, 1 << 32)
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
DENSITIES = st.sampled_from([0.0, 0.05, 0.5, 1.0])


def packed(weight: Tensor, group: int = gpu.GROUP) -> Packed:
    """As the kernels read it, on the device of the tests."""
    found = pack(weight, gpu.KINDS[weight.dtype], group=group, panel=gpu.PANEL)
    parts = [t.to(DEVICE) for t in (found.values, found.start, found.bits) if t is not None]
    return Packed(found.rows, found.cols, group, gpu.PANEL, parts[0], parts[1], None, parts[2])


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> tuple[Tensor, Tensor]:
    """The product in float64, and the size of its terms."""
    right, size = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
    if bias is not None:
        right, size = right + bias.double(), size + bias.double().abs()
    return (right.relu() if relu else right), size


def near(y: Tensor, right: Tensor, size: Tensor) -> bool:
    """Equal up to sums in float32 and one rounding of the result."""
    step = torch.finfo(y.dtype).eps
    return bool(((y.cpu().double() - right).abs() <= 1e-5 * size + step * right.abs() + 1e-7).all())


@needs_triton
@settings(max_examples=15)
@given(
    SEEDS, st.integers(1, 20), st.integers(1, 150), DENSITIES, st.integers(1, 4), DTYPES, DTYPES,
    st.sampled_from([1, 3, 4, 16, 64]), st.booleans(), st.booleans(),
    st.sampled_from([(4, 2, 4), (8, 1, 8), (8, 2, 2), (16, 4, 16), None]),
)  # fmt: skip
def test_few_tokens(
    seed: int, rows: int, cols: int, density: float, tokens: int, dtype: torch.dtype, given_as: torch.dtype,
    group: int, biased: bool, relu: bool, cut: tuple[int, int, int] | None,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    weight = sparse(generator, rows, cols, density).to(dtype)
    x = torch.randn(tokens, cols, generator=generator).to(given_as)
    bias = torch.randn(rows, generator=generator).to(dtype) if biased else None
    tiling = cut and {"ROWS": cut[0], "PANELS": cut[1], "REACH": cut[2], "num_warps": 4}
    p = packed(weight, group)
    assert p.bits is not None
    y = gpu.multiply(
        x.to(DEVICE), p.values, p.start, p.bits, None if bias is None else bias.to(DEVICE), rows, cols, group,
        int(relu), tiling,
    )  # fmt: skip
    right, size = reference(x, weight, bias, relu)
    assert y.dtype == given_as and y.shape == (tokens, rows) and near(y, right, size)


@needs_triton
@settings(max_examples=15)
@given(SEEDS, st.integers(1, 40), st.integers(1, 200), DENSITIES, DTYPES, st.sampled_from([1, 3, 4, 64]))
def test_unpacked_is_what_was_packed(
    seed: int, rows: int, cols: int, density: float, dtype: torch.dtype, group: int
) -> None:
    weight = sparse(torch.Generator().manual_seed(seed), rows, cols, density).to(dtype)
    p = packed(weight, group)
    assert p.bits is not None
    assert torch.equal(gpu.unpack(p.values, p.start, p.bits, rows, cols, group).cpu(), weight)


@needs_triton
def test_nothing_behind_the_values_is_read() -> None:
    """Values and inputs behind the last, and outputs behind the last row, are none of theirs."""
    weight = sparse(torch.Generator().manual_seed(0), 5, 70, 1.0)
    p, line = packed(weight), torch.randn(3 * 70, device=DEVICE)
    line[2 * 70 :] = float("nan")
    x = line[: 2 * 70].view(2, 70)
    assert p.bits is not None
    p.values[-PADDING:] = float("nan")
    held = torch.full((3, 5), 7.0, device=DEVICE)
    y = gpu.multiply(x, p.values, p.start, p.bits, None, 5, 70, 4, 0)
    torch.testing.assert_close(y.cpu(), (x.cpu().double() @ weight.double().T).float(), rtol=1e-5, atol=1e-5)
    found = gpu.kernels()
    assert found is not None
    words = p.bits.view(torch.int32)
    found.multiply[(2,)](
        x, p.values, p.start, words, None, held, 5, 70, 4, TOKENS=2, BIASED=False, ACTIVATION=0, ROWS=4, PANELS=1,
        REACH=8,
    )  # fmt: skip
    torch.testing.assert_close(held[:2], y, rtol=1e-5, atol=1e-5)
    assert bool((held[2] == 7).all())


@needs_triton
def test_what_is_not_a_number_stays_in_its_token() -> None:
    weight = sparse(torch.Generator().manual_seed(0), 13, 108, 0.5)
    p, x = packed(weight), torch.randn(3, 108, device=DEVICE)
    assert p.bits is not None
    clean = gpu.multiply(x, p.values, p.start, p.bits, None, 13, 108, 4, 1)
    x[1, 40] = float("nan")
    found = gpu.multiply(x, p.values, p.start, p.bits, None, 13, 108, 4, 1)
    assert torch.equal(found[[0, 2]], clean[[0, 2]])
    reached = (weight[:, 40] != 0).to(DEVICE)
    assert bool(reached.any()) and bool(found[1, reached].isnan().all())


@pytest.mark.parametrize("tokens", [(2, 3), (0,), ()])
@pytest.mark.parametrize("whole", [False, True], ids=["unpacked", "dense"])
def test_the_operator(tokens: tuple[int, ...], whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By each of its ways: densely on the CPU, by the kernel, with a weight that is dense or unpacked."""
    weight = sparse(torch.Generator().manual_seed(0), 33, 108, 0.5)
    p, bias, x = packed(weight), torch.randn(33, device=DEVICE), torch.randn(*tokens, 108, device=DEVICE)
    dense = weight.to(DEVICE) if whole else None
    right = F.linear(x, weight.to(DEVICE), bias).relu()
    ways = [False, True] if gpu.kernels() is not None else [False]
    for way in ways:
        if DEVICE == "cpu":
            monkeypatch.setattr(gpu, "runs_here", lambda _, way=way: way)
        y = torch.ops.secateur.bits_linear(x, p.values, p.start, p.bits, dense, bias, 33, 108, 4, 1)
        assert y.shape == right.shape
        torch.testing.assert_close(y, right, rtol=1e-4, atol=1e-4)


def test_the_operators_keep_the_rules() -> None:
    weight = sparse(torch.Generator().manual_seed(0), 64, 128, 0.5)
    p, x = packed(weight), torch.randn(5, 128, device=DEVICE)
    bits = (p.values, p.start, p.bits, None, None, 64, 128, 4, 0)
    kept, meta = gpu.compress_semi(two_of_four(64, 128).to(DEVICE))
    for given_as in (x, x.half(), x[:0], x.view(5, 1, 128)):
        torch.library.opcheck(torch.ops.secateur.bits_linear.default, (given_as, *bits))
        torch.library.opcheck(torch.ops.secateur.semi_linear.default, (given_as, kept, meta, None, 64, 128, 1))


def test_what_does_not_fit_is_refused() -> None:
    weight = sparse(torch.Generator().manual_seed(0), 33, 108, 0.5)
    p, x = packed(weight), torch.randn(2, 108, device=DEVICE)
    operator = torch.ops.secateur.bits_linear
    parts = [p.values, p.start, p.bits, weight.to(DEVICE), torch.zeros(33, device=DEVICE), 33, 108, 4, 0]
    assert operator(x, *parts).shape == (2, 33)
    for wrong in (x[:, :5], x.int(), torch.tensor(1.0, device=DEVICE)):
        with pytest.raises(SecateurError, match="compressed layer"):
            operator(wrong, *parts)
    tried = 0
    for k in range(5):
        part = parts[k]
        assert isinstance(part, Tensor)
        changes = [torch.cat([part, part[:1]]), torch.stack([part, part], -1)[..., 0], part.to(torch.float64)]
        for change in changes[k == 0 :]:  # more values than there are bits do no harm
            with pytest.raises(SecateurError, match="fit together"):
                operator(x, *parts[:k], change, *parts[k + 1 :])
            tried += 1
    assert tried == 14
    with pytest.raises(SecateurError, match="fit together"):
        operator(x, p.values, p.start, p.bits, None, None, 33, 108, 0, 0)


def test_a_gpu_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    p = packed(sparse(torch.Generator().manual_seed(0), 4, 70, 0.5))
    assert p.bits is not None
    monkeypatch.setattr(gpu, "kernels", lambda: None)
    assert not gpu.runs_here(p.values)
    with pytest.raises(SecateurError, match="pip install triton"):
        gpu.unpack(p.values, p.start, p.bits, 4, 70, 4)
    with pytest.raises(SecateurError, match="pip install triton"):
        gpu.multiply(p.values[:70][None], p.values, p.start, p.bits, None, 4, 70, 4, 0)


def two_of_four(rows: int, cols: int, most: int = 2) -> Tensor:
    """A random weight that keeps at most so many of each four inputs, often fewer."""
    weight = torch.randn(rows, cols // 4, 4)
    order = torch.rand(rows, cols // 4, 4).argsort(-1)
    return torch.where((order < most) & (torch.rand_like(weight) < 0.9), weight, 0.0).view(rows, cols).half()


@given(SEEDS, st.integers(1, 3), st.integers(1, 3), st.sampled_from([torch.float16, torch.bfloat16]), st.integers(0, 2))
def test_two_of_four_there_and_back(seed: int, rows: int, cols: int, dtype: torch.dtype, most: int) -> None:
    torch.manual_seed(seed)
    weight = two_of_four(32 * rows, 64 * cols, most).to(dtype).to(DEVICE)
    assert gpu.is_semi(weight)
    kept, meta = gpu.compress_semi(weight)
    assert torch.equal(gpu.dense_semi(kept, meta, *weight.shape), weight)
    held = sum(t.numel() * t.element_size() for t in (kept, meta) if t is not None)
    assert held < 0.6 * weight.numel() * weight.element_size()
    x, bias = torch.randn(3, 64 * cols).to(dtype), torch.randn(32 * rows).to(dtype)
    y = torch.ops.secateur.semi_linear(x.to(DEVICE), kept, meta, bias.to(DEVICE), *weight.shape, 1)
    right, size = reference(x, weight.cpu(), bias, True)
    assert bool(((y.cpu().double() - right).abs() <= 2 * torch.finfo(dtype).eps * size).all())


def test_what_is_not_two_of_four() -> None:
    good = two_of_four(32, 64)
    for shape in ((31, 64), (32, 60), (0, 64)):
        assert not gpu.is_semi(torch.zeros(shape))
    bad = good.clone()
    bad[3, 8:11] = 1.0
    assert gpu.is_semi(good) and not gpu.is_semi(bad)
    for wrong in (bad, good.float(), good[:31], good[None]):
        with pytest.raises(SecateurError, match="2:4 needs"):
            gpu.compress_semi(wrong.to(DEVICE))


COMPILE = """
import re, sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from secateur.kernels import gpu, triton_bits

def code(kernel, types, constants, warps):
    names = kernel.arg_names
    signature = {n: types.get(n, "constexpr") for n in names}
    source = ASTSource(kernel, signature, {(names.index(k),): v for k, v in constants.items()}, {})
    return compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32), options={"num_warps": warps}).asm["ptx"]

sizes = {"rows": "i32", "cols": "i32", "group": "i32", "start": "*i32", "words": "*i32"}
for kind in sys.argv[2:]:
    tiling = gpu._tiling(4096, 4096)
    warps = tiling.pop("num_warps")
    for tokens, bias in ((1, None), (4, "*" + kind)):
        types = {**sizes, **{n: "*" + kind for n in ("x", "values", "y")}, **({"bias": bias} if bias else {})}
        constants = {**tiling, "TOKENS": tokens, "BIASED": bias is not None, "ACTIVATION": 1}
        ptx = code(triton_bits.multiply, types, constants if bias else {**constants, "bias": None}, warps)
        assert "popc.b32" in ptx and ".local" not in ptx, kind  # counted by one instruction; no array left registers
    code(triton_bits.unpack, {**sizes, "values": "*" + kind, "dense": "*" + kind}, {"ROWS": 8, "PANELS": 2}, 4)
print("compiled")
"""


@needs_triton
@pytest.mark.parametrize("generation", ["80 fp16", "90 bf16"])
def test_the_kernels_compile_for_gpus(generation: str, tmp_path: Path) -> None:
    """Down to machine code, which needs no GPU; the interpreter allows what the compiler does not."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_DEFAULT_FP_FUSION": "1"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, *generation.split()], capture_output=True, text=True, timeout=300, check=False,
        cwd=Path(__file__).parents[2], env=environment,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.endswith("compiled\n"), done.stderr[-3000:]
