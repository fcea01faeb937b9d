"""Every compiled kernel against dense arithmetic in float64, and the operators and layers above them."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from secateur.compression.modules import SparseConv2d, SparseLinear
from secateur.errors import SecateurError
from secateur.formats import KINDS, pack
from secateur.formats.packed import MOST_OF_QUADS
from secateur.kernels import build, int4, ops
from secateur.kernels.library import BUILT, Library, openmp, supported
from tests.kernels.sample import LAYERS, layers, sparse

SOURCES = ("int4.cpp", "int4.h", "sparse.cpp", "sparse.h", "threads.h", "vectors.h")


@dataclasses.dataclass
class Kernels:
    """One compiled library, and where it lies."""

    name: str
    path: Path
    library: Library

    @contextmanager
    def on(self, threads: int, own: bool) -> Iterator[None]:
        """Run on so many threads, of its own or of the OpenMP pool."""
        before = torch.get_num_threads()
        handle = ctypes.CDLL(str(self.path))
        handle.sparse_use_pool.argtypes = (ctypes.c_void_p,)
        torch.set_num_threads(threads)
        handle.sparse_use_pool(None if own else openmp())
        try:
            yield
        finally:
            torch.set_num_threads(before)
            handle.sparse_use_pool(openmp())


def compiled(name: str, folder: Path) -> Path:
    """The built library; one of 16 lanes, or one whose source has changed since, is compiled now."""
    path = BUILT / f"sparse_{name}.so"
    if path.exists() and path.stat().st_mtime >= max((build.SOURCE / name).stat().st_mtime for name in SOURCES):
        return path
    cxx = build.compiler()
    if cxx is None:
        pytest.skip("no C++ compiler")
    wide = ("-DLANES=16", "-DBYTES=64", "-Wno-psabi", *build.TARGETS["avx2" if "avx2" in supported() else "portable"])
    flags = (*build._COMMON, "-O1", *(wide if name == "wide" else build.TARGETS[name]))
    assert build.compile_one(cxx, folder / f"sparse_{name}.so", flags) is None
    return folder / f"sparse_{name}.so"


@pytest.fixture(scope="module", params=[*supported(), "wide"])
def kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernels]:
    """Each library that this machine runs, in the place of the one that it would choose."""
    path = compiled(request.param, tmp_path_factory.mktemp("kernels"))
    found = Kernels(request.param, path, Library(path))
    with pytest.MonkeyPatch.context() as patch:
        for module in (ops, int4):
            patch.setattr(module, "library", lambda: found.library)
        yield found


def test_each_library_is_what_it_says(kernels: Kernels) -> None:
    lanes = {"avx512vnni": 16, "avx512": 16, "avx2": 8, "portable": 4, "wide": 16}[kernels.name]
    isa = {"wide": "avx2" if "avx2" in supported() else "portable"}.get(kernels.name, kernels.name)
    assert kernels.library.lanes == lanes and kernels.library.isa in (isa, "neon")


@given(
    st.integers(0, 1 << 32), st.integers(1, 70), st.sampled_from(int4.GROUPS), st.integers(1, 5), st.integers(1, 9),
    st.booleans(), st.booleans(), st.booleans(), st.sampled_from([1, 2]), st.booleans(),
)  # fmt: skip
def test_weights_of_4_bits(
    kernels: Kernels, seed: int, rows: int, group: int, groups: int, tokens: int, zeros: bool, biased: bool, relu: bool,
    threads: int, own: bool,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    x, scale = torch.randn(tokens, group * groups, generator=generator), torch.rand(rows, groups, generator=generator)
    values = torch.randint(0, 256, (rows, group * groups // 2), dtype=torch.uint8, generator=generator)
    zero = torch.randint(-8, 8, (rows, groups), dtype=torch.int8, generator=generator) if zeros else None
    bias = torch.randn(rows, generator=generator) if biased else None
    dense, many = int4.floats(values, scale, zero).double(), tokens > int4._FEW
    with kernels.on(threads, own):
        y = int4.dense_int4(x, values, scale, zero, bias, int(relu))
    right, size = x.double() @ dense.T, x.double().abs() @ scale.double().repeat_interleave(group, 1).T * 16
    if bias is not None:
        right, size = right + bias.double(), size + bias.double().abs()
    right = right.relu() if relu else right
    allowed = 2**-7 * size if many else 1e-6 * size  # what is added up for few tokens is up to 16 times a scale
    assert y.shape == right.shape and bool(((y.double() - right).abs() <= allowed + 1e-30).all())


SEEDS = st.integers(0, 1 << 32)
DENSITIES = st.sampled_from([0.0, 0.02, 0.2, 0.6, 1.0])
KIND = st.sampled_from(list(KINDS))
INDEX = st.sampled_from([(True, False), (False, True), (True, True)])
CUTS = st.fixed_dictionaries({"group": st.integers(1, 64), "panel": st.sampled_from([64, 128, 192, 256])}) | st.just({})


def expect(y: Tensor, right: Tensor, size: Tensor) -> None:
    """Equal up to the rounding of sums of so large terms."""
    assert y.shape == right.shape and bool(((y.double() - right).abs() <= 1e-5 * size + 1e-30).all())


@given(
    SEEDS, st.integers(1, 150), st.integers(1, 400), DENSITIES, st.integers(0, 9) | st.integers(0, 200), KIND, CUTS,
    INDEX, st.booleans(), st.booleans(), st.sampled_from([1, 2]), st.booleans(),
)  # fmt: skip
def test_linear(
    kernels: Kernels, seed: int, rows: int, cols: int, density: float, tokens: int, kind: str, cut: dict[str, int],
    index: tuple[bool, bool], biased: bool, relu: bool, threads: int, own: bool,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    weight, x = sparse(generator, rows, cols, density), torch.randn(tokens, cols, generator=generator)
    bias = torch.randn(rows, generator=generator) if biased else None
    packed = pack(weight, kind, **cut).indexed(*index)
    dense = weight.double() if kind == "float32" else packed.dense().double()
    with kernels.on(threads, own):
        y = SparseLinear(packed, bias, "relu" if relu else "none")(x)
    if kind == "int8-dynamic" and (not index[0] or (index[1] and tokens <= ops.FEW)):
        x = as_int8(x, kernels.library.isa != "portable")
    right, size = x.double() @ dense.T, x.double().abs() @ dense.abs().T
    if bias is not None:
        right, size = right + bias.double(), size + bias.double().abs()
    expect(y, right.relu() if relu else right, size)


def as_int8(x: Tensor, fused: bool) -> Tensor:
    """What activations become when they are rounded to int8 with one scale a token.

    ``fused``: products are not rounded before they are added, which decides what lies half way.
    """
    most = x.abs().amax(-1, keepdim=True).clamp(min=1e-30)
    inverse = torch.full_like(most, 127.0) / most  # 127 / most would be 127 times the reciprocal
    whole = (x.double() * inverse.double() if fused else x * inverse).round()
    return whole.double() * (most / 127).double()


@given(
    SEEDS, st.integers(1, 150), st.integers(1, 400), DENSITIES, st.booleans(), st.integers(1, 9) | st.integers(1, 200),
    CUTS, st.booleans(), st.booleans(), st.booleans(), st.sampled_from([1, 2]), st.booleans(),
)  # fmt: skip
def test_quads(
    kernels: Kernels, seed: int, rows: int, cols: int, density: float, fours: bool, tokens: int, cut: dict[str, int],
    col: bool, biased: bool, relu: bool, threads: int, own: bool,
) -> None:  # fmt: skip
    """Integer sums for any number of tokens, of zeros anywhere and in fours."""
    generator = torch.Generator().manual_seed(seed)
    weight, x = sparse(generator, rows, cols, density), torch.randn(tokens, cols, generator=generator)
    if fours:
        weight = torch.randn(rows, cols, generator=generator) * (weight[:, ::4] != 0).repeat_interleave(4, 1)[:, :cols]
    bias = torch.randn(rows, generator=generator) if biased else None
    packed = pack(weight, "int8-dynamic", **cut).indexed(col, True, True)
    with kernels.on(threads, own):
        y = SparseLinear(packed, bias, "relu" if relu else "none")(x)
    x, dense = as_int8(x, kernels.library.isa != "portable"), packed.dense().double()
    right, size = x @ dense.T, x.abs() @ dense.abs().T
    if bias is not None:
        right, size = right + bias.double(), size + bias.double().abs()
    expect(y, right.relu() if relu else right, size)


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_the_largest_sums_of_quads(kernels: Kernels, sign: float) -> None:
    """As many columns as there may be, all of them as large as they may be; fewer tokens read the same by bits."""
    weight, x = torch.full((3, MOST_OF_QUADS), 127.0), torch.full((6, MOST_OF_QUADS), sign * 127.0)
    x[1], weight[1] = -x[1], -weight[1]
    x[2] = 0.0
    layer = SparseLinear(pack(weight, "int8-dynamic").indexed(False, True, True), None)
    right = (x.double() @ weight.double().T).float()
    assert torch.equal(layer(x), right) and torch.equal(layer(x[:4]), right[:4])


@pytest.mark.parametrize("quad", [False, True], ids=["bits", "quad"])
def test_activations_of_int8_are_exact_where_int8_holds_them(kernels: Kernels, quad: bool) -> None:
    """Whole numbers up to 127 on both sides: the sums are whole numbers too, and equal to the last bit."""
    generator = torch.Generator().manual_seed(3)
    for tokens in (5, 64, 65, 129) if quad else range(1, 5):
        weight = torch.randint(-127, 128, (70, 4099), generator=generator).float()
        weight *= torch.rand(weight.shape, generator=generator) < 0.5
        x = torch.randint(-127, 128, (tokens, 4099), generator=generator).float()
        weight[:, 0], x[:, 0] = 127.0, -127.0  # scales of one
        layer = SparseLinear(pack(weight, "int8-dynamic").indexed(False, True, quad), None)
        assert torch.equal(layer(x), (x.double() @ weight.double().T).float())
        assert torch.equal(layer(x + 1e-3 * (x.abs() < 127)), layer(x))  # rounded away


@pytest.mark.parametrize("quad", [False, True], ids=["bits", "quad"])
def test_activations_of_int8_that_are_zero_or_not_finite(kernels: Kernels, quad: bool) -> None:
    bias = torch.tensor([1.0, 2.0])
    packed = pack(torch.tensor([[1.0, 0.0], [0.0, 3.0]]), "int8-dynamic").indexed(False, True, quad)
    layer = SparseLinear(packed, bias)
    x = torch.tensor([[0.0, 0.0], [float("nan"), 1.0], [1.0, float("-inf")], [1.0, -1.0]])
    if quad:
        x = x.repeat(2, 1)
    y = layer(x)
    assert torch.equal(y[0], bias) and bool(y[1:3].isnan().all())
    assert torch.allclose(y[3], torch.tensor([2.0, -1.0]), atol=1e-6)
    if quad:
        assert torch.equal(y[4:], y[:4]) or bool(y[5:7].isnan().all() and torch.equal(y[[4, 7]], y[[0, 3]]))
    assert bool(layer(torch.full((9 if quad else 1, 2), 1e-38)).isfinite().all())


PAIRS = st.tuples(st.integers(1, 3), st.integers(1, 3))


@given(
    SEEDS, st.integers(1, 40), st.integers(1, 9), DENSITIES, st.integers(0, 3), PAIRS, PAIRS,
    st.tuples(st.integers(0, 3), st.integers(0, 3)), PAIRS, st.tuples(st.integers(1, 20), st.integers(1, 20)), KIND,
    st.booleans(), st.booleans(), st.sampled_from([1, 2]), st.booleans(), st.sampled_from([0.0, 2.0, 1e9]),
)  # fmt: skip
def test_convolution(
    kernels: Kernels, seed: int, rows: int, channels: int, density: float, batch: int, kernel: tuple[int, int],
    stride: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int], size: tuple[int, int], kind: str,
    biased: bool, relu: bool, threads: int, own: bool, copied: float,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    weight = sparse(generator, rows, channels * kernel[0] * kernel[1], density)
    x, bias = torch.randn(batch, channels, *size, generator=generator), torch.randn(rows, generator=generator)
    packed = pack(weight, kind).indexed(col=True, bits=False)
    layer = SparseConv2d(
        packed, bias if biased else None, kernel, stride, padding, dilation, "relu" if relu else "none"
    )
    fits = all(n + 2 * p > d * (k - 1) for n, p, d, k in zip(size, padding, dilation, kernel, strict=True))
    with kernels.on(threads, own), pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "_COPIED", copied)  # whether inputs are copied together or read where they are
        if not fits:
            with pytest.raises(SecateurError, match="was given only"):
                layer(x)
            return
        y = layer(x)
    dense = (weight if kind == "float32" else packed.dense()).double().view(rows, channels, *kernel)
    how = (stride, padding, dilation)
    right = F.conv2d(x.double(), dense, bias.double() if biased else None, *how)
    terms = F.conv2d(x.double().abs(), dense.abs(), bias.double().abs() if biased else None, *how)
    expect(y, right.relu() if relu else right, terms)


@LAYERS
def test_batches_are_taken_in_parts(kernels: Kernels, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, dense, x = layers()[name]
    x = torch.cat([x * k for k in range(1, 16)])
    monkeypatch.setattr(ops, "_TOKENS", 64)
    monkeypatch.setattr(ops, "_FLOATS", 1)
    torch.testing.assert_close(layer(x), dense(x), rtol=1e-4, atol=1e-4)


@LAYERS
def test_what_is_not_a_number_stays_where_it_is(kernels: Kernels, name: str) -> None:
    """It reaches its own token, or the positions that see it, and a ReLU keeps it."""
    layer, dense, x = layers()[name]
    layer._facts = (*layer._facts[:-1], 1)  # type: ignore[operator, index]
    clean = layer(x)
    x[0, 0] = float("nan")
    found = layer(x)
    seen = torch.zeros_like(x)
    seen[0, 0] = 1
    reached = F.conv2d(seen, (dense.weight != 0).float(), None, 2, 1) if name == "image" else seen @ dense.weight.T
    untouched = seen.amax(-1) == 0 if name != "image" else (F.max_pool2d(seen.amax(1), 3, 2, 1) == 0)[:, None]
    mask = untouched[..., None].expand_as(found) if name != "image" else untouched.expand_as(found)
    assert mask.any() and torch.equal(found[mask], clean[mask])
    assert (reached != 0).any() and found[reached != 0].isnan().all()


def test_several_threads_of_python(kernels: Kernels) -> None:
    """Scratch memory belongs to a thread."""
    layer, dense, _ = layers()["many"]
    inputs = [torch.randn(40 + k, 108) for k in range(4)]
    wrong: list[float] = []

    def work(x: Tensor) -> None:
        right = dense(x)
        wrong.extend(float((layer(x) - right).abs().max()) for _ in range(30))

    workers = [threading.Thread(target=work, args=(x,)) for x in inputs]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(wrong) == 120 and max(wrong) < 1e-4


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_process(kernels: Kernels) -> None:
    """OpenMP would wait for threads that a child does not have."""
    layer, dense, x = layers()["many"]
    right = dense(x)
    with kernels.on(2, own=False), warnings.catch_warnings():
        layer(x)
        warnings.simplefilter("ignore")  # newer Pythons warn of any fork beside threads
        child = os.fork()
        if not child:
            os._exit(0 if torch.allclose(layer(x), right, atol=1e-4) else 1)
        stop = threading.Timer(20, os.kill, (child, 9))
        stop.start()
        _, status = os.waitpid(child, 0)
        stop.cancel()
    assert status == 0
